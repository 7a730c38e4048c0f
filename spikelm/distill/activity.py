"""Sparsity as a knob: a term that keeps the firing rates of a student's neurons below a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spikelm.distill.objectives import Batch, Objective, batch_mask
from spikelm.distill.sharing import sum_over_parts
from spikelm.distill.taps import unwrapped
from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from spikelm.layers import SpikingLinear

MEASURES = ("union", "sum")
PASSED_ON = ("count_items", "items", "build_projections")


@dataclass(frozen=True)
class Activity:
    """Another objective plus weight * max(0, rate - target) [ours].

    The rate is a mean over the banks of neurons, each counted by the weights behind it: with measure "union" the share
    of the weights that are read where the columns of silent channels are skipped. The hinge is linear, so from some
    weight on the target is met, and below the target nothing pulls. Means are over the real tokens of a batch, those of
    all processes that share it; with gradient accumulation every forward pass has its own hinge. Logged besides the
    objective's terms: "objective" (its loss), "activity" (the hinge) and "rate".

    Args:
        objective: what is trained for. What it counts, and what it trains beside the student, stay.
        target: a rate for all banks together, > 0 and at "union" <= 1; or one for the banks of each site that is named
            as in the student's recipe ({"ffn_in": 0.5}), the others being free. Several sites make several hinges,
            weighed like the rates.
        weight: in the objective's units per unit of rate, >= 0.
        measure: "union", the share of channels that fire in any frame; or "sum", the sum over frames of mean |s|.

    Raises:
        SpikelmError: a value out of range; when called, a student without neurons, a site that its recipe does not
            have, and reentrant gradient checkpointing, which would lose the gradient.
    """

    objective: Objective
    target: float | Mapping[str, float]
    weight: float = 1.0
    measure: Literal["union", "sum"] = "union"

    called_methods = ("fires", "spike_count")  # of the neurons, on what reached them

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise SpikelmError(f"measure must be one of {', '.join(MEASURES)}; got {self.measure!r}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise SpikelmError(f"weight must be finite and >= 0; got {self.weight}")
        targets = self.target.values() if isinstance(self.target, Mapping) else [self.target]
        highest = 1.0 if self.measure == "union" else math.inf
        if not targets or not all(0 < target <= highest and math.isfinite(target) for target in targets):
            limit = " and <= 1" if self.measure == "union" else ""
            raise SpikelmError(f"target must be a rate > 0{limit}, or such a rate per site; got {self.target}")

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ON:  # an objective need not have them, so neither must this one
            return getattr(self.objective, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, num_items: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        groups = self._groups(student)
        with _recorded_inputs(bank for banks, _ in groups for bank in banks) as inputs:
            terms = self.objective(student, teacher, batch, num_items)
        activity, rate = self._activity(groups, inputs, batch, num_items)
        others = {name: term for name, term in terms.items() if name != "loss"}
        loss = terms["loss"] + self.weight * activity
        return {"loss": loss, "objective": terms["loss"].detach(), **others, "activity": activity, "rate": rate}

    def _activity(
        self,
        groups: Sequence[tuple[Mapping[SpikingLinear, int], float]],
        inputs: Mapping[SpikingLinear, Tensor],
        batch: Batch,
        num_items: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        """The hinge, with its gradient, and the rate: this process's addends to those of the whole batch."""
        mask = batch.get("attention_mask")
        rates = torch.stack([self._rate(banks, inputs, mask) for banks, _ in groups])
        weights = [sum(banks.values()) for banks, _ in groups]
        tokens, count = _real_tokens(batch), self._count(batch)
        *spikes, all_tokens, whole_count = sum_over_parts(
            torch.stack([*(rates.double() * tokens), tokens.double(), count.to(tokens.device).double()])
        )
        # The hinge is of the whole batch's rate; its gradient is of this part of it.
        whole_rates = (torch.stack(spikes) / all_tokens.clamp_min(1)).to(rates.dtype)
        own = (tokens / all_tokens.clamp_min(1)).to(rates.dtype) * (rates - rates.detach())
        targets = rates.new_tensor([target for _, target in groups])
        hinge = _weighted_mean((whole_rates + own - targets).clamp_min(0), weights)
        # As for the objective: the parts of one update add up to its mean.
        whole_share = 1.0 if num_items is None else whole_count / num_items
        share = whole_share * count / whole_count.clamp_min(1)
        activity = whole_share * hinge - (whole_share - share) * hinge.detach()
        return activity.to(rates.dtype), (share * _weighted_mean(whole_rates, weights)).to(rates.dtype)

    def _groups(self, student: nn.Module) -> list[tuple[dict[SpikingLinear, int], float]]:
        """The banks that share a target, each by its owner with the weights behind it; and the target."""
        from spikelm.convert import recipe_of, spike_sites  # needs the layers, which a plain objective does not

        model = unwrapped(student)
        sites, weights = spike_sites(model), weights_behind(model)
        if not sites:
            raise SpikelmError(f"the student, a {type(model).__name__}, has no neurons: spikify(model, recipe) first")
        if not isinstance(self.target, Mapping):
            return [({owner: weights[name] for name, owner in sites.items()}, self.target)]
        recipe = recipe_of(model)
        patterns = {} if recipe is None else recipe.sites
        groups = []
        for site, target in self.target.items():
            if site not in patterns:
                raise SpikelmError(f"target names the site {site!r}; the student's recipe has {', '.join(patterns)}")
            banks = {
                owner: weights[name]
                for name, owner in sites.items()
                if any(fnmatchcase(name, pattern) for pattern in patterns[site])
            }
            groups.append((banks, target))
        return groups

    def _rate(
        self, banks: Mapping[SpikingLinear, int], inputs: Mapping[SpikingLinear, Tensor], mask: Tensor | None
    ) -> Tensor:
        measured = []
        for owner in banks:
            if owner not in inputs:
                raise SpikelmError(f"no input reached the projection {owner}: its neurons' rate is not known")
            neuron, x = owner.neuron, inputs[owner]
            counts = neuron.fires(x) if self.measure == "union" else neuron.spike_count(x)
            measured.append(_mean_over_tokens(counts, mask))
        return _weighted_mean(measured, list(banks.values()))

    def _count(self, batch: Batch) -> Tensor:
        count: Callable[[Batch], Tensor] | None = getattr(self.objective, "count_items", None)
        return batch_mask(batch).sum() if count is None else count(batch)


def weights_behind(model: nn.Module) -> dict[str, int]:
    """The number of weights that read each bank of neurons, named as in `spikelm.convert.spike_sites`."""
    from spikelm.convert import projections_of, spike_sites

    return {
        name: sum(layer.in_features * layer.out_features for layer in projections_of(model, owner))
        for name, owner in spike_sites(model).items()
    }


def _weighted_mean(values: Iterable[Tensor], weights: list[int]) -> Tensor:
    total = torch.stack([weight * value for value, weight in zip(values, weights, strict=True)]).sum()
    return total / sum(weights)


def _real_tokens(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).sum() if mask is None else (mask != 0).sum()


def _mean_over_tokens(counts: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of counts [B, L, C] over channels and the tokens that mask [B, L] calls real, in float32."""
    if mask is None:
        return counts.mean(dtype=torch.float32)
    real = mask.to(counts.device, torch.float32)
    per_token = counts.mean(-1, dtype=torch.float32)
    return (per_token * real).sum() / real.sum().clamp_min(1)


@contextmanager
def _recorded_inputs(owners: Iterator[SpikingLinear]) -> Iterator[dict[SpikingLinear, Tensor]]:
    """What reaches each projection in the context, with its graph."""
    inputs: dict[SpikingLinear, Tensor] = {}
    wanted = torch.is_grad_enabled()

    def record(owner: SpikingLinear, arguments: tuple[Tensor, ...]) -> None:
        if wanted and not torch.is_grad_enabled():
            raise SpikelmError(
                "Activity needs the graph of the forward pass, which reentrant gradient checkpointing does not keep: "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        inputs[owner] = arguments[0]

    handles = [owner.register_forward_pre_hook(record) for owner in owners]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
