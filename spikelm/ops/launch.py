"""The four calls that a device's kernels serve: allocates results, says how inputs are read, and runs the kernel.

spikelm/ops/operators.py checks shapes, types and devices before; cpu/launch.py and cuda/launch.py bring ``run``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spikelm.ops.kernel import Kernel
from spikelm.ops.layout import Read, channels_of, read

# One run of a kernel. In turn: its name, "forward", "forward_sum", "backward" or "backward_sum"; the kernel; the type
# of the spikes; x, v, threshold, spikes, v_last, grad_spikes, grad_v_last, grad_x, grad_v and grad_threshold, None
# where there is none; T; how x and grad_spikes are read; channels and inner; started, start, frame_weight, sum_scale.
Run = Callable[
    [
        str,
        Kernel,
        torch.dtype,
        tuple[torch.Tensor | None, ...],
        int,
        Read,
        tuple[int, int],
        tuple[bool, float, float, float],
    ],
    None,
]


class Launcher:
    """The calls of one device, each a ``run``, which raises if it fails."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def forward(
        self,
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
        spikes = _empty((T, *frame_shape), spike_dtype, x) if single else _like(x, spike_dtype)
        v_last = _empty(frame_shape, threshold.dtype, x) if keep_state else None
        what = read(x, None, single, False)
        v, threshold = None if v is None else _dense(v), _dense(threshold)
        tensors = (what.x, v, threshold, spikes, v_last, None, None, None, None, None)
        channels = channels_of(threshold.shape, frame_shape)
        self.run("forward", kernel, spike_dtype, tensors, T, what, channels, (started, start, 1.0, 1.0))
        return spikes, v_last

    def forward_sum(
        self,
        kernel: Kernel,
        x: torch.Tensor,
        threshold: torch.Tensor,
        T: int,
        spike_dtype: torch.dtype,
        frame_weight: float,
        sum_scale: float,
    ) -> torch.Tensor:
        """sum_t ``frame_weight`` ** t s_t over the T frames of x [*frame], which enters v = 0 once.

        ``sum_scale``, for torch.int8 alone, is a factor on the sum.
        """
        total = _like(x, spike_dtype)
        what = read(x, None, True, True)
        threshold = _dense(threshold)
        tensors = (what.x, None, threshold, total, None, None, None, None, None, None)
        channels, options = channels_of(threshold.shape, x.shape), (False, 0.0, frame_weight, sum_scale)
        self.run("forward_sum", kernel, spike_dtype, tensors, T, what, channels, options)
        return total

    def backward(
        self,
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
        grad_x = _like(x, x.dtype)
        if started and kernel.inject_first:
            grad_x.zero_()
        grad_v = _empty(frame_shape, threshold.dtype, x) if needs_v else None
        sums = _empty((threshold.numel(),), torch.float64, x) if needs_threshold else None
        what = read(x, grad_spikes, kernel.inject_first, False)
        v, grad_v_last = (None if tensor is None else _dense(tensor) for tensor in (v, grad_v_last))
        dense = _dense(threshold)
        tensors = (what.x, v, dense, None, None, what.grad_spikes, grad_v_last, grad_x, grad_v, sums)
        channels = channels_of(threshold.shape, frame_shape)
        self.run("backward", kernel, x.dtype, tensors, T, what, channels, (started, start, 1.0, 1.0))
        return grad_x, grad_v, None if sums is None else sums.view(threshold.shape).to(threshold.dtype)

    def backward_sum(
        self,
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
        sums = _empty((threshold.numel(),), torch.float64, x) if needs_threshold else None
        what = read(x, grad, True, True)
        dense = _dense(threshold)
        tensors = (what.x, None, dense, None, None, what.grad_spikes, None, grad_x, None, sums)
        channels, options = channels_of(threshold.shape, x.shape), (False, 0.0, frame_weight, 1.0)
        self.run("backward_sum", kernel, x.dtype, tensors, T, what, channels, options)
        return grad_x, None if sums is None else sums.view(threshold.shape).to(threshold.dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, beside: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=beside.device)


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_neg().contiguous()
