"""Runs the CPU kernels of spiking attention, and those that pack spikes into bits."""

from __future__ import annotations

import struct
from functools import cache

import torch

from spikelm.cpu import module
from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel

_WORTH_THREADS = 1 << 18  # steps of entries of the map
_WORTH_THREADS_TO_PACK = 1 << 16  # spikes
_FILE, _PACKING = "attention.cpp", "packing.cpp"
# struct Call of cuda/entries.cuh, and struct Call of cpu/packing.cpp.
_CALL, _PACKING_CALL = struct.Struct("=5q5q12q2d"), struct.Struct("=2q7q4qq")


@cache
def definitions(kernel: str, T: int, channels: int) -> str:
    """What cuda/entries.cuh asks for besides the types; ``kernel`` is :attr:`Kernel.definitions`."""
    return f"{kernel}#define T_STEPS {T}\n#define CHANNELS {channels}\n"


def pack(
    kernel: Kernel,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    out: torch.Tensor,
    fired: torch.Tensor,
    threads: int,
) -> bytes:
    """struct Call of cuda/entries.cuh. The last axis of queries, keys and values is dense, out and fired are whole."""
    pointers = [tensor.data_ptr() for tensor in (queries, keys, values, out, fired)]
    _, B, H, _, L = queries.shape
    strides = [step for tensor in (queries, keys, values) for step in tensor.stride()[:4]]
    return _CALL.pack(*pointers, B, H, L, num_keys, threads, *strides, kernel.numbers[0], threshold)


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its last axis is not dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attend(
    kernel: Kernel,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    out: torch.Tensor,
    fired: torch.Tensor,
) -> None:
    """Fills ``out`` and ``fired``; see :func:`spikelm.ops.spiking_attention.spiking_attention`."""
    queries, keys, values = dense_rows(queries), dense_rows(keys), dense_rows(values)
    T, channels = len(queries), values.shape[-1]
    threads = torch.get_num_threads() if fired.numel() * num_keys >= _WORTH_THREADS else 1
    packed = pack(kernel, queries, keys, values, num_keys, threshold, out, fired, threads)
    functions = module.functions(definitions(kernel.definitions, T, channels), torch.float32, out.dtype, _FILE)
    if functions["attend"](packed):
        raise SpikelmError(f"backend 'cpu': no memory for {num_keys} keys and {T} steps on {threads} threads")


def build(kernel: str, T: int, channels: int, dtype: torch.dtype) -> None:
    """Compiles the specialisation; raises SpikelmError if that fails."""
    module.functions(definitions(kernel, T, channels), torch.float32, dtype, _FILE)


def pack_channels(spikes: torch.Tensor) -> torch.Tensor:
    """:func:`spikelm.ops.spiking_attention.pack_channels` of spikes on a CPU."""
    T, B, L, H, channels = spikes.shape
    packed = torch.empty((T, B, H, -(-channels // 32), L), dtype=torch.int32)
    _pack("pack_channels", spikes, packed, 0)
    return packed


def pack_tokens(spikes: torch.Tensor, first: int) -> torch.Tensor:
    """:func:`spikelm.ops.spiking_attention.pack_tokens` of spikes on a CPU."""
    T, B, S, H, channels = spikes.shape
    packed = torch.empty((T, B, H, -(-(first + S) // 32), channels), dtype=torch.int32)
    _pack("pack_tokens", spikes, packed, first)
    return packed


def _pack(name: str, spikes: torch.Tensor, packed: torch.Tensor, first: int) -> None:
    spikes = dense_rows(_in_storage(spikes))
    threads = torch.get_num_threads() if spikes.numel() >= _WORTH_THREADS_TO_PACK else 1
    sizes = (*spikes.shape, first, threads)
    call = _PACKING_CALL.pack(spikes.data_ptr(), packed.data_ptr(), *sizes, *spikes.stride()[:4], packed.shape[3])
    module.functions("", spikes.dtype, spikes.dtype, _PACKING)[name](call)


def _in_storage(spikes: torch.Tensor) -> torch.Tensor:
    """Spikes in a type that packing.cpp reads: 16 or 32 bits of floating point, or bytes."""
    if spikes.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        return spikes
    if spikes.dtype in (torch.bool, torch.uint8):
        return spikes.view(torch.int8)
    return (spikes != 0).view(torch.int8)


def refused_packing(dtype: torch.dtype) -> str | None:
    """Why spikes of this type cannot be packed by a kernel; builds it if need be."""
    like = _in_storage(torch.empty(0, dtype=dtype)).dtype
    try:
        module.functions("", like, like, _PACKING)
    except SpikelmError as error:
        return str(error)
    return None
