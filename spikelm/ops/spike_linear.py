"""y = W s + b for sparse spikes s: the rows of W^T behind the channels that spike are summed, and no others are read.

    weights = SpikeWeights.of(W, bias)                # W [out, in]; for codes: SpikeWeights itself
    y = spike_linear(spikes, weights)                 # spikes [*, in] -> [*, out]
    y = dense_linear(x, weights)                      # without spikes, x [*, in] any numbers
    gate, up = project(x, encoder, [W_gate, W_up])    # a neuron bank in front: no frame is ever written

Inference alone: none has a gradient. A kernel takes up to MOST_TOKENS tokens, what decoding asks for; more tokens, or
so many active channels that reading all of W is quicker (spikelm.ops.break_even), are a dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from spikelm.cpu import spike_linear as cpu
from spikelm.errors import SpikelmError
from spikelm.ops import multistep, operators
from spikelm.ops.break_even import break_even
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel
from spikelm.ops.weight_quantization import FORMS, LARGEST, dequantize, packed_bytes, unpack_codes

MOST_TOKENS = 4
MOST_STEPS = 64
MOST_PROJECTIONS = cpu.MOST_PROJECTIONS
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class SpikeWeights:
    """The weights of a projection, a row per input channel.

    Args:
        rows: [in, out] floating point, or codes as :func:`spikelm.ops.weight_quantization.pack_codes` packs them.
        form: one of spikelm.ops.weight_quantization.FORMS.
        out_features: of binary and ternary codes, whose rows are padded; else None, the rows' length.
        scale: factors of the outputs, [] or [out], floating point; None with "float".
        bias: [out], floating point, or None. Kernels take scale and bias in float32.
    """

    rows: torch.Tensor
    form: str = "float"
    out_features: int | None = None
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_weights(self)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> SpikeWeights:
        """Of a matrix [out, in], whose transpose is copied unless it lies in memory so."""
        return cls(weight.detach().t().contiguous(), bias=bias)

    @property
    def in_features(self) -> int:
        """Channels."""
        return self.rows.shape[0]

    @property
    def outputs(self) -> int:
        """Length of a result."""
        return self.rows.shape[1] if self.out_features is None else self.out_features

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in]; a view where rows are of that type."""
        if self.form == "float":
            return self.rows.t().to(dtype)
        assert self.scale is not None
        return dequantize(unpack_codes(self.rows, self.outputs, self.form), self.scale, dtype)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A bank of neurons whose weighted sum of frames, sum_t frame_weight**t s_t, a projection takes.

    Args:
        threshold: V, float32 [] or [in].
        unit: what the sums are integer multiples of, at most LARGEST of them; None where they are not.
        gain: the projection takes gain times the sum.
        spiking: False hands x on as it is.
    """

    threshold: torch.Tensor
    dynamics: Dynamics
    T: int = 1
    frame_weight: float = 1.0
    unit: float | None = None
    gain: float = 1.0
    spiking: bool = True


def spike_linear(spikes: torch.Tensor, weights: SpikeWeights, unit: float = 1.0, backend: str = "auto") -> torch.Tensor:
    """W s + b in s's type [*, out], of spikes [*, in] that are integer multiples of ``unit``, at most LARGEST of them.

    Raises:
        SpikelmError: shapes, types or devices that do not fit, or a named backend that cannot run.
    """
    if not unit > 0:
        raise SpikelmError(f"unit must be > 0; got {unit!r}")
    if not operators.is_plain(spikes, None, weights.rows):
        return dense(spikes, weights)
    found = by_kernel(spikes, _identity(float(unit), spikes.device), [weights], backend)
    return dense(spikes, weights) if found is None else found[0]


def dense_linear(x: torch.Tensor, weights: SpikeWeights, backend: str = "auto") -> torch.Tensor:
    """W x + b in x's type [*, out] of any x [*, in]: a kernel reads float and int8 weights as they lie.

    Raises:
        SpikelmError: shapes, types or devices that do not fit, or a named backend that cannot run.
    """
    if weights.form in ("binary", "ternary") or not operators.is_plain(x, None, weights.rows):
        return dense(x, weights)
    found = by_kernel(x, _no_neurons(x.device), [weights], backend)
    return dense(x, weights) if found is None else found[0]


def project(
    x: torch.Tensor, encoder: Encoder, weights: Sequence[SpikeWeights], backend: str = "auto"
) -> list[torch.Tensor]:
    """W n(x) + b [*, out] in x's type for every projection behind a bank n of neurons, x [*, in].

    Raises:
        SpikelmError: shapes, types or devices that do not fit, or a named backend that cannot run.
    """
    found = by_kernel(x, encoder, weights, backend)
    if found is not None:
        return found
    threshold, dynamics = encoder.threshold, encoder.dynamics
    spikes = multistep.encode_sum(x, threshold, dynamics, encoder.T, encoder.frame_weight, backend=backend)
    return [dense(spikes * encoder.gain if encoder.gain != 1 else spikes, one) for one in weights]


def by_kernel(
    x: torch.Tensor, encoder: Encoder, weights: Sequence[SpikeWeights], backend: str = "auto"
) -> list[torch.Tensor] | None:
    """:func:`project` where a kernel does it, and None where the product is better a dense one, or has to be."""
    _check(x, encoder, weights)
    if torch.is_grad_enabled() and x.requires_grad:
        raise SpikelmError("spike_linear has no gradient; call it under torch.no_grad() or torch.inference_mode()")
    tokens = x.numel() // max(x.shape[-1], 1)
    if not 0 < tokens <= MOST_TOKENS or not operators.is_plain(x, None, encoder.threshold):
        return None
    kernel = encoder.dynamics.kernel
    name = multistep.choose(x, backend, lambda natural: refused(natural, kernel, encoder, weights, x.dtype))
    if name is None or isinstance(kernel, str) or torch.is_autocast_enabled(x.device.type):
        return None
    most = _most_active(weights[0], tokens, name)
    y = [x.new_empty((*x.shape[:-1], one.outputs)) for one in weights]
    return y if _launch_on(name)(kernel, encoder, x.contiguous(), weights, y, most) <= most else None


def _most_active(weights: SpikeWeights, tokens: int, backend: str) -> int:
    """More active channels are left to a dense product, for which codes would have to be unpacked."""
    if backend != "cpu" or weights.form in ("binary", "ternary"):
        return weights.in_features
    return int(break_even(weights.rows.dtype, tokens) * weights.in_features)


def _launch_on(backend: str) -> Callable[..., int]:
    if backend == "cpu":
        return cpu.project
    from spikelm.cuda import spike_linear as cuda  # which launches through CuPy

    return cuda.project


@lru_cache(maxsize=64)
def _identity(unit: float, device: torch.device) -> Encoder:
    """Neurons that fire s / unit at an input s."""
    threshold = torch.tensor(unit, dtype=torch.float32, device=device)
    return Encoder(threshold, Dynamics("integer", levels=LARGEST), unit=1.0, gain=unit)


@cache
def _no_neurons(device: torch.device) -> Encoder:
    return replace(_identity(1.0, device), spiking=False)


def dense(spikes: torch.Tensor, weights: SpikeWeights) -> torch.Tensor:
    """W s + b as a dense product, in s's type."""
    bias = weights.bias
    if weights.form == "int8" and weights.scale is not None:  # as the kernel does, whose scale 16 bit do not round
        y = F.linear(spikes, unpack_codes(weights.rows, weights.outputs, "int8").to(spikes.dtype))
        return (y * weights.scale if bias is None else y * weights.scale + bias).to(spikes.dtype)
    return F.linear(spikes, weights.matrix(spikes.dtype), None if bias is None else bias.to(spikes.dtype))


def refused(
    backend: str, kernel: Kernel | str, encoder: Encoder, weights: Sequence[SpikeWeights], io: torch.dtype
) -> str | None:
    """Why a kernel cannot run; builds it if need be."""
    if isinstance(kernel, str):
        return kernel
    first = weights[0]
    if any((one.form, one.rows.dtype) != (first.form, first.rows.dtype) for one in weights):
        return "no kernel for projections of several forms in one call"
    if encoder.T > MOST_STEPS or len(weights) > MOST_PROJECTIONS:
        most = f"{MOST_STEPS} and {MOST_PROJECTIONS}"
        return f"no kernel for {encoder.T} steps and {len(weights)} projections; {most} are accepted"
    more = [encoder.threshold, *(t for one in weights for t in (one.scale, one.bias) if t is not None)]
    if other := next((tensor.dtype for tensor in more if tensor.dtype != torch.float32), None):
        return f"no kernel for thresholds, scales or a bias of {other}"
    if not all(tensor.is_contiguous() for tensor in more):
        return "no kernel for thresholds, scales or a bias with gaps in memory"
    if first.form in ("binary", "ternary") and not _counts(encoder):
        return "no kernel for packed weights behind spikes that are no integer multiples"
    return _built(backend, kernel.definitions, encoder.spiking, io, first.rows.dtype, first.form)


def _counts(encoder: Encoder) -> bool:
    """Whether sums of frames are integers that codes can be counted for."""
    if encoder.unit is None or not encoder.spiking:
        return False
    highest = encoder.dynamics.levels * sum(encoder.frame_weight**t for t in range(encoder.T))
    return highest / encoder.unit <= LARGEST


@cache
def _built(
    backend: str, definitions: str, spiking: bool, io: torch.dtype, weights: torch.dtype, form: str
) -> str | None:
    if io not in _DTYPES:
        return f"no kernel for {io}"
    if weights not in (*_DTYPES, torch.int8, torch.uint8):
        return f"no kernel for weights of {weights}"
    try:
        if backend == "cpu":
            cpu.build(definitions, spiking, io, weights, form)
        elif (reason := multistep.unavailable(backend)) is not None:
            return reason
        else:
            _build_on_gpu(definitions, spiking, io, weights, form)
    except SpikelmError as error:
        return str(error)
    return None


def _build_on_gpu(definitions: str, spiking: bool, io: torch.dtype, weights: torch.dtype, form: str) -> None:
    from spikelm.cuda import spike_linear as cuda

    cuda.build(definitions, spiking, io, weights, form)


def _check(x: torch.Tensor, encoder: Encoder, weights: Sequence[SpikeWeights]) -> None:
    """A kernel takes all this on trust."""
    if not x.is_floating_point() or x.dim() == 0:
        raise SpikelmError(f"x must be floating point [*, in]; got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[-1]
    if not weights:
        raise SpikelmError("project takes the weights of one projection at least; got none")
    for one in weights:
        if one.in_features != channels or one.rows.device != x.device:
            raise SpikelmError(
                f"x [*, {channels}] on {x.device} takes weights of {channels} channels there; got {one.in_features} on "
                f"{one.rows.device}"
            )
    if encoder.threshold.shape not in (torch.Size(), (channels,)) or encoder.threshold.device != x.device:
        raise SpikelmError(
            f"threshold must be [] or [{channels}] on {x.device}; got {tuple(encoder.threshold.shape)} on "
            f"{encoder.threshold.device}"
        )


def _check_weights(weights: SpikeWeights) -> None:
    rows, form, scale, bias = weights.rows, weights.form, weights.scale, weights.bias
    if form not in FORMS:
        raise SpikelmError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    packed = form in ("binary", "ternary")
    fits = rows.is_floating_point() if form == "float" else rows.dtype == (torch.uint8 if packed else torch.int8)
    if rows.dim() != 2 or not fits or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise SpikelmError(f"rows {rows.dtype} {tuple(rows.shape)} are no dense rows of the form {form!r}")
    if packed != (weights.out_features is not None):
        raise SpikelmError(f"out_features belongs to packed rows; got {weights.out_features} with form {form!r}")
    out = weights.outputs
    if packed and rows.shape[1] != packed_bytes(out, form):
        raise SpikelmError(f"{out} {form} outputs are packed in {packed_bytes(out, form)} bytes; got {rows.shape[1]}")
    if (scale is None) != (form == "float"):
        raise SpikelmError(f"scale belongs to every form but float; got {scale} with form {form!r}")
    for name, tensor, shapes in (("scale", scale, ((), (out,))), ("bias", bias, ((out,),))):
        if tensor is not None and (tuple(tensor.shape) not in shapes or tensor.device != rows.device):
            raise SpikelmError(
                f"{name} of {out} outputs on {rows.device}; got {tuple(tensor.shape)} on {tensor.device}"
            )
