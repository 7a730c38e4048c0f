"""A projection whose matrix has 1, 1.58 or 8 bit a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.ops.spike_linear import SpikeWeights, dense_linear
from spikelm.ops.weight_quantization import FORMS, dequantize, is_whole, pack_codes, quantize, unpack_codes


class BitLinear(nn.Linear):
    """y = scale codes x + b, the codes in {-1, 1} (binary) or {-1, 0, 1} (ternary) of float masters (BitNet), or int8.

    The masters are the parameter ``weight``; the gradient passes the quantiser as it is (straight-through).
    :meth:`pack` leaves the codes alone, 1, 2 or 8 bit each, and the scale: the form for inference.

    Args:
        weights: "binary", "ternary" or "int8", see :func:`spikelm.ops.weight_quantization.quantize`, or "float":
            nn.Linear.
        per_row: a scale (and a binary mean) per output instead of one of the matrix [ours]; nothing for "float".

    Attributes:
        packed_weight: uint8 [in_features, bytes] (int8 [in_features, out_features]) of a packed layer, laid out as
            :func:`spikelm.ops.weight_quantization.pack_codes` says.
        weight_scale: float32 (float64 of float64 masters), [] or [out_features], of a packed layer; no change of the
            layer's dtype rounds it.
        weight: of a packed layer the dequantised matrix, made anew at every reading.
    """

    packed_weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weights: str = "ternary",
        per_row: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if weights not in FORMS:
            raise SpikelmError(f"weights must be one of {', '.join(FORMS)}; got {weights!r}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weights, self.per_row = weights, per_row

    @property
    def packed(self) -> bool:
        """Whether the masters are gone."""
        return "packed_weight" in self.__dict__["_buffers"]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "packed_weight" in self.__dict__.get("_buffers", ()):
            return self.effective_weight()
        return super().__getattr__(name)

    def effective_weight(self) -> torch.Tensor:
        """scale * codes [out, in] in the masters' dtype, the gradient of the masters that of the result."""
        if self.weights == "float":
            return self.weight
        value = dequantize(*self._codes_and_scale(), self._weight_dtype())
        # W - W is 0 and has W's gradient; the common W + (value - W) would round the value
        return value + self._zero() if self._learns() else value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, in_features] -> [*, out_features]."""
        if self.packed and self.weights == "int8":
            return dense_linear(x, self.spike_weights())
        return F.linear(x, self.effective_weight(), self.bias)

    def spike_weights(self) -> SpikeWeights:
        """A packed layer's weights as a kernel reads them: views of its own."""
        out = None if self.weights == "int8" else self.out_features
        return SpikeWeights(self.packed_weight, self.weights, out, self.weight_scale, self._kernel_bias())

    def _kernel_bias(self) -> torch.Tensor | None:
        """In float32, which kernels take, unless it is wider."""
        if self.bias is None or self.bias.dtype == torch.float64:
            return None if self.bias is None else self.bias.detach()
        return self.bias.detach().float()

    def unscaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes x + b / g [*, out_features], g [] or [out_features]): the forward's current in units of the scale g.

        A neuron that fires at V on the forward's current fires at V / g on this one. g has weight_scale's type and the
        value that the layer computes with; it is 1 for float weights, and where all weights are 0.
        """
        if self.weights == "float":
            return self.forward(x), torch.ones((), dtype=self.weight.dtype, device=self.weight.device)
        codes, scale = self._codes_and_scale()
        dtype = self._weight_dtype()
        g = scale.to(dtype)
        value = dequantize(codes, torch.where(g == 0, 0.0, g / g), dtype)  # 1, or NaN where the scale is not finite
        g = torch.where(g == 0, 1.0, g)
        if self._learns():
            value = value + self._zero() / (g.unsqueeze(1) if g.dim() else g)
        return F.linear(x, value, None if self.bias is None else self.bias / g), g.to(scale.dtype)

    @torch.no_grad()
    def pack(self) -> None:
        """Replaces, in place, the masters by ``packed_weight`` and ``weight_scale``: eval mode, no gradient.

        There is no way back. The forward then gives bit for bit what it gave. Works on meta tensors too, for a loader
        to fill.

        Raises:
            SpikelmError: the weights are float, or packed already.
        """
        if self.packed:
            raise SpikelmError("the layer is packed already")
        if self.weights == "float":
            raise SpikelmError("pack takes binary or ternary weights; this layer's are float")
        codes, scale = self._codes_and_scale()
        self._packed_dtype = self.weight.dtype
        del self.weight
        self.register_buffer("packed_weight", pack_codes(codes, self.weights))
        self.register_buffer("weight_scale", scale)
        self.eval().requires_grad_(False)

    def check_packed(self) -> None:
        """Raises SpikelmError for packed bytes that are no codes, as of a damaged file."""
        if self.packed and not is_whole(self.packed_weight, self.weights):
            raise SpikelmError(
                f"packed_weight {tuple(self.packed_weight.shape)} holds bits that are no {self.weights} code"
            )

    def _codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.packed:
            return unpack_codes(self.packed_weight, self.out_features, self.weights), self.weight_scale
        return quantize(self.weight, self.weights, self.per_row)

    def _weight_dtype(self) -> torch.dtype:
        return self._packed_dtype if self.packed else self.weight.dtype

    def _learns(self) -> bool:
        """Whether a gradient may be wanted; not weight.requires_grad, which forward-mode derivatives do without."""
        return torch.is_grad_enabled() and not self.packed

    def _zero(self) -> torch.Tensor:
        """0 [out, in], with the masters' gradient; NaN where a master is not finite."""
        return self.weight - self.weight.detach()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Of a packed layer, a change of dtype is the dequantised matrix's, not the scale's."""
        scale = self._buffers.get("weight_scale")
        super()._apply(fn, recurse)
        if scale is not None:
            self._packed_dtype = fn(torch.empty(0, dtype=self._packed_dtype, device=scale.device)).dtype
            if self.weight_scale.dtype != scale.dtype:
                self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        """Shape, and the form of the weights where they are not float."""
        form = "" if self.weights == "float" else f", weights={self.weights}"
        return super().extra_repr() + form + (", per_row" if form and self.per_row else "") + (", packed" * self.packed)


def check_packed(model: nn.Module) -> None:
    """Raises SpikelmError, naming the layer, where a model's packed bytes are no codes."""
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            try:
                layer.check_packed()
            except SpikelmError as error:
                raise SpikelmError(f"the checkpoint is damaged: {name}: {error}") from error
