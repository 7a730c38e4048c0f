"""Runs the CPU kernels of projections behind neurons."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from spikelm.cpu import module
from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel

if TYPE_CHECKING:
    from spikelm.ops.spike_linear import Encoder, SpikeWeights

_FILE = "spike_linear.cpp"
# struct Call and struct Projection of cuda/projection.cuh.
_CALL, _PROJECTION = struct.Struct("=4Q7q6d"), struct.Struct("=4Q3q")
MOST_PROJECTIONS = 4


@cache
def definitions(kernel: str, spiking: bool, weights: torch.dtype, form: str) -> str:
    """What cuda/projection.cuh asks for besides the types; ``kernel`` is :attr:`Kernel.definitions`."""
    bits = {"binary": 1, "ternary": 2}.get(form, 0)
    stored = "unsigned char" if bits else module.STORAGE[weights]
    return f"{kernel}#define WEIGHT_T {stored}\n#define CODE_BITS {bits}\n#define SPIKING {int(spiking)}\n"


def pack(
    kernel: Kernel,
    encoder: Encoder,
    x: torch.Tensor,
    weights: Sequence[SpikeWeights],
    y: Sequence[torch.Tensor],
    most: int,
    active: int,
    scratch: int,
    threads: int,
) -> bytes:
    """struct Call. ``active`` and ``scratch`` are addresses; x and y are dense."""
    channels, threshold = x.shape[-1], encoder.threshold
    decay, v_reset, _, _, levels, _ = kernel.numbers
    unit = encoder.unit if weights[0].form in ("binary", "ternary") and encoder.unit else 1.0  # codes count integers
    call = _CALL.pack(
        x.data_ptr(), threshold.data_ptr(), active, scratch, x.numel() // channels, channels, threshold.numel(),
        encoder.T, most, threads, len(weights), decay, v_reset, levels, encoder.frame_weight,
        1 / unit, encoder.gain * unit,
    )  # fmt: skip
    parts = [_projection(one, result) for one, result in zip(weights, y, strict=True)]
    return b"".join((call, *parts, bytes(_PROJECTION.size * (MOST_PROJECTIONS - len(parts)))))


def _projection(weights: SpikeWeights, y: torch.Tensor) -> bytes:
    scale, bias, rows = weights.scale, weights.bias, weights.rows
    return _PROJECTION.pack(
        rows.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), weights.outputs, rows.stride(0) * rows.element_size(), 0 if scale is None else scale.numel(),
    )  # fmt: skip


def project(
    kernel: Kernel,
    encoder: Encoder,
    x: torch.Tensor,
    weights: Sequence[SpikeWeights],
    y: Sequence[torch.Tensor],
    most: int,
) -> int:
    """How many channels are active. Fills y unless they are more than ``most``."""
    active = ctypes.c_longlong()
    threads = torch.get_num_threads()
    packed = pack(kernel, encoder, x, weights, y, most, ctypes.addressof(active), 0, threads)
    first = weights[0]
    text = definitions(kernel.definitions, encoder.spiking, first.rows.dtype, first.form)
    functions = module.functions(text, x.dtype, x.dtype, _FILE)
    if functions["project"](packed):
        raise SpikelmError(f"backend 'cpu': no memory for a projection of {tuple(x.shape)}")
    return active.value


def build(kernel: str, spiking: bool, io: torch.dtype, weights: torch.dtype, form: str) -> None:
    """Compiles the specialisation; raises SpikelmError if that fails."""
    module.functions(definitions(kernel, spiking, weights, form), io, io, _FILE)
