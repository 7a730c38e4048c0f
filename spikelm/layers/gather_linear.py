"""The form of a spiking projection for decoding: only the weights behind active channels are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.layers.spiking_linear import SpikingLinear
from spikelm.ops import operators
from spikelm.ops.spike_linear import Encoder, SpikeWeights, by_kernel, dense


class GatherLinear(SpikingLinear):
    """y = W n(x) + b over the channels that fire in any frame, whose weights lie side by side. No gradient.

    With up to four tokens, as in decoding, a fused kernel finds the active channels and sums their rows of W^T
    (spikelm.ops.spike_linear); the spikes are never written. More tokens are a dense product over the spikes.

    Float weights stay the parameter ``weight`` [out, in], laid out row by input channel; others are packed, see
    :class:`~spikelm.layers.BitLinear`.
    """

    @classmethod
    def from_spiking(cls, layer: SpikingLinear, shares_with: GatherLinear | None = None) -> GatherLinear:
        """The same projection in eval mode; bias, neuron and packed weights are taken over, not copied."""
        bias = layer.bias is not None
        gather = cls(
            layer.in_features, layer.out_features, bias, layer.neuron, shares_with, layer.weights, layer.per_row
        )
        gather.bias = layer.bias
        if layer.weights == "float":
            gather.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
            return gather.eval().requires_grad_(False)
        if not layer.packed:
            layer.pack()
        del gather.weight
        gather._packed_dtype = layer._packed_dtype
        for name in ("packed_weight", "weight_scale"):
            gather.register_buffer(name, getattr(layer, name))
        return gather.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, in_features] -> [*, out_features] in x's type.

        Raises:
            SpikelmError: a gradient is wanted.
        """
        self.__dict__["_ran"] = True  # see spikelm.bypass
        if torch.is_grad_enabled() and x.requires_grad:
            raise SpikelmError(
                "GatherLinear has no gradient; call it under torch.no_grad() or torch.inference_mode(), and train the "
                "model before deploy(model)"
            )
        if not operators.is_plain(x, None, x):
            return dense(self._values(x), self.spike_weights())
        encoder, weights = self.prepared(x)
        # The neuron's own kernel is what a named backend must have; this one may be missing.
        backend = "torch" if self.neuron.backend == "torch" else "auto"
        found = by_kernel(x, encoder, [weights], backend)
        return dense(self._values(x), weights) if found is None else found[0]

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        owner = self._shares_with[0] if self._shares_with else self
        return owner._encode(x) if self.spiking else x

    def prepared(self, x: torch.Tensor) -> tuple[Encoder, SpikeWeights]:
        """The bank, for an input like x, and the weights as a kernel reads them: made anew where something changed.

        What inference mode made keeps no count of its changes, so it is read anew every time.
        """
        dynamics = self.neuron._current_dynamics()
        stamp = (*stamp_of(self), x.dtype, x.dim())
        held = self.__dict__.get("_prepared")
        if held is None or held[0] != stamp or held[1] is not dynamics:  # which is new where a setting is
            encoder = replace(self.neuron.encoder(x), spiking=self.spiking)
            held = self.__dict__["_prepared"] = (stamp, dynamics, encoder, self.spike_weights())
        return held[2], held[3]

    def spike_weights(self) -> SpikeWeights:
        """The weights as a kernel reads them: views of this layer's, laid out first if need be."""
        if self.packed:
            return super().spike_weights()
        if not self.weight.t().is_contiguous():  # a loader has put in a parameter of its own
            self.weight = nn.Parameter(self.weight.detach().t().contiguous().t(), requires_grad=False)
        return SpikeWeights(self.weight.detach().t(), bias=self._kernel_bias())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_prepared": None}


def stamp_of(layer: GatherLinear) -> tuple[object, ...]:
    """Differs from an earlier one where a tensor of the layer, or what it does with its neurons, has changed."""
    tensors = (
        (layer.packed_weight, layer.weight_scale, layer.bias, layer.neuron.a)
        if layer.packed
        else (layer.weight, layer.bias, layer.neuron.a)
    )
    return (layer.spiking, *(version_of(tensor) for tensor in tensors))


def version_of(tensor: torch.Tensor | None) -> object:
    """Differs from an earlier one where the tensor is another or was changed in place; always in inference mode's."""
    if tensor is None:
        return None
    return object() if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
