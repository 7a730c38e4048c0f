"""Chooses the thresholds of a freshly spikified model from real activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikelm.convert import fold_threshold, recipe_of, remember, spike_sites
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode
from spikelm.layers.spiking_linear import SiteNeuron, SpikingLinear

CANDIDATES = torch.logspace(-1.1, 0.7, 28, base=10.0)  # thresholds tried, in root mean squares of the channel


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within it the neurons of ``model`` pass their input through: the dense model, before thresholds are folded."""
    layers = [m for m in model.modules() if isinstance(m, SpikingLinear)]
    before = [layer.spiking for layer in layers]
    for layer in layers:
        layer.spiking = False
    try:
        yield
    finally:
        for layer, spiking in zip(layers, before, strict=True):
            layer.spiking = spiking


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokens_per_site: int = 4096,
    max_sum_of_rates: float | None = None,
) -> None:
    """Per channel, chooses the V that minimises E (x - V encode_sum(x / V))^2 and folds it into the weights [ours].

    x are the inputs the projections see in the dense model on ``batches`` (mappings of the model's forward arguments),
    padding left out; the first ``tokens_per_site`` tokens are kept. Call once, on a model fresh from
    :func:`spikelm.spikify`. Binary and ternary weights stay so in that dense model; V is folded into their masters.

    Args:
        max_sum_of_rates: only thresholds at which a channel's mean of sum_t |s_t| is no larger, > 0. None: any.

    Raises:
        SpikelmError: the model has no spiking projection, is calibrated already, or ``batches`` holds no token.
    """
    if max_sum_of_rates is not None and not max_sum_of_rates > 0:
        raise SpikelmError(f"max_sum_of_rates must be > 0 or None; got {max_sum_of_rates!r}")
    recipe = recipe_of(model)
    if recipe is None or recipe.calibrated or recipe.deployed:
        state = "is not spiking: call spikify first" if recipe is None else "is calibrated or deployed already"
        raise SpikelmError(f"calibrate takes a freshly spikified model; this one {state}")
    inputs = _record_inputs(model, batches, tokens_per_site)
    with evaluation_mode(model):  # a training-only path of the neuron is no part of its code
        for name, owner in spike_sites(model).items():
            fold_threshold(model, owner, best_threshold(owner.neuron, inputs[name], max_sum_of_rates))
    remember(model, replace(recipe, calibrated=True))


def best_threshold(neuron: SiteNeuron, x: torch.Tensor, max_sum_of_rates: float | None = None) -> torch.Tensor:
    """V [channels] among CANDIDATES * rms(x) that codes x [tokens, channels] with the least squared error.

    Candidates at which a channel spikes more than ``max_sum_of_rates`` are left out; the largest never is. Leaves the
    neuron's own threshold at the last candidate.
    """
    x = x.float()
    scale = x.square().mean(0).sqrt()
    scale = scale.clamp_min(1e-3 * float(scale.square().mean().sqrt()) + 1e-12)
    best_error = torch.full_like(scale, float("inf"))
    best = CANDIDATES[-1].item() * scale
    for candidate in CANDIDATES.tolist():
        V = candidate * scale
        neuron.v_threshold = V
        error = (x - V * neuron.encode_sum(x)).square().mean(0)
        better = error < best_error
        if max_sum_of_rates is not None:
            better &= neuron.encode(x).abs().sum(0).mean(0) <= max_sum_of_rates
        best, best_error = torch.where(better, V, best), torch.where(better, error, best_error)
    return best


def _record_inputs(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], tokens_per_site: int
) -> dict[str, torch.Tensor]:
    recorded: dict[str, list[torch.Tensor]] = {name: [] for name in spike_sites(model)}
    keep: list[torch.Tensor | None] = [None]

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].detach()
            recorded[name].append(x.flatten(0, -2) if keep[0] is None else x[keep[0]])

        return hook

    handles = [owner.register_forward_pre_hook(record(name)) for name, owner in spike_sites(model).items()]
    tokens = 0
    try:
        with evaluation_mode(model), dense(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                keep[0] = None if mask is None else mask.bool()
                model(**batch)
                tokens = sum(len(part) for part in next(iter(recorded.values())))
                if tokens >= tokens_per_site:
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise SpikelmError("calibrate needs at least one token; batches held none")
    return {name: torch.cat(parts)[:tokens_per_site] for name, parts in recorded.items()}
