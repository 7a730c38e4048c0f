"""The definition of every neuron: plain torch, differentiable by autograd. Kernels are tested against this.

All arithmetic is float32 (float64 for float64 input) whatever the storage type; spikes come back in the input's type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from spikelm.ops.dynamics import Dynamics
from spikelm.ops.surrogate import heaviside


class _RoundAndClip(torch.autograd.Function):
    """Rounds half away from zero and clips to [-levels, levels].

    The gradient is ``slope`` where |x| <= levels, of which a share ``smooth`` is that of levels tanh(x / levels).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: int, slope: float, smooth: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.levels, ctx.slope, ctx.smooth = levels, slope, smooth
        return (x.sign() * (x.abs() + 0.5).floor()).clamp(-levels, levels) + 0.0  # no -0.0 for small negative x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        derivative = (x.abs() <= ctx.levels).to(x.dtype) * ctx.slope
        if ctx.smooth:
            derivative = (1 - ctx.smooth) * derivative + ctx.smooth * (1 - (x / ctx.levels).tanh().square())
        return gradients[0] * derivative, None, None, None


def fire(x: torch.Tensor, dynamics: Dynamics) -> torch.Tensor:
    """Spikes for a membrane in units of the threshold, x = h / V. A NaN never fires."""
    if dynamics.fire == "integer":
        weight, levels = dynamics.sgc_weight, dynamics.levels
        smooth = weight if dynamics.sgc == "gradient" else 0.0
        spikes = _RoundAndClip.apply(x, levels, dynamics.alpha, smooth)
        if dynamics.sgc == "blend":
            spikes = (1 - weight) * spikes + weight * levels * (x / levels).tanh()
        return torch.where(x.isnan(), torch.zeros_like(x), spikes)
    assert dynamics.surrogate_function is not None  # Dynamics refuses this combination
    if dynamics.fire == "binary":
        return heaviside(x - 1, dynamics.surrogate_function)
    return heaviside(x - 1, dynamics.surrogate_function) - heaviside(-x - 1, dynamics.surrogate_function)


def reset_mask(s: torch.Tensor, x: torch.Tensor, dynamics: Dynamics) -> torch.Tensor:
    """1 where the spikes ``s`` of x = h / V clear the membrane, else 0; differentiable as SpikingJelly's is.

    Ternary spikes add the two thresholds' events, of which ``s`` is the difference. A count has no such derivative.
    """
    if dynamics.fire == "binary":
        return s
    if dynamics.fire == "integer":
        return (s != 0).to(s.dtype)
    assert dynamics.surrogate_function is not None
    return heaviside(x - 1, dynamics.surrogate_function) + heaviside(-x - 1, dynamics.surrogate_function)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type the membrane is kept in for an input of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def step(
    x: torch.Tensor | None,
    v: torch.Tensor,
    threshold: torch.Tensor,
    dynamics: Dynamics,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step. x [N, *] (None: no input in this step), v [N, *] and threshold (broadcast) in the state's type.

    ``decay`` (broadcast) takes the place of the dynamics' number where it is learned. Returns the spikes and the next
    membrane, both [N, *].
    """
    h = v * (dynamics.decay if decay is None else decay)
    if x is not None:
        h = h + x
    if dynamics.reset == "soft_delayed":  # the state is h before its reset, so its spikes are known from it
        earlier = fire(v / threshold, dynamics)
        h = h - (earlier.detach() if dynamics.detach_reset else earlier) * threshold
    s = fire(h / threshold, dynamics)
    if dynamics.reset == "soft":
        return s, h - (s.detach() if dynamics.detach_reset else s) * threshold
    if dynamics.reset == "hard":
        mask = reset_mask(s, h / threshold, dynamics)
        mask = mask.detach() if dynamics.detach_reset else mask
        finite = torch.where(h.isinf() & (s != 0), torch.zeros_like(h), h)  # inf * 0 would be NaN
        return s, (1 - mask) * finite + mask * dynamics.v_reset
    return s, h


def multi_step(
    x_seq: torch.Tensor, v: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, started: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """All steps of x_seq [T, N, *] from membrane v [N, *]; with inject "first" input enters unless ``started``.

    Returns (spikes [T, N, *] in x_seq's type, membranes after every step [T, N, *] in the state's type).
    """
    spikes, membranes = [], []
    for t, x in enumerate(x_seq.unbind(0)):
        skip = dynamics.inject == "first" and (started or t > 0)
        s, v = step(None if skip else x.to(v.dtype), v, threshold, dynamics)
        spikes.append(s.to(x_seq.dtype))
        membranes.append(v)
    if not spikes:
        return x_seq.clone(), v.new_empty(x_seq.shape)  # clone: a loss over no steps still has a graph
    return torch.stack(spikes), torch.stack(membranes)


def encode(x: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, T: int) -> list[torch.Tensor]:
    """T frames of a plain x [N, *] injected at t = 0 into a fresh membrane; each [N, *] in the state's type."""
    v = torch.zeros_like(x, dtype=state_dtype(x.dtype))
    frames = []
    for t in range(T):
        s, v = step(x.to(v.dtype) if t == 0 else None, v, threshold, dynamics)
        frames.append(s)
    return frames


def encode_sum(
    x: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, T: int, frame_weight: float
) -> torch.Tensor:
    """sum_t frame_weight**t s_t over the frames of :func:`encode`; shape and dtype of x."""
    total = torch.zeros_like(x, dtype=state_dtype(x.dtype))
    for t, frame in enumerate(encode(x, threshold, dynamics, T)):
        total = total + frame_weight**t * frame
    return total.to(x.dtype)
