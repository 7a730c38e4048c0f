"""What a student is trained for: objective(student, teacher, batch, num_items) -> {"loss": ..., further terms}.

A batch holds input_ids [B, L] and, where needed, attention_mask and labels [B, L] (labels unshifted, -100 ignored).
Every value of the result is a scalar; "loss" comes first and alone carries the gradient that counts. `num_items` is the
number of counted tokens of the whole update when the batch is only a part of it (see losses.py). The teacher must be
frozen and in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikelm.distill.losses import (
    chunked_logit_loss,
    feature_distance,
    hard_target,
    hidden_alignment,
    kl_divergence,
    loss_mask,
    matrix_orientation,
    next_tokens,
    relative_hidden_error,
    sbds_divergence,
)
from spikelm.distill.taps import Taps, decoder_layers, eager_attention, mixer_modules, norm_modules, output_head
from spikelm.errors import SpikelmError

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """Anything the trainer can minimise.

    It may have `count_items(batch) -> Tensor`, what num_items counts instead of tokens, and `items`, its name.
    """

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class MatrixOrientation:
    """MOHAWK step 1: the student's mixing matrices against the teacher's attention maps, summed over layers.

    Every student mixer is fed the teacher's normalised layer input and needs `mixing_matrix(hidden_states) -> [B, H, L,
    L]`. The teacher's maps of all layers, layers * B * H * L^2 numbers, are held: use a small batch for long contexts.
    """

    called_methods = ("mixing_matrix",)

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        refuse_wrapped(self, student)
        mask, padding = batch_mask(batch), mixer_padding(batch)
        total: Tensor | None = None
        for mixer, hidden, output in _mixer_pairs(student, teacher, batch, eager=True):
            if not hasattr(mixer, "mixing_matrix"):
                raise SpikelmError(f"{type(mixer).__name__} has no mixing_matrix: the student needs state-space mixers")
            if not isinstance(output, tuple) or output[1] is None:
                raise SpikelmError("the teacher's mixers give no attention maps: the teacher needs attention layers")

            def term_of(mixer: Any, hidden: Tensor, teacher_map: Tensor) -> Tensor:
                student_map = mixer.mixing_matrix(hidden, **padding)
                if student_map.shape != teacher_map.shape:
                    raise SpikelmError(
                        f"student mixing matrix {tuple(student_map.shape)} against teacher attention map "
                        f"{tuple(teacher_map.shape)}: heads must agree"
                    )
                return matrix_orientation(teacher_map, student_map, mask, num_items)

            # Recomputed in the backward pass, so that one layer's [B, H, L, L] graph exists at a time.
            term = checkpoint(term_of, mixer, hidden, output[1], use_reentrant=False)
            total = term if total is None else total + term
        assert total is not None  # decoder_layers never gives an empty list
        return {"loss": total}


@dataclass(frozen=True)
class HiddenAlignment:
    """MOHAWK step 2: the mixers' outputs per token in L2, the teacher's normalised layer input fed to both, summed over
    layers.
    """

    called_methods = ("mixing_matrix",)

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        refuse_wrapped(self, student)
        mask, padding = batch_mask(batch), mixer_padding(batch)
        total: Tensor | None = None
        for mixer, hidden, output in _mixer_pairs(student, teacher, batch, eager=False):
            term = hidden_alignment(_first(output), _first(mixer(hidden, **padding)), mask, num_items)
            total = term if total is None else total + term
        assert total is not None
        return {"loss": total}


@dataclass(frozen=True)
class LogitDistillation:
    """alpha KL(p || q) + beta KL(q || p) per token on the logits, p the teacher, in nats (MOHAWK step 3 with the
    default weights).

    Args:
        alpha, beta: weights of the forward and the reverse divergence, >= 0 and not both 0.
        chunk_size: tokens whose logits exist at once, >= 1.
    """

    alpha: float = 1.0
    beta: float = 0.0
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        _check_divergence(self.alpha, self.beta, self.chunk_size)

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_hidden = last_hidden(teacher, batch)
        student_hidden = last_hidden(student, batch)
        return {"loss": _divergence(self, teacher, teacher_hidden, student, student_hidden, batch, num_items)}


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy with the next token; the teacher is not asked. For training a teacher itself. [ours]"""

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        logits = student(input_ids=batch["input_ids"], **mixer_padding(batch), use_cache=False).logits
        return {"loss": hard_target(logits, next_tokens(batch["input_ids"]), batch_mask(batch), num_items)}


@dataclass(frozen=True)
class SBDS:
    """MAR, Eq. 5-7: `divergence` (alpha KL(p || q) + beta KL(q || p) on the logits) plus feature_weight times
    `features`, the mean L2 distance of normalised hidden states over tokens and layers. No cross-entropy, no
    temperature.

    Both terms are averaged over the same tokens, those whose prediction counts [ours].

    Args:
        alpha, beta: weights of the forward and the reverse divergence, >= 0 and not both 0.
        feature_weight: >= 0 [ours; the paper has 1]; at 0 the features are neither recorded nor logged.
        taps: "pre" (output of the norm before the mixer, the paper's choice), "post" (before the MLP) or "both".
        chunk_size: tokens whose logits exist at once, >= 1.
    """

    alpha: float = 0.2
    beta: float = 0.7
    feature_weight: float = 1.0
    taps: str = "pre"
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        _check_divergence(self.alpha, self.beta, self.chunk_size)
        if not (math.isfinite(self.feature_weight) and self.feature_weight >= 0):
            raise SpikelmError(f"feature_weight must be finite and >= 0, given {self.feature_weight}")
        if self.taps not in ("pre", "post", "both"):
            raise SpikelmError(f"taps must be one of pre, post, both, given {self.taps!r}")

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        tapped = self.feature_weight > 0
        teacher_norms = norm_modules(teacher, self.taps) if tapped else {}
        student_norms = norm_modules(student, self.taps) if tapped else {}
        _check_layers(len(teacher_norms), len(student_norms))
        with torch.no_grad(), Taps(teacher_norms) as teacher_taps:
            teacher_hidden = last_hidden(teacher, batch)
        with Taps(student_norms) as student_taps:
            student_hidden = last_hidden(student, batch)
        divergence = _divergence(self, teacher, teacher_hidden, student, student_hidden, batch, num_items)
        if not tapped:
            return {"loss": divergence, "divergence": divergence}
        teacher_features = [teacher_taps.outputs[name] for name in teacher_norms]
        student_features = [student_taps.outputs[name] for name in student_norms]
        _check_width(teacher_hidden.shape[-1], student_hidden.shape[-1])
        features = feature_distance(teacher_features, student_features, batch_mask(batch), num_items)
        return {"loss": divergence + self.feature_weight * features, "divergence": divergence, "features": features}


@dataclass(frozen=True)
class HiddenMatch:
    """SpikingMamba's single stage: kl_weight KL(p || q) on the logits, p the teacher, plus hidden_weight times the
    relative squared error of the residual stream after every block.

    The terms are the paper's; their form, weights and temperature are ours. Both are means over the tokens whose
    prediction counts.

    Args:
        kl_weight, hidden_weight: >= 0 and not both 0; a term of weight 0 is neither computed nor logged.
        temperature: of both softmaxes, > 0; the divergence is multiplied by its square.
        chunk_size: tokens whose logits exist at once, >= 1.
    """

    kl_weight: float = 1.0
    hidden_weight: float = 1.0
    temperature: float = 1.0
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        weights = (self.kl_weight, self.hidden_weight)
        if not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
            raise SpikelmError(f"kl_weight and hidden_weight must be finite, >= 0 and not both 0, given {weights}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SpikelmError(f"temperature must be finite and > 0, given {self.temperature}")
        check_chunk_size(self.chunk_size)

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        teacher_layers, student_layers = (
            {str(index): layer for index, layer in enumerate(decoder_layers(model))} if self.hidden_weight else {}
            for model in (teacher, student)
        )
        _check_layers(len(teacher_layers), len(student_layers))
        with torch.no_grad(), Taps(teacher_layers) as teacher_taps:
            teacher_hidden = last_hidden(teacher, batch)
        with Taps(student_layers) as student_taps:
            student_hidden = last_hidden(student, batch)
        terms: dict[str, Tensor] = {}
        total = student_hidden.new_zeros((), dtype=torch.float32)
        if self.kl_weight:
            divergence = partial(kl_divergence, temperature=self.temperature)
            terms["kl"] = _logit_loss(
                divergence, teacher, teacher_hidden, student, student_hidden, batch, self.chunk_size, num_items
            )
            total = total + self.kl_weight * terms["kl"]
        if self.hidden_weight:
            _check_width(teacher_hidden.shape[-1], student_hidden.shape[-1])
            teacher_stream, student_stream = (
                [_first(taps.outputs[layer]) for layer in teacher_layers] for taps in (teacher_taps, student_taps)
            )
            terms["hidden"] = relative_hidden_error(teacher_stream, student_stream, batch_mask(batch), num_items)
            total = total + self.hidden_weight * terms["hidden"]
        return {"loss": total, **terms}


def batch_mask(batch: Batch) -> Tensor:
    """`loss_mask` of a batch, bool [B, L]."""
    return loss_mask(batch["input_ids"], batch.get("labels"), batch.get("attention_mask"))


def mixer_padding(batch: Batch) -> dict[str, Tensor]:
    """The attention_mask argument of a mixer, where the batch has one."""
    return {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """What the head is fed, [B, L, d]."""
    hidden: Tensor = hidden_outputs(model, batch).hidden_states[-1]
    return hidden


def hidden_outputs(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """The output, with hidden_states, of one call of the model's own forward (which a distributed wrapper needs).

    The logits are asked for at no position, so [B, L, V] is never formed. ``more``: further arguments.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    nowhere = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
    return model(**inputs, output_hidden_states=True, logits_to_keep=nowhere, use_cache=False, **more)


def _divergence(
    objective: LogitDistillation | SBDS,
    teacher: nn.Module,
    teacher_hidden: Tensor,
    student: nn.Module,
    student_hidden: Tensor,
    batch: Batch,
    num_items: Tensor | float | None,
) -> Tensor:
    divergence = partial(sbds_divergence, alpha=objective.alpha, beta=objective.beta)
    return _logit_loss(
        divergence, teacher, teacher_hidden, student, student_hidden, batch, objective.chunk_size, num_items
    )


def _logit_loss(
    divergence: Callable[[Tensor, Tensor], Tensor],
    teacher: nn.Module,
    teacher_hidden: Tensor,
    student: nn.Module,
    student_hidden: Tensor,
    batch: Batch,
    chunk_size: int,
    num_items: Tensor | float | None,
) -> Tensor:
    teacher_head, student_head = output_heads(teacher, student)
    return chunked_logit_loss(
        divergence,
        teacher_hidden,
        teacher_head,
        student_hidden,
        student_head,
        batch_mask(batch),
        chunk_size,
        num_items,
    )


def output_heads(teacher: nn.Module, student: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Both heads, of one vocabulary."""
    heads = output_head(teacher), output_head(student)
    if heads[0].out_features != heads[1].out_features:
        raise SpikelmError(
            f"teacher has a vocabulary of {heads[0].out_features}, student of {heads[1].out_features}: "
            "logit distillation needs the same"
        )
    return heads


def _mixer_pairs(
    student: nn.Module, teacher: nn.Module, batch: Batch, eager: bool
) -> Iterator[tuple[Any, Tensor, Any]]:
    """For every layer: the student's mixer, the teacher's normalised layer input in its dtype, the teacher mixer's
    output.
    """
    student_mixers, teacher_mixers = mixer_modules(student), mixer_modules(teacher)
    _check_layers(len(teacher_mixers), len(student_mixers))
    with torch.no_grad(), eager_attention(teacher) if eager else nullcontext(), Taps(teacher_mixers) as taps:
        last_hidden(teacher, batch)
    _check_width(taps.inputs["0"].shape[-1], output_head(student).in_features)
    for name, mixer in student_mixers.items():
        yield mixer, taps.inputs[name].to(next(mixer.parameters()).dtype), taps.outputs[name]


def _first(output: Any) -> Tensor:
    """The hidden states of a mixer that returns them alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _check_divergence(alpha: float, beta: float, chunk_size: int) -> None:
    if not (math.isfinite(alpha) and math.isfinite(beta) and alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise SpikelmError(f"alpha and beta must be finite, >= 0 and not both 0, given alpha={alpha} beta={beta}")
    check_chunk_size(chunk_size)


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise SpikelmError(f"chunk_size must be at least 1 token, given {chunk_size}")


def _check_layers(teacher_count: int, student_count: int) -> None:
    if teacher_count != student_count:
        raise SpikelmError(f"teacher and student differ in tapped layers: {teacher_count} against {student_count}")


def _check_width(teacher_size: int, student_size: int) -> None:
    if teacher_size != student_size:
        raise SpikelmError(f"teacher and student differ in hidden size: {teacher_size} against {student_size}")


def refuse_wrapped(objective: object, student: nn.Module) -> None:
    """Parts of the student are called by themselves, outside its forward, where gradients would not be averaged.

    train() wraps the objective together with the student, and the student that it is called with is bare.
    """
    if isinstance(student, nn.parallel.DistributedDataParallel):
        raise SpikelmError(
            f"{type(objective).__name__} calls parts of the student by themselves, and their gradients would not be "
            "averaged: give the bare student, wrapped together with the objective as spikelm.distill.trainer.train does"
        )


def called_methods(objective: object) -> tuple[str, ...]:
    """The methods of a student's parts that an objective calls by themselves, those of what it is made of included."""
    inner = getattr(objective, "objective", None)
    own: tuple[str, ...] = getattr(objective, "called_methods", ())
    return own if inner is None else (*own, *called_methods(inner))
