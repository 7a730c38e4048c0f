"""Calls the CUDA kernels on tensors. spikelm/ops/operators.py checks shapes, types and devices before."""

from __future__ import annotations

import math
from array import array
from functools import cache, lru_cache

import torch

from spikelm.cpu.module import STORAGE
from spikelm.cuda import module
from spikelm.cuda.module import Launch
from spikelm.ops.kernel import Kernel
from spikelm.ops.layout import Read, channels_of, pack, read

_MOST_UNROLLED = 32  # steps; more of them in a loop. What multistep.cuh has room for weights of
_BLOCK = 128  # threads, what multistep.cuh bounds its registers by
_MOST_BLOCKS = 2**31 - 1
_MOST_ADDING = 1024  # threads that add up one channel's partial sums
_BYTES_LOADED = 256  # what a thread of a forward loads ahead; with more of it registers spill
_BYTES_KEPT = 128  # the membranes that a thread of a backward keeps in registers; likewise
_KEPT_THREADS = 1 << 17  # at most, where each thread has scratch memory; still fills a GPU


def forward(
    kernel: Kernel,
    x: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    T: int,
    spike_dtype: torch.dtype,
    start: float,
    started: bool,
    keep_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Spikes [T, *frame] in ``spike_dtype``, and the last membrane [*frame] if ``keep_state``.

    x is [T, *frame], or [*frame] where the kernel injects first, and v [*frame] or None: ``start`` everywhere.
    """
    frame_shape = x.shape if kernel.inject_first else x.shape[1:]
    spikes = torch.empty((T, *frame_shape), dtype=spike_dtype, device=x.device)
    v_last = torch.empty(frame_shape, dtype=threshold.dtype, device=x.device) if keep_state else None
    what = read(x, None, kernel.inject_first, False)
    v, threshold = _dense(v), threshold.contiguous()
    tensors = (what.x, v, threshold, spikes, v_last, None, None, None, None, None)
    channels = channels_of(threshold.shape, frame_shape)
    _run("FORWARD", kernel, x.dtype, spike_dtype, tensors, T, what, channels, started=started, start=start)
    return spikes, v_last


def forward_sum(
    kernel: Kernel,
    x: torch.Tensor,
    threshold: torch.Tensor,
    T: int,
    spike_dtype: torch.dtype,
    frame_weight: float,
    sum_scale: float,
) -> torch.Tensor:
    """``sum_scale`` * sum_t ``frame_weight`` ** t s_t over the T frames of x [*frame], which enters v = 0 once."""
    total = torch.empty(x.shape, dtype=spike_dtype, device=x.device)
    what = read(x, None, True, True)
    threshold = threshold.contiguous()
    tensors = (what.x, None, threshold, total, None, None, None, None, None, None)
    channels = channels_of(threshold.shape, x.shape)
    _run(
        "FORWARD_SUM", kernel, x.dtype, spike_dtype, tensors, T, what, channels,
        frame_weight=frame_weight, sum_scale=sum_scale,
    )  # fmt: skip
    return total


def backward(
    kernel: Kernel,
    x: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    T: int,
    grad_spikes: torch.Tensor | None,
    grad_v_last: torch.Tensor | None,
    start: float,
    started: bool,
    needs_v: bool,
    needs_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, v and threshold, each in its own shape and type."""
    frame_shape = x.shape if kernel.inject_first else x.shape[1:]
    empty = torch.zeros if started else torch.empty
    grad_x = empty(x.shape, dtype=x.dtype, device=x.device)
    grad_v = torch.empty(frame_shape, dtype=threshold.dtype, device=x.device) if needs_v else None
    sums = _sums(threshold) if needs_threshold else None
    what = read(x, grad_spikes, kernel.inject_first, False)
    v, grad_v_last, dense = _dense(v), _dense(grad_v_last), threshold.contiguous()
    tensors = (what.x, v, dense, None, None, what.grad_spikes, grad_v_last, grad_x, grad_v, sums)
    channels = channels_of(threshold.shape, frame_shape)
    _run("BACKWARD", kernel, x.dtype, x.dtype, tensors, T, what, channels, started=started, start=start)
    return grad_x, grad_v, None if sums is None else sums.view(threshold.shape).to(threshold.dtype)


def backward_sum(
    kernel: Kernel,
    x: torch.Tensor,
    threshold: torch.Tensor,
    T: int,
    grad: torch.Tensor,
    frame_weight: float,
    needs_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and threshold, each in its own shape and type."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = _sums(threshold) if needs_threshold else None
    what = read(x, grad, True, True)
    dense = threshold.contiguous()
    tensors = (what.x, None, dense, None, None, what.grad_spikes, None, grad_x, None, sums)
    channels = channels_of(threshold.shape, x.shape)
    _run("BACKWARD_SUM", kernel, x.dtype, x.dtype, tensors, T, what, channels, frame_weight=frame_weight)
    return grad_x, None if sums is None else sums.view(threshold.shape).to(threshold.dtype)


@cache
def definitions(
    kernel: str, io: torch.dtype, spike: torch.dtype, name: str, T: int, vector: int, needs_threshold: bool
) -> str:
    """What multistep.cuh asks for: ``kernel`` is :attr:`Kernel.definitions`, ``name`` one of FORWARD, FORWARD_SUM,
    BACKWARD and BACKWARD_SUM, and T 0 where the number of steps is not compiled in."""
    values = {
        "IO_T": STORAGE[io],
        "SPIKE_T": STORAGE[spike],
        "STATE_T": "double" if io == torch.float64 else "float",
        "KERNEL": name,
        "T_STEPS": T,
        "VECTOR": vector,
        "NEEDS_THRESHOLD": int(needs_threshold),
    }
    return kernel + "".join(f"#define {key} {value}\n" for key, value in values.items())


def most_neurons(name: str, io: torch.dtype, T: int) -> int:
    """How many neurons a thread takes through T steps where the layout allows it: 16 bytes of input, or fewer."""
    most = 16 // io.itemsize
    if name.startswith("BACKWARD"):
        return max(1, min(most, _BYTES_KEPT // (T * max(io.itemsize, 4)))) if T <= _MOST_UNROLLED else 1
    return min(most, _BYTES_LOADED // (T * io.itemsize)) if name == "FORWARD" and T <= _MOST_UNROLLED else most


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sums(threshold: torch.Tensor) -> torch.Tensor:
    return torch.empty(threshold.numel(), dtype=torch.float64, device=threshold.device)


def _run(
    name: str,
    kernel: Kernel,
    io: torch.dtype,
    spike: torch.dtype,
    tensors: tuple[torch.Tensor | None, ...],
    T: int,
    what: Read,
    channels: tuple[int, int],
    **options: float,
) -> None:
    x, threshold, sums = what.x, tensors[2], tensors[-1]
    assert threshold is not None
    vector = _neurons(most_neurons(name, io, T), tensors, what, channels if sums is not None else (1, 1))
    unrolled, backward = T <= _MOST_UNROLLED, name.startswith("BACKWARD")
    frame = what.rows.length * what.rows.rows
    threads = min(frame // vector, _MOST_BLOCKS * _BLOCK)
    if sums is not None and channels[0] > 1:  # every thread then meets the same channels all the time
        period = channels[0] * channels[1] // vector
        threads = period * max(1, min(threads, _KEPT_THREADS) // period)
    elif sums is not None or (backward and not unrolled):
        threads = min(threads, _KEPT_THREADS)
    doubles = (0 if unrolled else T) + (0 if sums is None else threads * vector)
    if backward and not unrolled:
        doubles += math.ceil(T * threads * vector * threshold.itemsize / 8)
    scratch = torch.empty(doubles, dtype=torch.float64, device=x.device) if doubles else None

    launches = [Launch("run", math.ceil(threads / _BLOCK), _BLOCK)]
    if name.endswith("SUM") and not unrolled:
        launches.insert(0, Launch("prepare", 1, _BLOCK))
    if sums is not None:
        partials = threads * vector // channels[0]
        adding = min(_MOST_ADDING, max(32, 1 << (partials - 1).bit_length()))
        launches.append(Launch("add_partials", channels[0], adding))
    arguments = pack(kernel, (*tensors, scratch), T, what, channels, threads=threads, **options)  # type: ignore[arg-type]
    module.launch(
        definitions(kernel.definitions, io, spike, name, T if unrolled else 0, vector, sums is not None),
        launches,
        arguments + _weights(options.get("frame_weight", 1.0), T if unrolled else 0, threshold.dtype),
        x.device,
    )


@lru_cache(maxsize=1024)
def _weights(frame_weight: float, T: int, state: torch.dtype) -> bytes:
    """``frame_weight`` ** t of the T steps, and room up to the most."""
    weights = [frame_weight**t for t in range(T)] + [0.0] * (_MOST_UNROLLED - T)
    return array("d" if state == torch.float64 else "f", weights).tobytes()


def _neurons(most: int, tensors: tuple[torch.Tensor | None, ...], what: Read, channels: tuple[int, int]) -> int:
    """The largest power of 2, up to ``most``, by which a thread's neurons lie together in every tensor."""
    rows = what.rows
    steps = (rows.length, what.x_step, what.grad_step, *rows.strides[0], *rows.strides[1])
    common = math.gcd(*steps, 0 if channels == (1, 1) else channels[0] * channels[1])
    neurons = min(most, common & -common)
    for tensor in tensors[:2] + tensors[3:-1]:  # a threshold is read one by one, and sums are written so
        if tensor is not None:
            address = tensor.data_ptr() | 16
            neurons = min(neurons, (address & -address) // tensor.itemsize if address % 16 else most)
    return neurons
