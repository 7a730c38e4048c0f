"""Banks of neurons: what a call of one counts, emits and keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

from spikelm.energy.spikes import Spikes
from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, DynamicsNode

_SNNTORCH_STATES = ("mem", "syn", "syn_exc", "syn_inh")
# Of SpikingJelly's neurons these alone keep their membrane whole; the last two are new in 2.0.
_WITHOUT_LEAK = tuple(
    getattr(neuron, name) for name in ("IFNode", "HalfThresholdIFNode", "TernaryIFNode") if hasattr(neuron, name)
)


@dataclass
class Population:
    """A bank of neurons: updates are elements times frames or steps, ``leaks`` those that multiply the
    membrane, ``kept`` the membranes that a call leaves for the next one, ``runs`` the [calls, time steps] between
    resets."""

    calls: int = 0
    updates: int = 0
    leaks: int = 0
    spikes: float | None = 0.0
    kept: int = 0
    runs: list[list[int]] = field(default_factory=lambda: [[0, 0]])

    def stepped(self, steps: int) -> None:
        """A call of so many time steps goes on from the one before."""
        self.calls += 1
        self.runs[-1][0] += 1
        self.runs[-1][1] += steps

    def rested(self) -> None:
        """The next call starts anew."""
        if self.runs[-1][0]:
            self.runs.append([0, 0])


def repeats_of(populations: Iterable[Population], time_steps: int | None) -> int:
    """How many calls make one pass: those of the neurons of a network that runs step by step, from rest to rest.

    Raises:
        SpikelmError: no neuron ran the ``time_steps`` that were given.
    """
    runs = [(calls, steps) for one in populations for calls, steps in one.runs if steps]
    if time_steps is None:
        alike = len({steps for _, steps in runs}) == 1 or len({calls for calls, _ in runs}) == 1
        return max(calls for calls, _ in runs) if alike else 1
    found = [
        calls * time_steps // steps
        for calls, steps in runs
        if steps % time_steps == 0 and calls * time_steps % steps == 0
    ]
    if runs and not found:
        ran = ", ".join(str(steps) for steps in sorted({steps for _, steps in runs}))
        raise SpikelmError(f"time_steps must be how many steps the neurons run, {ran} here; got {time_steps}")
    return max(found, default=time_steps)


def restarts_of(populations: Iterable[Population]) -> int:
    """How often the neurons ran from rest to rest; 1 where they differ."""
    found = {sum(steps > 0 for _, steps in one.runs) for one in populations if one.calls}
    return found.pop() if len(found) == 1 else 1


def is_neuron(module: nn.Module) -> bool:
    """SpikingJelly's nodes, which ours are too, and snnTorch's where that is loaded."""
    snntorch = sys.modules.get("snntorch")
    return isinstance(module, BaseNode) or (snntorch is not None and isinstance(module, snntorch.SpikingNeuron))


def states_of(module: nn.Module) -> list[torch.Tensor]:
    """What a neuron keeps from call to call, such as its membrane: real numbers, and activations."""
    if isinstance(module, BaseNode):
        kept = list(module._memories.values())
    else:
        kept = [getattr(module, name, None) for name in _SNNTORCH_STATES]
    return [value for value in kept if isinstance(value, torch.Tensor)]


def leaks(module: nn.Module) -> bool:
    """Whether a step multiplies the membrane."""
    if isinstance(module, DynamicsNode):
        return module.dynamics.decay != 1
    if isinstance(module, BaseNode):
        return not isinstance(module, _WITHOUT_LEAK)
    beta = getattr(module, "beta", 1.0)
    return bool((torch.as_tensor(beta) != 1).any())


def emitted_spikes(module: Any, method: str, x: torch.Tensor, emitted: torch.Tensor) -> Spikes | None:
    """What a neuron has emitted; None where that is no spikes, as with a surrogate in their place."""
    if method == "encode_sum":
        count = None if x.is_meta else module.spike_count(x).abs().float()
        if isinstance(module, TILIF):
            return Spikes(count, module.D, 2 * module.D, True)
        code, frames, signed = module.spike_code, module.T, module.dynamics.fire != "binary"
        span = (3**frames if signed else 2**frames) - 1 if code is None else code.largest * (1 + code.signed)
        weighted = isinstance(module, ATMN) and module.frame_weight != 1 and module.T > 1
        return Spikes(count, frames, span, signed, weighted)
    if isinstance(module, DynamicsNode):
        dynamics = module.dynamics
        several = dynamics.fire == "integer" and method != "encode"
        levels = dynamics.levels if several else 1
        signed = dynamics.fire != "binary"
        span = levels * (2 if signed else 1)
        return Spikes(None if emitted.is_meta else emitted.abs().float(), levels, span, signed)
    if emitted.is_meta:
        return Spikes(None)
    values = emitted.detach().float()
    if not values.numel() or not bool((values == values.round()).all()):
        return None
    lowest, highest = int(values.min()), int(values.max())
    levels = max(1, highest, -lowest)
    return Spikes(values.abs(), levels, levels * (2 if lowest < 0 else 1), lowest < 0)
