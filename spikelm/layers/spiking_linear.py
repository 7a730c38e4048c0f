"""A projection whose input arrives as spikes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spikelm.layers.bit_linear import BitLinear
from spikelm.neurons import ATMN, TILIF
from spikelm.ops.spike_storage import linear

SiteNeuron = ATMN | TILIF
"""A neuron whose ``encode_sum`` a projection accumulates, with a threshold per channel."""


class SpikingLinear(BitLinear):
    """y = W n(x) + b, with n(x) the weighted sum of the frames that ``neuron`` makes of x [*, in_features].

    W may be binary or ternary, see BitLinear; thresholds are then folded into its masters.

    For the weights' gradient the spikes are kept as bits where that takes less (spikelm.ops.spike_storage).

    Several projections of one input share a bank of neurons: the first holds it as its submodule,
    the others refer to it, so a state dict names it once.

    Attributes:
        neuron: the bank, ``in_features`` channels.
        owns_neuron: whether the bank is this projection's submodule.
        spiking: False passes x through: the dense model, as long as no threshold is folded into the weights.
    """

    neuron: SiteNeuron
    _consumers: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        neuron: SiteNeuron,
        shares_with: SpikingLinear | None = None,
        weights: str = "float",
        per_row: bool = False,
    ) -> None:
        # from_linear brings the parameters
        super().__init__(in_features, out_features, bias=bias, weights=weights, per_row=per_row, device="meta")
        self.spiking = True
        self._shares_with = [] if shares_with is None else [shares_with]  # in a list, so that it is no submodule
        if shares_with is None:
            self.neuron = neuron
        else:
            shares_with._consumers += 1
        self._consumers = 1
        self._held: tuple[torch.Tensor, torch.Tensor, tuple[int, ...], int] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        neuron: SiteNeuron,
        shares_with: SpikingLinear | None = None,
        weights: str = "float",
        per_row: bool = False,
    ) -> SpikingLinear:
        """Takes over the parameters of ``linear`` (the same tensors, not copies)."""
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, neuron, shares_with, weights, per_row)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def owns_neuron(self) -> bool:
        """Whether the bank is a submodule of this projection."""
        return not self._shares_with

    def __getattr__(self, name: str) -> Any:
        if name == "neuron" and self._shares_with:
            return self._shares_with[0].neuron
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, in_features] -> [*, out_features]."""
        self.__dict__["_ran"] = True  # see spikelm.bypass; past nn.Module.__setattr__, which is slow
        if not self.spiking:
            return super().forward(x)
        owner = self._shares_with[0] if self._shares_with else self
        return linear(owner._encode(x), self.effective_weight(), self.bias, self.neuron.spike_code)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """The bank's weighted sum for x, computed once where the projections of a bank get the same tensor in turn."""
        if self._consumers == 1 or torch.compiler.is_compiling():
            return self.neuron.encode_sum(x)
        held = self._held  # one read: another thread may replace it
        # versions, because a projection called alone leaves its encoding behind while x or a may change in place
        stamp = (torch.is_grad_enabled(), *(m._version for m in (x, self.neuron.a) if not m.is_inference()))
        if held is not None and held[0] is x and held[2] == stamp:
            self._held = (*held[:3], held[3] - 1) if held[3] > 1 else None
            return held[1]
        encoded = self.neuron.encode_sum(x)
        self._held = (x, encoded, stamp, self._consumers - 1)
        return encoded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}  # a held activation is no part of a copy

    def extra_repr(self) -> str:
        """Shape, and whose neurons it uses."""
        return super().extra_repr() + ("" if self.owns_neuron else ", shares a neuron bank")
