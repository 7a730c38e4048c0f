"""The integrate-and-fire population of a network at equilibrium: spikes over T steps, or the rate they settle at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from spikelm.errors import SpikelmError
from spikelm.neurons import BinaryIF
from spikelm.ops.multistep import multi_step

Value = TypeVar("Value")


class EquilibriumIF(BinaryIF):
    """IF with soft reset whose average spiking rate over T steps tends to clamp(mean current / V, 0, 1).

    For a constant current the rate is off by less than 1/T from u(0) = 0, and by at most 1/(2T) from u(0) = V/2.
    (SpikingBERT, arXiv 2308.10873; 1/1.58-bit spiking LM, arXiv 2405.02543.) Membranes are passed in and out: nothing
    is kept between calls.

    Args:
        v_threshold: V > 0.
        initial_membrane: u(0) / V in [0, 1); 0 is the papers', 0.5 rounds instead of truncating. [ours]
        backend: see :class:`~spikelm.neurons.base.DynamicsNode`.
    """

    def __init__(self, v_threshold: float = 1.0, initial_membrane: float = 0.0, backend: str = "auto") -> None:
        if isinstance(initial_membrane, bool) or not 0 <= initial_membrane < 1:
            raise SpikelmError(f"initial_membrane must be within [0, 1), a share of V; got {initial_membrane!r}")
        super().__init__(v_threshold=v_threshold, step_mode="m", backend=backend)
        self.initial_membrane = float(initial_membrane)

    def steps(
        self, current_seq: torch.Tensor, v: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Spikes [T, *] of currents [T, *] from membrane v [*] (None: u(0)), and the membrane after them.

        scale: g > 0 where currents and v are in units of g ([] or one for each of the last axis): V / g is the
        threshold.
        """
        V = self._threshold(current_seq, current_seq.dim() - 1)
        if scale is not None:
            V = V / scale.to(V.dtype)
        if v is None:
            v = (self.initial_membrane * V).expand(current_seq.shape[1:]).contiguous()
        spikes, last = multi_step(current_seq, v, V, self._current_dynamics(), backend=self.backend)
        assert last is not None
        return spikes, last

    def rate(self, current: torch.Tensor) -> torch.Tensor:
        """clamp(current / V, 0, 1), the rate at equilibrium; differentiable."""
        return (current / self._v_threshold).clamp(0, 1)

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return f"initial_membrane={self.initial_membrane:g}, {super().extra_repr()}"


def by_layer(values: Mapping[str, Value]) -> dict[str, list[Value]]:
    """Population -> value, gathered by the layer in the population's name; what is in no layer is "input"."""
    layers: dict[str, list[Value]] = {}
    for population, value in values.items():
        layers.setdefault(population.rpartition(".")[0] or "input", []).append(value)
    return layers
