"""The inference form of a spiking projection: additions and subtractions of weight rows, no multiplication."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.layers.spiking_linear import SiteNeuron, SpikingLinear
from spikelm.neurons import ATMN, TILIF

# Type of the weights -> the types their sum may run in, the default first. None of them rounds a weight.
ACCUMULATION: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
    **dict.fromkeys((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), (torch.int64,)),
}
ELEMENTS_AT_ONCE = 2**22  # of spike frames, or of gathered integer weights: bounds the memory, changes no result


class TernaryLinear(SpikingLinear):
    r"""y = sum_i W f_i + b over the ternary frames f_i of the neuron's integers, by accumulation alone. No gradient.

    Frame i, from 1 to max |s|, is sign(s) where \|s\| >= i, so the frames sum to s and y = W s + b (SpikingMamba,
    arXiv 2510.04595; for ATMN the count of its frames). Per token, the rows of W^T [in_features, out_features] behind
    its +1 spikes are gathered and summed, those behind its -1 spikes likewise and subtracted. Inputs fire as in
    training: NaN never, infinity at the top level.

    Exact for integer weights, and for floating-point ones as long as no partial sum has to be rounded. Of the row W[o]
    let the largest weight be below 2**high and the smallest non-zero one at least 2**low, with p significant bits (24
    for float32, 11 for float16, 8 for bfloat16). Every partial sum over S = sum \|s\| spikes is then a multiple of
    2**(low - p + 1) and at most S 2**high: float64 with its 53 bits holds all of them, in any order, if

        high - low + log2(S) + p - 1 <= 53.

    For float32 weights and S = 2**13 (2048 inputs at D = 4) that leaves high - low = 17. A row of 2048 weights of
    N(0, 0.02) has about 14; the rare row with a weight much smaller still is rounded in float64's last places.

    Attributes:
        accumulate_dtype: of the sums, see ``ACCUMULATION``; None is float32 for 16-bit weights, int64 for integers,
            else the weights' own.
    """

    accumulate_dtype: torch.dtype | None = None

    @classmethod
    def from_spiking(
        cls,
        layer: SpikingLinear,
        accumulate_dtype: torch.dtype | None = None,
        shares_with: TernaryLinear | None = None,
    ) -> TernaryLinear:
        """The same projection in eval mode, its weight copied row by input channel; bias and neuron are taken over.

        Raises:
            SpikelmError: see :func:`check_weights`, :func:`check_neuron` and :func:`accumulation_type`.
        """
        check_weights(layer)
        check_neuron(layer.neuron)
        accumulation_type(layer.weight.dtype, accumulate_dtype)
        ternary = cls(layer.in_features, layer.out_features, layer.bias is not None, layer.neuron, shares_with)
        # [out, in] as in every state dict, but laid out so that an input channel's weights lie side by side
        rows = layer.weight.detach().t().contiguous()
        ternary.weight = nn.Parameter(rows.t(), requires_grad=False)
        ternary.bias = layer.bias
        ternary.accumulate_dtype = accumulate_dtype
        return ternary.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [*, in_features] -> [*, out_features] in x's type; integer weights give the sums themselves, int64.

        Raises:
            SpikelmError: a gradient is wanted, or ``spiking`` is False.
        """
        self.__dict__["_ran"] = True  # see spikelm.bypass
        if not self.spiking:
            raise SpikelmError("TernaryLinear has no dense form; calibrate or compare before deploy(model)")
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            raise SpikelmError(
                "TernaryLinear has no gradient; call it under torch.no_grad() or torch.inference_mode(), and train "
                "the model before deploy(model)"
            )
        y = self.accumulate(self.encode(x))
        return y.to(x.dtype) if y.is_floating_point() else y

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The neuron's integers for x, int32 [*, in_features]; once for all projections of a bank that get x."""
        owner = self._shares_with[0] if self._shares_with else self
        return owner._encode(x).to(torch.int32)

    @torch.no_grad()
    def accumulate(self, spikes: torch.Tensor) -> torch.Tensor:
        """W s + b for integer spikes [*, in_features], in the accumulation type [*, out_features]."""
        if spikes.is_floating_point() or spikes.is_complex() or spikes.dtype == torch.bool:
            raise SpikelmError(f"accumulate takes integers; got {spikes.dtype}")
        if spikes.dim() == 0 or spikes.shape[-1] != self.in_features:
            raise SpikelmError(f"accumulate takes spikes [*, {self.in_features}]; got shape {tuple(spikes.shape)}")
        dtype = accumulation_type(self.weight.dtype, self.accumulate_dtype)
        rows, flat = self.weight.t(), spikes.flatten(0, -2) if spikes.dim() > 1 else spikes.unsqueeze(0)
        if dtype != rows.dtype:  # convert what some token needs, not the whole matrix
            used = flat.any(0).nonzero().squeeze(1)
            rows, flat = rows.index_select(0, used).to(dtype), flat.index_select(1, used)
        top = max(-int(flat.min()), int(flat.max())) if flat.numel() else 0
        tokens_at_once = max(1, ELEMENTS_AT_ONCE // max(1, top * flat.shape[1]))
        y = torch.cat([_signed_sum(rows, part, top) for part in flat.split(tokens_at_once)])
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.unflatten(0, spikes.shape[:-1]) if spikes.dim() > 1 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Shape, sharing and the type of the sums."""
        return f"{super().extra_repr()}, accumulate_dtype={self.accumulate_dtype}"


def check_weights(layer: SpikingLinear) -> None:
    """Raises SpikelmError for a matrix that is not float."""
    if layer.weights != "float":
        raise SpikelmError(f'the ternary form takes float weights; got {layer.weights} ones, which form="packed" takes')


def check_neuron(neuron: SiteNeuron) -> None:
    """Raises SpikelmError for a neuron whose frames are not plainly summed."""
    if not isinstance(neuron, ATMN | TILIF):
        raise SpikelmError(f"the ternary form takes an ATMN or a TILIF; got a {type(neuron).__name__}")
    if isinstance(neuron, ATMN) and neuron.frame_weight != 1:
        raise SpikelmError(
            f"the ternary form takes an ATMN of frame_weight 1; got {neuron.frame_weight:g}, by which every frame "
            "would have to be multiplied"
        )


def accumulation_type(weights: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The type in which weights of a type are summed; raises SpikelmError where ``chosen`` might round them."""
    accepted = ACCUMULATION.get(weights)
    if accepted is None:
        raise SpikelmError(f"weights must be one of {', '.join(map(str, ACCUMULATION))}; got {weights}")
    if chosen is not None and chosen not in accepted:
        names = " or ".join(map(str, accepted))
        raise SpikelmError(f"accumulate_dtype must be None or {names} for weights of {weights}; got {chosen}")
    return accepted[0] if chosen is None else chosen


def _signed_sum(rows: torch.Tensor, spikes: torch.Tensor, top: int) -> torch.Tensor:
    """sum_i W f_i: rows [in, out] and spikes [tokens, in] within -top..top -> [tokens, out]."""
    level = torch.arange(1, top + 1, device=spikes.device).unsqueeze(1)
    frames = spikes.unsqueeze(1)  # compared with every level: [tokens, top, in]
    return _bag_sum(rows, frames >= level) - _bag_sum(rows, frames <= -level)


def _bag_sum(rows: torch.Tensor, fires: torch.Tensor) -> torch.Tensor:
    """Per token, the sum of the rows [in, out] whose channel fires, fires bool [tokens, frames, in]."""
    token, _, channel = fires.nonzero(as_tuple=True)  # in the order of the tokens
    if rows.is_floating_point():
        count = fires.sum((1, 2))
        return F.embedding_bag(channel, rows, count.cumsum(0) - count, mode="sum")
    total = rows.new_zeros(len(fires), rows.shape[1])  # embedding_bag takes no integers
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, rows.shape[1]))
    for channels, tokens in zip(channel.split(at_once), token.split(at_once), strict=True):
        total.index_add_(0, tokens, rows.index_select(0, channels))
    return total
