"""InternalKD: a spiking classifier against a BERT, inside (hidden states, attention scores) and at its predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.distill.objectives import refuse_wrapped
from spikelm.distill.parameters import PROJECTIONS
from spikelm.distill.taps import Taps
from spikelm.errors import SpikelmError
from spikelm.layers.equilibrium_if import by_layer

TERMS = ("hidden", "attention", "soft", "hard")


@dataclass(frozen=True)
class InternalKD:
    """Weighted sum of four terms, means over the sentences of an update (SpikingBERT, arXiv 2308.10873).

    hidden: mean squared error of the teacher's hidden states and the student's rates behind one linear map that all
        layers share: {embedding, 1, .., n} against the teacher's {0, N/n, 2N/n, .., N}, over real tokens and channels.
    attention: mean squared error of query k^T / sqrt(d_h) before the softmax, of the student's layers and the last of
        each of the teacher's n blocks, over heads and pairs of real tokens.
    soft: -sum p log q at ``temperature``, p the teacher's classes, times temperature^2.
    hard: the cross-entropy with the labels.

    The paper's three stages are hidden and attention on text ("general") and on the task's sentences ("internal"),
    then soft on those ("prediction"); `stage` gives each.
    """

    hidden_weight: float = 1.0
    attention_weight: float = 1.0
    soft_weight: float = 0.0
    hard_weight: float = 0.0
    temperature: float = 1.0

    items = "sentences"  # what the trainer counts

    def __post_init__(self) -> None:
        weights = {f"{name}_weight": getattr(self, f"{name}_weight") for name in TERMS}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise SpikelmError(f"{name} must be finite and >= 0, given {weight}")
        if not any(weights.values()):
            raise SpikelmError(f"at least one of {', '.join(weights)} must be > 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SpikelmError(f"temperature must be finite and > 0, given {self.temperature}")

    @classmethod
    def stage(cls, name: str, **changes: float) -> InternalKD:
        """The terms of "general", "internal" (the same terms) or "prediction", with ``changes``."""
        stages: dict[str, dict[str, float]] = {
            "general": {},
            "internal": {},
            "prediction": {"hidden_weight": 0.0, "attention_weight": 0.0, "soft_weight": 1.0},
        }
        if name not in stages:
            raise SpikelmError(f"stage must be one of {', '.join(stages)}; got {name!r}")
        return cls(**(stages[name] | changes))

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sentences of a batch."""
        return torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)

    def build_projections(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The map from the student's channels to the teacher's, which trains with the student and is then thrown away.

        It starts as the identity where the widths agree. [ours] Without the hidden term there is nothing to map.
        """
        if self.hidden_weight == 0:
            return nn.Identity()
        inner: Any = student
        sizes = inner.config.hidden_size, teacher.config.hidden_size  # type: ignore[union-attr]
        linear = nn.Linear(*sizes, device=inner.device)  # type: ignore[arg-type]
        if sizes[0] == sizes[1]:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return linear

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batch: Mapping[str, Tensor],
        num_items: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The terms with a weight > 0, and what a student in training tells of itself.

        "rate_gap.<layer>" is the mean |asr - F| of a layer's populations where it measured spiking rates, "residual"
        that of the fixed point where it solved for one.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if self.hidden_weight > 0:
            refuse_wrapped(self, student)  # the map is called outside of the student's forward
        inside = self.hidden_weight > 0 or self.attention_weight > 0
        count = self.count_items(batch) if num_items is None else num_items
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        output = student(**inputs, output_hidden_states=inside, output_attention_scores=self.attention_weight > 0)
        terms: dict[str, Tensor] = {}
        if inside or self.soft_weight > 0:
            target, scores = teacher_outputs(teacher, inputs, self.attention_weight > 0)
        if self.hidden_weight > 0:
            project: Any = getattr(student, PROJECTIONS)
            terms["hidden"] = hidden_error(target.hidden_states, output.hidden_states, project, real) / count
        if self.attention_weight > 0:
            terms["attention"] = score_error(scores, output.attention_scores, real) / count
        if self.soft_weight > 0:
            terms["soft"] = soft_error(target.logits, output.logits, self.temperature) / count
        if self.hard_weight > 0:
            if "labels" not in batch:
                raise SpikelmError("hard_weight takes a batch with labels; it has " + ", ".join(batch))
            terms["hard"] = F.cross_entropy(output.logits.float(), batch["labels"], reduction="sum") / count
        total = torch.stack([getattr(self, f"{name}_weight") * term for name, term in terms.items()]).sum()
        # Means of a part of the update, weighed so that the trainer's sum over parts is the mean of the whole.
        share = self.count_items(batch) / count
        return {"loss": total, **terms, **{name: share * mean for name, mean in _diagnostics(output, total).items()}}


def _diagnostics(output: Any, like: Tensor) -> dict[str, Tensor]:
    gaps_by_layer = by_layer(getattr(output, "rate_gaps", None) or {})
    found = {f"rate_gap.{layer}": torch.stack(gaps).mean() for layer, gaps in gaps_by_layer.items()}
    if "forward" in (getattr(output, "solutions", None) or {}):
        found["residual"] = like.new_tensor(output.solutions["forward"].residual)
    return found


@torch.no_grad()
def teacher_outputs(teacher: nn.Module, inputs: Mapping[str, Tensor], with_scores: bool) -> tuple[Any, list[Tensor]]:
    """A BERT's output with hidden_states, and its attention scores before mask and softmax, a layer each."""
    inner = getattr(teacher, "bert", teacher)
    layers = getattr(getattr(inner, "encoder", None), "layer", None)
    if layers is None:
        raise SpikelmError(f"the teacher must be a BERT of transformers; got a {type(teacher).__name__}")
    attentions = [layer.attention.self for layer in layers] if with_scores else []
    taps = {f"{i}.{name}": getattr(part, name) for i, part in enumerate(attentions) for name in ("query", "key")}
    with Taps(taps) as seen:
        output = teacher(**inputs, output_hidden_states=True)
    scores = []
    for index, part in enumerate(attentions):
        heads = (
            seen.outputs[f"{index}.{name}"].unflatten(-1, (-1, part.attention_head_size)) for name in ("query", "key")
        )
        query, key = (x.transpose(1, 2) for x in heads)  # b h l d
        scores.append(query @ key.transpose(-1, -2) / part.attention_head_size**0.5)
    return output, scores


def matched(teacher: Sequence[Tensor], students: int) -> list[Tensor]:
    """Of the teacher's N values the last of each of ``students`` equal blocks."""
    if students < 1 or len(teacher) % students:
        raise SpikelmError(f"the teacher's {len(teacher)} layers must be a multiple of the student's {students}")
    size = len(teacher) // students
    return list(teacher[size - 1 :: size])


def hidden_error(teacher: Sequence[Tensor], student: Sequence[Tensor], project: nn.Module, real: Tensor) -> Tensor:
    """Sum over sentences of the mean squared error over layers, real tokens and channels.

    Args:
        teacher, student: [B, L, d] each, the embedding's and every layer's.  real: bool [B, L].
    """
    pairs = list(zip([teacher[0], *matched(teacher[1:], len(student) - 1)], student, strict=True))
    errors = [(project(rates) - target).float().square().mean(-1) for target, rates in pairs]
    return sentence_means(torch.stack(errors).mean(0), real).sum()


def score_error(teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor) -> Tensor:
    """Sum over sentences of the mean squared error over layers, heads and pairs of real tokens; [B, H, L, L] each."""
    targets = matched(teacher, len(student))
    if targets[0].shape != student[0].shape:
        raise SpikelmError(
            f"attention scores of the teacher {tuple(targets[0].shape)} and the student {tuple(student[0].shape)} "
            "differ: their heads must agree, or attention_weight be 0"
        )
    errors = [(score - target).float().square().mean(1) for target, score in zip(targets, student, strict=True)]
    pairs = real[:, :, None] & real[:, None, :]
    return sentence_means(torch.stack(errors).mean(0).flatten(1), pairs.flatten(1)).sum()


def soft_error(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Sum over sentences of temperature^2 (-sum p log q), both softened; logits [B, classes]."""
    if teacher.shape != student.shape:
        raise SpikelmError(f"the teacher has {teacher.shape[-1]} classes, the student {student.shape[-1]}")
    p = (teacher.float() / temperature).softmax(-1)
    return -(temperature**2) * (p * (student.float() / temperature).log_softmax(-1)).sum()


def sentence_means(values: Tensor, real: Tensor) -> Tensor:
    """Means of values [B, n] where real [B, n]: [B], 0 for a row of padding."""
    return torch.where(real, values, 0).sum(1) / real.sum(1).clamp(min=1)
