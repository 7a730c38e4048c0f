"""How a pass through the layers reads their IF populations: as rates, as rates that were measured, or as spikes."""

from __future__ import annotations

import torch
from torch import nn

from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.equilibrium_if import EquilibriumIF


class Rates:
    """The rate network F: clamp(current / V, 0, 1) in place of every population; currents [B, L, C]."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def __call__(self, population: EquilibriumIF, current: torch.Tensor) -> torch.Tensor:
        """What the population passes on for its current."""
        return population.rate(current)

    def behind(self, projection: BitLinear, population: EquilibriumIF, x: torch.Tensor) -> torch.Tensor:
        """What a population passes on that nothing separates from the projection of x."""
        return self(population, projection(x))

    def between_layers(self, x: torch.Tensor) -> torch.Tensor:
        """What one layer hands to the next, with dropout where there is any."""
        return nn.functional.dropout(x, self.dropout) if self.dropout else x


class MeasuredRates(Rates):
    """out = F + (asr - F).detach(): the average spiking rates as values, the rate network's gradient at them.

    Args:
        measured: population -> average spiking rates [B, L, C].
        real: bool [B, L], the tokens that are no padding.

    Attributes:
        gaps: population -> mean |asr - F| over real tokens and channels, F at the measured rates of its inputs.
    """

    def __init__(self, measured: dict[EquilibriumIF, torch.Tensor], real: torch.Tensor) -> None:
        super().__init__()
        self.measured, self.gaps, self._real = measured, dict[EquilibriumIF, torch.Tensor](), real

    def __call__(self, population: EquilibriumIF, current: torch.Tensor) -> torch.Tensor:
        """The measured rates of the population."""
        rate, measured = population.rate(current), self.measured[population]
        self.gaps[population] = real_mean((measured - rate.detach()).abs(), self._real)
        return measured + (rate - rate.detach())  # adds a zero: exactly the measured value


class Spikes(Rates):
    """Integrate and fire, T steps at a time: currents [T, B, L, C] to spikes, membranes carried from call to call.

    Args:
        fold_scale: of quantised projections that a population follows, divide V instead of multiplying the current.

    Attributes:
        counts: population -> spikes so far [B, L, C].
    """

    def __init__(self, fold_scale: bool) -> None:
        super().__init__()
        self.fold_scale = fold_scale
        self.counts: dict[EquilibriumIF, torch.Tensor] = {}
        self._membranes: dict[EquilibriumIF, torch.Tensor] = {}

    def __call__(
        self, population: EquilibriumIF, current: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The spikes, for currents in units of ``scale``."""
        spikes, last = population.steps(current, self._membranes.get(population), scale)
        self._membranes[population] = last
        count = spikes.sum(0, dtype=last.dtype)
        self.counts[population] = self.counts[population] + count if population in self.counts else count
        return spikes

    def behind(self, projection: BitLinear, population: EquilibriumIF, x: torch.Tensor) -> torch.Tensor:
        """The spikes behind a projection, whose scale goes into the threshold where that is asked for."""
        if projection.weights == "float" or not self.fold_scale:
            return self(population, projection(x))
        current, scale = projection.unscaled(x)
        return self(population, current, scale)


def real_mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, L, C] over real tokens [B, L] and channels; 0 without any token."""
    return torch.where(real[..., None], values, 0).sum() / (real.sum() * values.shape[-1]).clamp(min=1)
