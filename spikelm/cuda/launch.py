"""Runs the CUDA kernels on tensors: how many threads, what each of them takes, and the memory between them."""

from __future__ import annotations

import math
from array import array
from functools import cache, lru_cache

import torch

from spikelm.cpu.module import storage
from spikelm.cuda import module
from spikelm.cuda.module import Launch
from spikelm.ops.kernel import Kernel
from spikelm.ops.launch import Launcher
from spikelm.ops.layout import Read, pack

_MOST_UNROLLED = 32  # steps; more of them in a loop. What multistep.cuh has room for weights of
_BLOCK = 128  # threads, what multistep.cuh bounds its registers by
_MOST_BLOCKS = 2**31 - 1
_MOST_ADDING = 1024  # threads that add up one channel's partial sums
_BYTES_LOADED = 256  # what a thread of a forward loads ahead; with more of it registers spill
_BYTES_KEPT = 128  # the membranes that a thread of a backward keeps in registers; likewise
_KEPT_THREADS = 1 << 17  # at most, where each thread has scratch memory; still fills a GPU


@cache
def definitions(
    kernel: str, io: torch.dtype, spike: torch.dtype, name: str, T: int, vector: int, needs_threshold: bool
) -> str:
    """What multistep.cuh asks for: ``kernel`` is :attr:`Kernel.definitions`, ``name`` one of FORWARD, FORWARD_SUM,
    BACKWARD and BACKWARD_SUM, and T 0 where the number of steps is not compiled in."""
    values = {"KERNEL": name, "T_STEPS": T, "VECTOR": vector, "NEEDS_THRESHOLD": int(needs_threshold)}
    return kernel + storage(io, spike) + "".join(f"#define {key} {value}\n" for key, value in values.items())


def most_neurons(name: str, io: torch.dtype, T: int) -> int:
    """How many neurons a thread takes through T steps where the layout allows it: 16 bytes of input, or fewer."""
    most = 16 // io.itemsize
    if name.startswith("BACKWARD"):
        return max(1, min(most, _BYTES_KEPT // (T * max(io.itemsize, 4)))) if T <= _MOST_UNROLLED else 1
    return min(most, _BYTES_LOADED // (T * io.itemsize)) if name == "FORWARD" and T <= _MOST_UNROLLED else most


def run(
    name: str,
    kernel: Kernel,
    spike_dtype: torch.dtype,
    tensors: tuple[torch.Tensor | None, ...],
    T: int,
    what: Read,
    channels: tuple[int, int],
    options: tuple[bool, float, float, float],
) -> None:
    """Launches on torch's current stream of the tensors' device; nothing waits for it."""
    name, x, threshold, sums = name.upper(), what.x, tensors[2], tensors[-1]
    assert threshold is not None
    vector = _neurons(most_neurons(name, x.dtype, T), tensors, what, channels if sums is not None else (1, 1))
    unrolled, backward = T <= _MOST_UNROLLED, name.startswith("BACKWARD")
    threads = min(what.places.frame // vector, _MOST_BLOCKS * _BLOCK)
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
    arguments = pack(kernel, (*tensors, scratch), T, what, channels, *options, threads)
    in_kernel = T if unrolled else 0
    module.launch(
        definitions(kernel.definitions, x.dtype, spike_dtype, name, in_kernel, vector, sums is not None),
        launches,
        arguments + _weights(options[2], in_kernel, threshold.dtype),
        x.device,
    )


@lru_cache(maxsize=1024)
def _weights(frame_weight: float, T: int, state: torch.dtype) -> bytes:
    """``frame_weight`` ** t of the T steps, and room up to the most."""
    weights = [frame_weight**t for t in range(T)] + [0.0] * (_MOST_UNROLLED - T)
    return array("d" if state == torch.float64 else "f", weights).tobytes()


def _neurons(most: int, tensors: tuple[torch.Tensor | None, ...], what: Read, channels: tuple[int, int]) -> int:
    """The largest power of 2, up to ``most``, by which a thread's neurons lie together in every tensor."""
    _, x_step, grad_step, rows, _ = what.places
    steps = (rows.length, x_step, grad_step, *rows.strides[0], *rows.strides[1])
    common = math.gcd(*steps, 0 if channels == (1, 1) else channels[0] * channels[1])
    neurons = min(most, common & -common)
    for tensor in tensors[:2] + tensors[3:-1]:  # a threshold is read one by one, and sums are written so
        if tensor is not None:
            address = tensor.data_ptr() | 16
            neurons = min(neurons, (address & -address) // tensor.itemsize if address % 16 else most)
    return neurons


def build(kernel: str, io: torch.dtype, spike: torch.dtype) -> None:
    """Compiles the forward of a single step for the current device; raises SpikelmError if that fails."""
    major, minor = torch.cuda.get_device_capability()
    module.build(definitions(kernel, io, spike, "FORWARD", 1, 1, False), f"sm_{major}{minor}")


_launcher = Launcher(run)
forward, forward_sum = _launcher.forward, _launcher.forward_sum
backward, backward_sum = _launcher.backward, _launcher.backward_sum
