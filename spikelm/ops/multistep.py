"""Multi-step operations on tensors: the quick path where there is one, the reference everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from spikelm.errors import warn_once
from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.surrogate import derivative_of


def encode_sum(
    x: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, T: int, frame_weight: float
) -> torch.Tensor:
    """sum_t frame_weight**t s_t over the T frames of x [N, *]: shape and dtype of x."""
    derivative = derivative_of(dynamics.surrogate_function)
    if dynamics.fire == "ternary" and dynamics.reset == "soft" and derivative is not None:
        return _TernaryEncodeSum.apply(x, threshold, dynamics, T, frame_weight, derivative)
    if derivative is None and getattr(dynamics.surrogate_function, "spiking", True):
        function = dynamics.surrogate_function
        name = getattr(function, "__qualname__", type(function).__qualname__)
        warn_once(f"{name}: no kernel for this surrogate, the reference is used")
    total = torch.zeros_like(x, dtype=reference.state_dtype(x.dtype))
    for t, frame in enumerate(reference.encode(x, threshold, dynamics, T)):
        total = total.add(frame, alpha=frame_weight**t)
    return total.to(x.dtype)


class _TernaryEncodeSum(torch.autograd.Function):
    """The reference's forward without its graph, and its gradient by hand.

    With y_t = h_t / V the frames depend on y_0 = x / V alone: y_{t+1} = decay (y_t - s_t). So with g the surrogate's
    slope at y_t, dL/dy_t = c_t + g (w_t G - c_t) [c_t alone behind a detached reset: c_t + g w_t G], c_t = decay
    dL/dy_{t+1}, dL/dx = dL/dy_0 / V and dL/dV = -dL/dy_0 x / V^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        threshold: torch.Tensor,
        dynamics: Dynamics,
        T: int,
        frame_weight: float,
        derivative: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        keep = any(ctx.needs_input_grad)
        h = x.to(reference.state_dtype(x.dtype))
        total, kept = torch.zeros_like(h), []
        for t in range(T):
            if t:
                h = h * dynamics.decay
            y = h / threshold
            # Comparisons written as numbers: vectorised, unlike a cast from bool, and 0 for a NaN.
            s = torch.ge(y, 1, out=torch.empty_like(y)).sub_(torch.le(y, -1, out=torch.empty_like(y)))
            total.add_(s, alpha=frame_weight**t)
            if keep:
                kept.append(y)
            if t < T - 1:
                h = h - s.mul_(threshold)
        if keep:
            ctx.save_for_backward(threshold, *kept)
            ctx.dynamics, ctx.frame_weight, ctx.derivative = dynamics, frame_weight, derivative
            ctx.input_dtype = x.dtype
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        threshold, *ys = ctx.saved_tensors
        G = gradients[0].to(ys[0].dtype)
        carried = torch.zeros_like(G)
        for t in range(len(ys) - 1, -1, -1):
            slope = ctx.derivative(ys[t] - 1).add_(ctx.derivative(ys[t] + 1))
            weighted = G * ctx.frame_weight**t
            if not ctx.dynamics.detach_reset:
                weighted.sub_(carried)
            carried.addcmul_(slope, weighted)
            if t:
                carried.mul_(ctx.dynamics.decay)
        at_threshold = (carried * ys[0]).neg_() if ctx.needs_input_grad[1] else None
        if at_threshold is not None:
            at_threshold = (at_threshold / threshold).sum_to_size(threshold.shape)
        return (carried / threshold).to(ctx.input_dtype), at_threshold, None, None, None, None
