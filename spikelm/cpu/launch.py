"""Calls the CPU kernels on tensors. spikelm/ops/operators.py checks shapes, types and devices before."""

from __future__ import annotations

import torch

from spikelm.cpu import module
from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel
from spikelm.ops.layout import Read, channels_of, pack, read

_WORTH_THREADS = 1 << 15  # element-steps


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
    single = kernel.inject_first
    frame_shape = x.shape if single else x.shape[1:]
    spikes = torch.empty((T, *frame_shape), dtype=spike_dtype) if single else _like(x, spike_dtype)
    v_last = torch.empty(frame_shape, dtype=threshold.dtype) if keep_state else None
    what = read(x, None, single, False)
    v, threshold = _dense(v), threshold.contiguous()
    tensors = (what.x, v, threshold, spikes, v_last, None, None, None, None, None, None)
    channels = channels_of(threshold.shape, frame_shape)
    _run("forward", kernel, x.dtype, spike_dtype, tensors, T, what, channels, started=started, start=start)
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
    total = _like(x, spike_dtype)
    what = read(x, None, True, True)
    threshold = threshold.contiguous()
    tensors = (what.x, None, threshold, total, None, None, None, None, None, None, None)
    channels = channels_of(threshold.shape, x.shape)
    _run(
        "forward_sum", kernel, x.dtype, spike_dtype, tensors, T, what, channels,
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
    grad_x = torch.zeros(x.shape, dtype=x.dtype) if started else _like(x, x.dtype)
    grad_v = torch.empty(frame_shape, dtype=threshold.dtype) if needs_v else None
    sums = torch.empty(threshold.numel(), dtype=torch.float64) if needs_threshold else None
    what = read(x, grad_spikes, kernel.inject_first, False)
    v, grad_v_last, dense = _dense(v), _dense(grad_v_last), threshold.contiguous()
    tensors = (what.x, v, dense, None, None, what.grad_spikes, grad_v_last, grad_x, grad_v, sums, None)
    channels = channels_of(threshold.shape, frame_shape)
    _run("backward", kernel, x.dtype, x.dtype, tensors, T, what, channels, started=started, start=start)
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
    grad_x = _like(x, x.dtype)
    sums = torch.empty(threshold.numel(), dtype=torch.float64) if needs_threshold else None
    what = read(x, grad, True, True)
    dense = threshold.contiguous()
    tensors = (what.x, None, dense, None, None, what.grad_spikes, None, grad_x, None, sums, None)
    channels = channels_of(threshold.shape, x.shape)
    _run("backward_sum", kernel, x.dtype, x.dtype, tensors, T, what, channels, frame_weight=frame_weight)
    return grad_x, None if sums is None else sums.view(threshold.shape).to(threshold.dtype)


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
    threads = torch.get_num_threads() if T * what.numbers[0] >= _WORTH_THREADS else 1
    packed = pack(kernel, tensors, T, what, channels, threads=threads, **options)  # type: ignore[arg-type]
    if module.functions(kernel.definitions, io, spike)[name](packed):
        raise SpikelmError(f"backend 'cpu': no memory for {name} over {T} steps of {tuple(what.x.shape)}")
