"""SpAD, the distillation of BiSpikCLM (arXiv 2605.13859): a student aligned with a dense teacher at five places."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikelm.distill.losses import (
    as_weights,
    attention_alignment,
    chunked_sum,
    embedding_alignment,
    feature_alignment,
    hard_target,
    next_tokens,
    row_max_scaled,
    soft_target,
    teacher_rate,
)
from spikelm.distill.objectives import (
    Batch,
    batch_mask,
    check_chunk_size,
    hidden_outputs,
    mixer_padding,
    output_heads,
    refuse_wrapped,
)
from spikelm.distill.parameters import PROJECTIONS
from spikelm.distill.taps import Taps, eager_attention, mixer_modules, unwrapped
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode
from spikelm.neurons import BinaryIF

logger = logging.getLogger(__name__)

# A layer's map as a function and what it is formed of, or None and the map itself.
MapSource = tuple[Callable[[Tensor], Tensor] | None, Tensor]
WEIGHTS = ("embedding_weight", "attention_weight", "feature_weight", "soft_weight", "hard_weight")


@dataclass(frozen=True)
class SpAD:
    """embedding_weight EA + attention_weight SAA + feature_weight SFA + soft_weight STA + hard_weight HTA.

    EA embeddings, SAA attention maps and SFA hidden states of all layers, STA softened logits, HTA the next token; see
    the functions of losses.py. The student gives means over its time steps: hidden_states (its embedding, then every
    layer, the last one behind the final norm as the head is fed), and attentions [B, H, L, L] per layer, or, of a
    state-space student, its mixers' mixing_matrix. The teacher gives the same with eager attention, to which it is
    switched for its forward pass. All terms are means over the tokens whose prediction counts [ours].

    Hidden states pass through a trained MLP and LayerNorm per layer: train() attaches `build_projections` to the
    student and takes it off again. In a loop of one's own the student gets them as `student.distillation_projections`
    before the optimizer is made.

    Args:
        embedding_weight, attention_weight, feature_weight, soft_weight, hard_weight: >= 0 and not all 0; a term of
            weight 0 is neither computed nor logged.
        gamma: of the distance to the teacher's firing rate, in [0, 1]; 1 - gamma goes to the distance to its values.
        temperature: of both softmaxes in STA, > 0; the divergence is multiplied by its square.
        row_max: scale each row of the teacher's map by its largest entry before it drives the neuron [ours]. A
            probability fires only above v_threshold / 3.439 (T = 4, beta 0.9): without it the rates of a long context
            are nearly all 0, and the term rewards silence.
        T, beta, v_threshold: of the neuron that turns the teacher's values into rates; those of the student's neurons.
        project: put trained projections between widths and numbers of heads that differ, and compare student layer i
            of n_s with teacher layer ceil((i + 1) n_t / n_s) - 1 [ours]; without it a difference is an error.
        chunk_size: tokens whose logits exist at once, >= 1.
    """

    embedding_weight: float = 0.2
    attention_weight: float = 0.1
    feature_weight: float = 0.1
    soft_weight: float = 0.3
    hard_weight: float = 0.3
    gamma: float = 0.5
    temperature: float = 2.0
    row_max: bool = True
    T: int = 4
    beta: float = 0.9
    v_threshold: float = 1.0
    project: bool = False
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        weights = [getattr(self, name) for name in WEIGHTS]
        if not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
            raise SpikelmError(f"{', '.join(WEIGHTS)} must be finite, >= 0 and not all 0, given {weights}")
        if not 0 <= self.gamma <= 1:
            raise SpikelmError(f"gamma must be in [0, 1], given {self.gamma}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SpikelmError(f"temperature must be finite and > 0, given {self.temperature}")
        if self.T < 1 or self.T != int(self.T):
            raise SpikelmError(f"T must be a whole number >= 1, given {self.T}")
        BinaryIF(self.beta, self.v_threshold, reset_delay=True)  # names a value that it does not take
        check_chunk_size(self.chunk_size)

    @property
    def called_methods(self) -> tuple[str, ...]:
        """A state-space student's mixers are asked for their matrices."""
        return ("mixing_matrix",) if self.attention_weight else ()

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        projections: Any = getattr(unwrapped(student), PROJECTIONS, {})
        if len(projections) or self._mixers(student):
            refuse_wrapped(self, student)
        teacher_hidden, teacher_maps = self._teacher_states(teacher, batch)
        student_hidden, student_maps = self._student_states(student, batch)
        mask = batch_mask(batch)
        terms: dict[str, Tensor] = {}
        if self.embedding_weight:
            embedding = student_hidden[0]
            if "embedding" in projections:
                embedding = projections["embedding"](as_weights(embedding, projections["embedding"]))
            _check_same("width of the embeddings", teacher_hidden[0].shape[-1], embedding.shape[-1])
            terms["embedding"] = embedding_alignment(teacher_hidden[0], embedding, mask, num_items)
        if self.attention_weight:
            terms["attention"] = self._attention(projections, teacher_maps, student_maps, batch, num_items)
        if self.feature_weight:
            terms["feature"] = self._features(projections, teacher_hidden[1:], student_hidden[1:], mask, num_items)
        if self.soft_weight or self.hard_weight:
            terms |= self._targets(teacher, teacher_hidden[-1], student, student_hidden[-1], batch, num_items)
        loss = torch.stack([getattr(self, f"{name}_weight") * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def build_projections(self, student: nn.Module, teacher: nn.Module) -> nn.ModuleDict:
        """What trains beside the student, on its device, in float32 (float64 for a float64 student).

        "features": per layer Linear, GELU, Linear, LayerNorm. Where widths differ, "embedding": a Linear. Where numbers
        of heads differ, "heads": per layer a Linear over heads, at first their mean. The shapes are read off a forward
        pass of both models.

        Raises:
            SpikelmError: widths, heads or layers differ and project is False.
        """
        with torch.no_grad(), evaluation_mode(student, teacher):
            teacher_hidden, teacher_maps = self._teacher_states(teacher, _two_tokens(teacher))
            student_hidden, sources = self._student_states(student, _two_tokens(student))
            student_maps = [source if form is None else form(source) for form, source in sources]
        modules = nn.ModuleDict()
        if self.embedding_weight:
            widths = student_hidden[0].shape[-1], teacher_hidden[0].shape[-1]
            if self._differ("width of the embeddings", *widths):
                modules["embedding"] = nn.Linear(*widths, bias=False)
        if self.attention_weight:
            pairs = self._layer_pairs(student_maps, teacher_maps)
            heads = [(of_student.shape[1], of_teacher.shape[1]) for of_student, of_teacher in pairs]
            if any(self._differ("number of heads", *pair) for pair in heads):
                modules["heads"] = nn.ModuleList(_mean_over_heads(*pair) for pair in heads)
        if self.feature_weight:
            layers = self._layer_pairs(student_hidden[1:], teacher_hidden[1:])
            states = [(of_student.shape[-1], of_teacher.shape[-1]) for of_student, of_teacher in layers]
            for pair in states:
                self._differ("hidden size", *pair)
            modules["features"] = nn.ModuleList(_feature_projection(*pair) for pair in states)
        dtype = torch.float64 if student_hidden[0].dtype == torch.float64 else torch.float32
        return modules.to(student_hidden[0].device, dtype)

    def _mixers(self, student: nn.Module) -> dict[str, nn.Module]:
        """The state-space mixers whose matrices stand for attention maps; none where the student gives maps itself."""
        if self.attention_weight and any(hasattr(module, "mixing_matrix") for module in student.modules()):
            return mixer_modules(student)
        return {}

    def _student_states(self, student: nn.Module, batch: Batch) -> tuple[Sequence[Tensor], list[MapSource]]:
        """hidden_states and, where maps are compared, how every layer's map is formed; one forward pass."""
        if not self.attention_weight:
            return hidden_outputs(student, batch).hidden_states, []
        mixers: dict[str, Any] = self._mixers(student)
        if mixers:
            with Taps(mixers) as taps:
                hidden = hidden_outputs(student, batch).hidden_states
            padding = mixer_padding(batch)
            return hidden, [(partial(mixers[name].mixing_matrix, **padding), taps.inputs[name]) for name in mixers]
        output = hidden_outputs(student, batch, output_attentions=True)
        maps = _maps_of(output)
        if not maps:
            raise SpikelmError(
                f"student {type(unwrapped(student)).__name__} gives no attention maps and its mixers have no "
                'mixing_matrix: of a softmax student, give it attn_implementation="eager"; attention_weight=0 leaves '
                "the term out"
            )
        return output.hidden_states, [(None, each) for each in maps]

    @torch.no_grad()
    def _teacher_states(self, teacher: nn.Module, batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """hidden_states and, where they are compared, attention maps; one forward pass."""
        if not self.attention_weight:
            return hidden_outputs(teacher, batch).hidden_states, ()
        name = type(teacher).__name__
        before = getattr(getattr(teacher, "config", None), "_attn_implementation", None)
        with eager_attention(teacher):
            output = hidden_outputs(teacher, batch, output_attentions=True)
        maps = _maps_of(output)
        if not maps:
            remedy = "even with eager attention"
            if before != "eager":
                remedy = f'and stays with {before!r}: load it with attn_implementation="eager"'
            raise SpikelmError(
                f"teacher {name} gives no attention maps {remedy}; attention_weight=0 leaves the term out"
            )
        if before != "eager":
            _say_that_it_is_switched(name, str(before))
        return output.hidden_states, maps

    def _attention(
        self,
        projections: Any,
        teacher_maps: Sequence[Tensor],
        student_maps: Sequence[MapSource],
        batch: Batch,
        num_items: Tensor | float | None,
    ) -> Tensor:
        """SAA, mean over layers."""
        mask = batch_mask(batch)
        pairs = self._layer_pairs(student_maps, teacher_maps)
        over_heads = projections["heads"] if "heads" in projections else [nn.Identity()] * len(pairs)

        def term_of(source: MapSource, project: nn.Module, target: Tensor) -> Tensor:
            form, found = source
            found = found if form is None else form(found)
            if isinstance(project, nn.Linear):
                found = project(as_weights(found, project).movedim(1, -1)).movedim(-1, 1)
            _check_same("number of heads", target.shape[1], found.shape[1])
            rate = self._rate(row_max_scaled(target) if self.row_max else target)
            return attention_alignment(target, rate, found, mask, num_items, self.gamma, batch.get("attention_mask"))

        terms = []
        for (source, target), project in zip(pairs, over_heads, strict=True):
            if source[0] is None:
                terms.append(term_of(source, project, target))
            else:  # formed again in the backward pass, so that one layer's graph of maps exists at a time
                terms.append(checkpoint(term_of, source, project, target, use_reentrant=False))
        return torch.stack(terms).mean()

    def _features(
        self,
        projections: Any,
        teacher_states: Sequence[Tensor],
        student_states: Sequence[Tensor],
        mask: Tensor,
        num_items: Tensor | float | None,
    ) -> Tensor:
        """SFA, mean over layers."""
        if "features" not in projections:
            raise SpikelmError(
                f"SpAD with feature_weight={self.feature_weight:g} compares hidden states through trained projections, "
                f"and the student has none: train() attaches them; elsewhere set student.{PROJECTIONS} = "
                "objective.build_projections(student, teacher)"
            )
        terms = []
        pairs = self._layer_pairs(student_states, teacher_states)
        for (state, target), project in zip(pairs, projections["features"], strict=True):
            found = project(as_weights(state, project))
            terms.append(feature_alignment(target, self._rate(target), found, mask, num_items, self.gamma))
        return torch.stack(terms).mean()

    def _targets(
        self,
        teacher: nn.Module,
        teacher_hidden: Tensor,
        student: nn.Module,
        student_hidden: Tensor,
        batch: Batch,
        num_items: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """STA and HTA of the same logits."""
        teacher_head, student_head = output_heads(teacher, student)
        mask = batch_mask(batch)
        count = mask.sum() if num_items is None else num_items
        names = [name for name in ("soft", "hard") if getattr(self, f"{name}_weight")]

        def terms_of(teacher_rows: Tensor, student_rows: Tensor, targets: Tensor) -> Tensor:
            every = torch.ones_like(targets, dtype=torch.bool)
            logits = student_head(as_weights(student_rows, student_head))
            terms = []
            if self.soft_weight:
                with torch.no_grad():
                    teacher_logits = teacher_head(as_weights(teacher_rows, teacher_head))
                terms.append(soft_target(teacher_logits, logits, every, count, self.temperature))
            if self.hard_weight:
                terms.append(hard_target(logits, targets, every, count))
            return torch.stack(terms)

        targets = next_tokens(batch["input_ids"], batch.get("labels"))
        rows = (teacher_hidden[mask], student_hidden[mask], targets[mask])
        return dict(zip(names, chunked_sum(terms_of, rows, self.chunk_size), strict=True))

    def _rate(self, values: Tensor) -> Tensor:
        return teacher_rate(values, self.T, self.beta, self.v_threshold)

    def _layer_pairs(self, of_student: Sequence[Any], of_teacher: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
        """What each layer of the student is compared with."""
        count, teacher_count = len(of_student), len(of_teacher)
        self._differ("number of layers", count, teacher_count)
        return [
            (each, of_teacher[math.ceil((index + 1) * teacher_count / count) - 1])
            for index, each in enumerate(of_student)
        ]

    def _differ(self, what: str, of_student: int, of_teacher: int) -> bool:
        """Whether the two differ, which is an error without project."""
        if not self.project:
            _check_same(what, of_teacher, of_student)
        return of_student != of_teacher


def _check_same(what: str, of_teacher: int, of_student: int) -> None:
    if of_teacher != of_student:
        raise SpikelmError(
            f"teacher and student differ in {what}: {of_teacher} against {of_student}; with project=True train() puts "
            "trained projections between them"
        )


def _two_tokens(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)}


def _feature_projection(student_size: int, teacher_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(student_size, student_size),
        nn.GELU(),
        nn.Linear(student_size, teacher_size),
        nn.LayerNorm(teacher_size),
    )


def _mean_over_heads(student_heads: int, teacher_heads: int) -> nn.Module:
    if student_heads == teacher_heads:
        return nn.Identity()
    linear = nn.Linear(student_heads, teacher_heads, bias=False)
    nn.init.constant_(linear.weight, 1 / student_heads)
    return linear


def _maps_of(output: Any) -> tuple[Tensor, ...]:
    """The attention maps of all layers; none where a layer gives none."""
    maps = getattr(output, "attentions", None) or ()
    return () if any(each is None for each in maps) else tuple(maps)


@cache
def _say_that_it_is_switched(name: str, before: str) -> None:
    logger.warning("the attention of %s is switched from %s to eager in each forward pass, for its maps", name, before)
