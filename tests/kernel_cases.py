"""Cases for the kernels, and what they must compute: by the reference, and by cuda/steps.cuh line by line in torch."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate

from spikelm.cpu import module
from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel, kernel_of

NIGHTLY = bool(os.environ.get("SPIKELM_NIGHTLY"))  # every specialisation and mutant, not a sample of them

# One surrogate for each derivative of steps.cuh; not all are in each release of SpikingJelly.
SURROGATES: dict[str, Any] = {
    "ATAN": surrogate.ATan(alpha=2.0),
    "SIGMOID": surrogate.Sigmoid(alpha=4.0),
    "TRIANGLE": surrogate.PiecewiseQuadratic(alpha=0.75),
    "INVERSE_SQUARE": snntorch.surrogate.fast_sigmoid(slope=5.0),
    "EXPONENTIAL": surrogate.PiecewiseExp(alpha=1.5),
    "GAUSSIAN": surrogate.Erf(alpha=1.25),
}
if hasattr(surrogate, "Rect"):
    SURROGATES["RECTANGLE"] = surrogate.Rect(alpha=0.5)
NOT_EXACT = ("SURROGATE SIGMOID", "SURROGATE EXPONENTIAL", "SURROGATE GAUSSIAN", "SGC 1")  # exp differs by library

# How x and the gradients lie in memory; "strided", "channels last" and "reversed" have to be copied by the kernels.
LAYOUTS = (
    "dense", "offset", "sliced", "batch first", "swapped", "every second", "expanded", "strided", "channels last",
    "reversed",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call: neuron, storage type, steps, shapes, state, and how x and the gradients lie in memory.

    ``special`` puts NaN and infinities into the input.
    """

    dynamics: Dynamics
    dtype: torch.dtype = torch.float32
    T: int = 4
    frame: tuple[int, ...] = (37,)
    threshold: tuple[int, ...] = ()
    with_v: bool = False
    start: float = 0.0
    started: bool = False
    layout: str = "dense"
    grad_layout: str = "dense"
    special: bool = False


class Inputs(NamedTuple):
    """x [T, *frame] ([*frame] where it enters once), v [*frame] or None, threshold, and the results' gradients."""

    x: torch.Tensor
    v: torch.Tensor | None
    threshold: torch.Tensor
    grad_spikes: torch.Tensor
    grad_v_last: torch.Tensor


class Results(NamedTuple):
    """Everything in the state's type; ``grad_threshold`` [*frame] is each element's share, not summed yet."""

    spikes: torch.Tensor
    v_last: torch.Tensor
    grad_x: torch.Tensor
    grad_v: torch.Tensor
    grad_threshold: torch.Tensor


def dynamics(
    fire: str,
    reset: str = "soft",
    surrogate: str = "ATAN",
    *,
    first: bool = False,
    detach: bool = False,
    **options: Any,
) -> Dynamics:
    """A neuron with numbers that are not trivial."""
    given = {"decay": 0.75, "v_reset": 0.25 if reset == "hard" else 0.0, "inject": "first" if first else "every"}
    integer = fire == "integer"
    given |= {"levels": 3, "alpha": 0.875} if integer else {"surrogate_function": SURROGATES[surrogate]}
    return Dynamics(fire, reset=reset, detach_reset=detach, **(given | options))


def kernel_for(case: Case) -> Kernel:
    """The case's kernel, which it has to have."""
    kernel = kernel_of(case.dynamics)
    assert isinstance(kernel, Kernel), kernel
    return kernel


def build_together(
    request: pytest.FixtureRequest, called: Callable[[dict[str, Any]], tuple[Dynamics, torch.dtype] | None]
) -> None:
    """Builds on every core the CPU kernels of the chosen tests of a module, which would build them one after the other.

    ``called`` gives what a test with these parameters calls, if anything.
    """
    if module.unavailable() or NIGHTLY:  # every specialisation takes longer than a test may
        return
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {called(item.callspec.params) for item in items} - {None}
    kernels = {(kernel_of(dynamic), dtype) for dynamic, dtype in asked}
    sources = {
        module.source(kernel.definitions, dtype, dtype) for kernel, dtype in kernels if isinstance(kernel, Kernel)
    }
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(module.build, sorted(sources)))


def is_exact(kernel: Kernel) -> bool:
    """Whether the backward has only operations that round alike everywhere."""
    return not any(f"{words}\n" in kernel.definitions for words in NOT_EXACT)


def weights(frame_weight: float, T: int, like: torch.Tensor) -> torch.Tensor:
    """frame_weight ** t, taken in float64 and rounded to the state's type."""
    return torch.tensor([frame_weight**t for t in range(T)], dtype=torch.float64).to(like)


def numbers(shape: tuple[int, ...], generator: torch.Generator, scale: float) -> torch.Tensor:
    """Float64 normal numbers, every other one a multiple of 1/8, so that some lie on a threshold exactly."""
    values = scale * torch.randn(math.prod(shape), dtype=torch.float64, generator=generator)
    values[::2] = (8 * values[::2]).round() / 8
    return values.view(shape)


def draw(case: Case, device: str = "cpu") -> Inputs:
    """The inputs of a case, the same at every call."""
    generator = torch.Generator().manual_seed(math.prod(case.frame) + 7 * case.T)
    state = reference.state_dtype(case.dtype)
    x = numbers((case.T, *case.frame), generator, 1.5)
    if case.special:
        for start, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
            x.view(-1)[start::11] = value
    threshold = 0.5 + torch.rand(math.prod(case.threshold), dtype=torch.float64, generator=generator)
    threshold[::2] = (8 * threshold[::2]).round() / 8
    v = numbers(case.frame, generator, 0.5).to(state) if case.with_v else None
    if case.dynamics.inject == "first":
        x = x[0]
    return Inputs(
        arrange(x.to(case.dtype).to(device), case.layout),
        None if v is None else v.to(device),
        threshold.view(case.threshold).to(state).to(device),
        arrange(numbers((case.T, *case.frame), generator, 1.0).to(case.dtype).to(device), case.grad_layout),
        numbers(case.frame, generator, 1.0).to(state).to(device),
    )


def arrange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of the same shape and values, laid out as named in a buffer whose gaps are NaN.

    "expanded" repeats the first entry of the first axis. With too few axes for a layout: "offset", which starts one
    element into its buffer.
    """
    axes, shape = tensor.dim(), tensor.shape
    if layout == "dense":
        return tensor.contiguous()
    if layout == "expanded" and axes:
        return tensor[:1].clone().expand(shape)
    order = list(range(axes))
    if layout == "batch first" and axes > 2:
        order[:2] = 1, 0
    elif layout == "swapped" and axes > 3:
        order[1:3] = 2, 1
    elif layout == "channels last" and axes > 2:
        order = [0, *order[2:], 1]
    elif layout == "reversed":
        order.reverse()
    room, cut = [shape[axis] for axis in order], [slice(None)] * axes
    if layout == "sliced" and axes:
        room[-1], cut[-1] = room[-1] + 5, slice(3, -2)
    elif layout == "every second" and axes > 1:
        room[0], cut[0] = 2 * room[0], slice(None, None, 2)
    elif layout == "strided" and axes:
        room[-1], cut[-1] = 2 * room[-1], slice(None, None, 2)
    buffer = torch.full((1 + math.prod(room),), math.nan, dtype=tensor.dtype, device=tensor.device)
    back = sorted(range(axes), key=order.__getitem__)
    return buffer[1:].view(room)[tuple(cut)].permute(back).copy_(tensor)


# ---- the reference


def autograd(case: Case, inputs: Inputs) -> Results:
    """The reference's results and autograd's gradients."""
    state = inputs.threshold.dtype
    x = inputs.x.to(state).expand(case.T, *case.frame).clone().requires_grad_()
    v = inputs.v
    v = torch.full(case.frame, case.start, dtype=state, device=x.device) if v is None else v.clone()
    threshold = inputs.threshold.expand(case.frame).clone().requires_grad_()
    spikes, membranes = reference.multi_step(x, v.requires_grad_(), threshold, case.dynamics, case.started)
    results, leaves = (spikes, membranes[-1]), (x, v, threshold)
    grad_results = (inputs.grad_spikes.to(state), inputs.grad_v_last)
    found = torch.autograd.grad(results, leaves, grad_results, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    if case.dynamics.inject == "first":
        grads[0] = grads[0][0]
    return Results(spikes.detach(), membranes[-1].detach(), *grads)


# ---- cuda/steps.cuh in torch: the same operations in the same order. Scalars are tensors, so that none is inverted.


class Steps:
    """The functions of steps.cuh for one specialisation, on tensors of the state's type."""

    def __init__(self, kernel: Kernel, like: torch.Tensor) -> None:
        self.words = dict(line.split()[1:] for line in kernel.definitions.splitlines())
        scalars = [torch.tensor(value, dtype=like.dtype, device=like.device) for value in (*kernel.numbers, 0.0, 1.0)]
        self.decay, self.v_reset, self.scale, self.alpha, self.levels, self.sgc_weight, self.zero, self.one = scalars

    def fire(self, h: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        if self.words["FIRE"] == "BINARY":
            return (h >= V).to(h.dtype)
        if self.words["FIRE"] == "TERNARY":
            return (h >= V).to(h.dtype) - (h <= -V).to(h.dtype)
        y = h / V
        shifted = y.abs() + 0.5
        count = torch.where(shifted < self.levels, shifted, self.levels).trunc()
        return torch.where(y.isnan(), self.zero, torch.where(y < 0, -count, count))

    def step(self, x: torch.Tensor | None, v: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(h, spikes, v) of one step."""
        h = v * self.decay
        if x is not None:
            h = h + x
        if self.words["RESET"] == "SOFT_DELAYED":
            h = h - self.fire(v, V) * V
        s = self.fire(h, V)
        if self.words["RESET"] == "SOFT":
            return h, s, h - s * V
        return h, s, torch.where(s != 0, self.v_reset, h) if self.words["RESET"] == "HARD" else h

    def derivative(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.abs() * self.alpha
        match self.words["SURROGATE"]:
            case "ATAN":
                return self.scale / (self.one + scaled * scaled)
            case "INVERSE_SQUARE":
                return self.scale / ((self.one + scaled) * (self.one + scaled))
            case "TRIANGLE":
                return torch.where(scaled < 1, self.scale * (self.one - scaled), self.zero)
            case "RECTANGLE":
                return torch.where(x.abs() < self.alpha, self.scale, self.zero)
            case "EXPONENTIAL":
                return self.scale * (-scaled).exp()
            case "GAUSSIAN":
                return self.scale * (-scaled * scaled).exp()
            case _:
                e = (-scaled).exp()
                return self.scale * e / ((self.one + e) * (self.one + e))

    def slopes(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Derivatives of the spikes and of the reset's mask."""
        if self.words["FIRE"] == "BINARY":
            up = self.derivative(y - 1)
            return up, up
        if self.words["FIRE"] == "TERNARY":
            up, down = self.derivative(y - 1), self.derivative(y + 1)
            return up + down, up - down
        slope = torch.where(y.abs() <= self.levels, self.scale, self.zero)
        if self.words["SGC"] == "1":
            e = (y.abs() * self.alpha * -2).exp()
            smooth = 4 * e / ((self.one + e) * (self.one + e))
            slope = (self.one - self.sgc_weight) * slope + self.sgc_weight * smooth
        return slope, self.zero

    def gradient(
        self, h: torch.Tensor, V: torch.Tensor, grad_spikes: torch.Tensor, carry: torch.Tensor, extra: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(dL/dh, what is carried to the step before, the threshold's share)."""
        inverse = self.one / V
        y = h / V if self.words["SURROGATE"] in ("RECTANGLE", "WINDOW") else h * inverse
        slope, mask_slope = self.slopes(y)
        s = self.fire(h, V)
        if self.words["RESET"] == "HARD":
            through, at_y, at_threshold = torch.where(s != 0, self.zero, carry), grad_spikes * slope, self.zero
            if self.words["DETACH_RESET"] == "0" and self.words["FIRE"] != "INTEGER":
                finite = torch.where(h.isfinite(), h, self.zero)
                at_y = at_y + carry * (self.v_reset - finite) * mask_slope
        else:
            through = carry if self.words["RESET"] == "SOFT" else carry * self.decay + extra
            at_y = (grad_spikes if self.words["DETACH_RESET"] == "1" else grad_spikes - carry * V) * slope
            at_threshold = -(s * carry)
        at_h = at_y * inverse
        grad_h = through + at_h
        delayed = self.words["RESET"] == "SOFT_DELAYED"
        return grad_h, grad_h if delayed else grad_h * self.decay, at_threshold - at_h * y


def transcribe(case: Case, inputs: Inputs) -> Results:
    """What the sequence kernels compute."""
    kernel, V = kernel_for(case), inputs.threshold.expand(case.frame)
    once, state = kernel.inject_first, V.dtype
    steps, x = Steps(kernel, V), inputs.x.to(state)
    v = start = torch.full_like(V, case.start) if inputs.v is None else inputs.v
    hs, spikes = [], []
    for t in range(case.T):
        enters = not once or (t == 0 and not case.started)
        h, s, v = steps.step((x if once else x[t]) if enters else None, v, V)
        hs.append(h)
        spikes.append(s)
    delayed = steps.words["RESET"] == "SOFT_DELAYED"
    zeros, grad_threshold, grad_x = torch.zeros_like(V), torch.zeros_like(V), []
    carry = zeros if delayed else inputs.grad_v_last
    for t in reversed(range(case.T)):
        extra = inputs.grad_v_last if delayed and t == case.T - 1 else zeros
        grad_h, carry, share = steps.gradient(hs[t], V, inputs.grad_spikes[t].to(state), carry, extra)
        grad_threshold = grad_threshold + share
        grad_x.insert(0, grad_h)
    if delayed:
        _, carry, share = steps.gradient(start, V, zeros, carry, zeros)
        grad_threshold = grad_threshold + share
    entered = (zeros if case.started else grad_x[0]) if once else torch.stack(grad_x)
    return Results(torch.stack(spikes), v, entered, carry, grad_threshold)


def transcribe_sum(case: Case, inputs: Inputs, frame_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sum's backward computes for the gradient ``grad_spikes[0]``: dL/dx, and each element's dL/dV."""
    V = inputs.threshold.expand(case.frame)
    steps, G = Steps(kernel_for(case), V), inputs.grad_spikes[0].to(V.dtype)
    factors = weights(frame_weight, case.T, V)
    v, hs = torch.zeros_like(V), []
    for t in range(case.T):
        h, _, v = steps.step(inputs.x.to(V.dtype) if t == 0 else None, v, V)
        hs.append(h)
    zeros = carry = torch.zeros_like(V)
    grad_threshold = grad_h = zeros
    for h, weight in zip(reversed(hs), factors.flip(0), strict=True):
        grad_h, carry, share = steps.gradient(h, V, G * weight, carry, zeros)
        grad_threshold = grad_threshold + share
    if steps.words["RESET"] == "SOFT_DELAYED":
        grad_threshold = grad_threshold + steps.gradient(zeros, V, zeros, carry, zeros)[2]
    return grad_h, grad_threshold
