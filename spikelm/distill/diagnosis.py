"""Why a loss, a gradient or an update is not finite, found by looking at what the step worked with; and its batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from spikelm.distill.checkpoints import last_whole
from spikelm.distributed import rank, world_size
from spikelm.files import write_bytes


def non_finite_tensor(model: nn.Module) -> str | None:
    """ "parameter NAME" or "buffer NAME" of the first tensor of the model that holds a NaN or an infinity, or None."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if tensor.is_floating_point() and not _is_finite(tensor):
                return f"{kind} {name}"
    return None


def _is_finite(tensor: Any) -> bool:
    """Of a tensor in parts, this process's own."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def likely_cause(
    student: nn.Module,
    frozen: Mapping[str, nn.Module],
    terms: Mapping[str, Tensor | float],
    *,
    loss_is_finite: bool,
    updates: int,
    learning_rate: float,
    max_grad_norm: float,
    reduced_precision: str | None,
) -> tuple[int, str]:
    """The first that holds of: a bad tensor of a frozen model, a bad one of the student, a term of the loss or a
    gradient that is not finite. Of several processes, which see parts of models, the least of theirs is the cause.

    Args:
        frozen: what else the loss is computed with, by its name ("teacher", "reference").
        terms: the parts of the loss.
        updates: optimizer steps made so far.
        reduced_precision: "bf16" or "fp16" where the forward pass runs in it, else None.
    """
    for role, model in frozen.items():
        bad = non_finite_tensor(model)
        if bad is not None:
            return 0, f"the {role}'s {bad} is not finite: its weights are damaged, load it again"
    bad = non_finite_tensor(student)
    smaller = f"lower learning_rate ({learning_rate:g}) or max_grad_norm ({max_grad_norm:g}, 0 is no clipping)"
    if bad is not None and updates == 0:
        return 1, f"the student's {bad} is not finite, and was not before the first update: its weights are damaged"
    if bad is not None:
        return 1, f"the student's {bad} is not finite: the update before blew up, {smaller}"
    remedy = f"; {smaller}" if reduced_precision is None else f"; try {reduced_precision}=false, or {smaller}"
    wrong = [name for name, value in terms.items() if not math.isfinite(float(value))]
    if wrong or not loss_is_finite:
        what = f"term {', '.join(wrong)} of the loss" if wrong else "the loss"
        return (
            2 if wrong else 3,
            f"{what} is not finite though all parameters are: values overflow in the forward pass{remedy}",
        )
    gradients = [(name, p.grad) for name, p in student.named_parameters() if p.grad is not None]
    infinite = [name for name, gradient in gradients if not _is_finite(gradient)]
    what = (
        f"of {infinite[0]}" + (f" and {len(infinite) - 1} more" if infinite[1:] else "") if infinite else "as a whole"
    )
    return (
        4 if infinite else 5,
        f"the gradient {what} is not finite though the loss is: the backward pass overflows{remedy}",
    )


def last_good_checkpoint(output_dir: str | Path) -> str:
    """ "last whole checkpoint: PATH", or "no checkpoint yet". Deletes nothing."""
    whole = last_whole(output_dir)
    return "no checkpoint yet" if whole is None else f"last whole checkpoint: {whole}"


def save_batches(directory: Path, batches: Iterable[Mapping[str, Any]], step: int, problem: str) -> Path:
    """The tensors of an update's batches as directory/step-<step>.safetensors, of several processes one file each.

    Names are micro_batch_<number>.<name>, as micro_batch_0.input_ids [B, L]; the file's metadata say step and problem.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"micro_batch_{number}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    process = f"-rank{rank()}" if world_size() > 1 else ""
    content = safetensors.torch.save(tensors, {"step": str(step), "problem": problem})
    return write_bytes(directory / f"step-{step}{process}.safetensors", content)
