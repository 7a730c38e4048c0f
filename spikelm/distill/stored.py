"""Distillation from what a teacher said before: its likeliest next tokens, kept by spikelm.data.teacher_store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikelm.distill.losses import as_weights, chunked_sum
from spikelm.distill.objectives import Batch, batch_mask, check_chunk_size, last_hidden
from spikelm.distill.taps import output_head
from spikelm.errors import SpikelmError


@dataclass(frozen=True)
class StoredDistillation:
    """KL(p || q) per token in nats, p of the stored teacher: its k likeliest tokens and, as one event, all others.

    Never more than the KL over the whole vocabulary, and equal to it where k is the vocabulary. The teacher that the
    trainer is given is not asked: torch.nn.Identity() will do. Batches are those of `collate_stored`.

    Args:
        chunk_size: tokens whose logits exist at once, >= 1.
    """

    chunk_size: int = 4096

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        if "teacher_ids" not in batch:
            raise SpikelmError(f"a batch of a teacher's store is needed (collate_stored), given {', '.join(batch)}")
        head, mask = output_head(student), batch_mask(batch)

        def chunk_sum(rows: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
            return stored_divergence(ids, log_probs, head(as_weights(rows, head))).sum()

        rows = (last_hidden(student, batch)[mask], batch["teacher_ids"][mask], batch["teacher_log_probs"][mask])
        count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
        return {"loss": chunked_sum(chunk_sum, rows, self.chunk_size) / count.clamp(min=1)}


def stored_divergence(ids: Tensor, log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL over k tokens and the rest: ids and log_probs [N, k] of the teacher, logits [N, V] of the student -> [N]."""
    log_q = logits.float().log_softmax(-1)
    of_student, of_teacher = log_q.gather(-1, ids), log_probs.float()
    p = of_teacher.exp()
    # A token that the teacher excludes (a logit of -inf) counts for nothing: 0 log 0 = 0.
    divergence = (p * (of_teacher - of_student).where(p > 0, 0)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return divergence
    # The rest by what is not among the k, not as 1 - sum: near 1 that would be rounding.
    rest_q = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    rest_p = (1 - p.sum(-1)).clamp(min=1e-6)  # float16 on the disk may sum to more than 1
    return divergence + rest_p * (rest_p.log() - rest_q)
