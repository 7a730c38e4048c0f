"""The kernels as PyTorch operators: torch.library ops with fake, autograd and vmap rules; a quick way in eager mode.

``spikelm::multi_step`` and ``spikelm::encode_sum`` and their backwards serve torch.compile, torch.export, torch.func
and dispatch modes. Plain eager calls skip the dispatcher through two autograd.Functions over the same launch functions.
Autocast changes nothing: the storage type is the input's and the arithmetic float32 (float64) anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from spikelm.cpu import launch as cpu
from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel


def launch_on(x: torch.Tensor) -> ModuleType:
    """The module with the four launch functions for tensors on the device of x."""
    if x.is_cpu:
        return cpu
    return cuda_launch()


def cuda_launch() -> ModuleType:
    """spikelm.cuda.launch, which imports CuPy."""
    from spikelm.cuda import launch as cuda

    return cuda


def multi_step(
    x: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    kernel: Kernel,
    T: int,
    spike_dtype: torch.dtype,
    start: float,
    started: bool,
    keep_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Spikes and the last membrane; see :func:`spikelm.cpu.launch.forward`."""
    if not is_plain(x, v, threshold):
        _refuse_tangents(x, v, threshold)
        operator = _MultiStepTransformed.apply if _is_transformed() else _multi_step_op
        spikes, v_last = operator(x, v, threshold, *kernel, T, spike_dtype, start, started, keep_state)
        return spikes, v_last if keep_state else None
    rest = (T, spike_dtype, start, started, keep_state)
    if _needs_gradient(x, v, threshold):
        return _apply_multi_step(kernel, x, v, threshold, rest)
    return launch_on(x).forward(kernel, x, v, threshold, *rest)


def encode_sum(
    x: torch.Tensor,
    threshold: torch.Tensor,
    kernel: Kernel,
    T: int,
    spike_dtype: torch.dtype,
    frame_weight: float,
    sum_scale: float,
) -> torch.Tensor:
    """The weighted sum of T frames; see :func:`spikelm.cpu.launch.forward_sum`."""
    if not is_plain(x, None, threshold):
        _refuse_tangents(x, threshold)
        operator = _EncodeSumTransformed.apply if _is_transformed() else _encode_sum_op
        return operator(x, threshold, *kernel, T, spike_dtype, frame_weight, sum_scale)
    if _needs_gradient(x, None, threshold) and spike_dtype == x.dtype:
        return _apply_encode_sum(kernel, x, threshold, (T, frame_weight))
    return launch_on(x).forward_sum(kernel, x, threshold, T, spike_dtype, frame_weight, sum_scale)


def _refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """PyTorch would leave them out without a word."""
    if forward_ad._current_level >= 0:
        if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise SpikelmError("the kernels have no forward-mode derivative; use backend='torch'")


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def _needs_gradient(x: torch.Tensor, v: torch.Tensor | None, threshold: torch.Tensor) -> bool:
    needed = x.requires_grad or threshold.requires_grad or (v is not None and v.requires_grad)
    return needed and torch.is_grad_enabled()


def is_plain(x: torch.Tensor, v: torch.Tensor | None, threshold: torch.Tensor) -> bool:
    """Whether nothing looks at the call on its way: no compiler, tracer, transform, mode or tensor subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or type(x) not in _PLAIN
        or type(threshold) not in _PLAIN
        or not (v is None or type(v) in _PLAIN)
    )


_PLAIN = {torch.Tensor, torch.nn.Parameter}


# ---- eager


class _MultiStep(torch.autograd.Function):
    """Saves nothing but its inputs. Takes and returns what launch.forward does; ``rest`` comes after the threshold."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        x: torch.Tensor,
        v: torch.Tensor | None,
        threshold: torch.Tensor,
        rest: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(x, v, threshold)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.rest = kernel, rest
        return launch_on(x).forward(kernel, x, v, threshold, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _multi_step_once(ctx, *grads)
        x, v, threshold = ctx.saved_tensors
        T, _, start, started, _ = ctx.rest
        _, _, needs_v, needs_threshold, _ = ctx.needs_input_grad
        found = launch_on(x).backward(ctx.kernel, x, v, threshold, T, *grads, start, started, needs_v, needs_threshold)
        return None, *found, None


class _EncodeSum(torch.autograd.Function):
    """Saves nothing but its inputs. ``rest`` is (T, frame_weight)."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, x: torch.Tensor, threshold: torch.Tensor, rest: tuple[int, float]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.kernel, ctx.rest = kernel, rest
        return launch_on(x).forward_sum(kernel, x, threshold, rest[0], x.dtype, rest[1], 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _encode_sum_once(ctx, *grads)
        x, threshold = ctx.saved_tensors
        T, frame_weight = ctx.rest
        needs_threshold = ctx.needs_input_grad[2]
        found = launch_on(x).backward_sum(ctx.kernel, x, threshold, T, grads[0], frame_weight, needs_threshold)
        return None, *found, None


# A second derivative is refused where a graph is asked for; the decorator alone costs as much as a small kernel.
_multi_step_once = once_differentiable(_MultiStep.backward)
_encode_sum_once = once_differentiable(_EncodeSum.backward)
# Function.apply looks for functorch's transforms, which is_plain has done.
_apply_multi_step = super(torch.autograd.Function, _MultiStep).apply
_apply_encode_sum = super(torch.autograd.Function, _EncodeSum).apply


# ---- torch.library; an operator returns a tensor of no elements where there is nothing to return


@torch.library.custom_op("spikelm::multi_step", mutates_args=())
def _multi_step_op(
    x: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    definitions: str,
    numbers: Sequence[float],
    T: int,
    spike_dtype: torch.dtype,
    start: float,
    started: bool,
    keep_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = _kernel(definitions, numbers)
    spikes, v_last = launch_on(x).forward(kernel, x, v, threshold, T, spike_dtype, start, started, keep_state)
    return spikes, threshold.new_empty(0) if v_last is None else v_last


@torch.library.custom_op("spikelm::multi_step_backward", mutates_args=())
def _multi_step_backward_op(
    x: torch.Tensor,
    v: torch.Tensor | None,
    threshold: torch.Tensor,
    grad_spikes: torch.Tensor | None,
    grad_v_last: torch.Tensor | None,
    definitions: str,
    numbers: Sequence[float],
    T: int,
    start: float,
    started: bool,
    needs_v: bool,
    needs_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernel = _kernel(definitions, numbers)
    grad_x, grad_v, grad_threshold = launch_on(x).backward(
        kernel, x, v, threshold, T, grad_spikes, grad_v_last, start, started, needs_v, needs_threshold
    )
    nothing = threshold.new_empty(0)
    return grad_x, nothing if grad_v is None else grad_v, nothing.clone() if grad_threshold is None else grad_threshold


@torch.library.custom_op("spikelm::encode_sum", mutates_args=())
def _encode_sum_op(
    x: torch.Tensor,
    threshold: torch.Tensor,
    definitions: str,
    numbers: Sequence[float],
    T: int,
    spike_dtype: torch.dtype,
    frame_weight: float,
    sum_scale: float,
) -> torch.Tensor:
    kernel = _kernel(definitions, numbers)
    return launch_on(x).forward_sum(kernel, x, threshold, T, spike_dtype, frame_weight, sum_scale)


@torch.library.custom_op("spikelm::encode_sum_backward", mutates_args=())
def _encode_sum_backward_op(
    x: torch.Tensor,
    threshold: torch.Tensor,
    grad: torch.Tensor,
    definitions: str,
    numbers: Sequence[float],
    T: int,
    frame_weight: float,
    needs_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = _kernel(definitions, numbers)
    grad_x, grad_threshold = launch_on(x).backward_sum(kernel, x, threshold, T, grad, frame_weight, needs_threshold)
    return grad_x, threshold.new_empty(0) if grad_threshold is None else grad_threshold


def _kernel(definitions: str, numbers: Sequence[float]) -> Kernel:
    return Kernel(definitions, tuple(numbers))  # type: ignore[arg-type]


@_multi_step_op.register_fake
def _(x, v, threshold, definitions, numbers, T, spike_dtype, start, started, keep_state):  # type: ignore[no-untyped-def]
    frame = x.shape if _kernel(definitions, numbers).inject_first else x.shape[1:]
    return x.new_empty((T, *frame), dtype=spike_dtype), threshold.new_empty(frame if keep_state else 0)


@_multi_step_backward_op.register_fake
def _(x, v, threshold, grad_spikes, grad_v_last, definitions, numbers, T, start, started, needs_v, needs_threshold):  # type: ignore[no-untyped-def]
    frame = x.shape if _kernel(definitions, numbers).inject_first else x.shape[1:]
    grad_v = threshold.new_empty(frame if needs_v else 0)
    return x.new_empty(x.shape), grad_v, threshold.new_empty(threshold.shape if needs_threshold else 0)


@_encode_sum_op.register_fake
def _(x, threshold, definitions, numbers, T, spike_dtype, frame_weight, sum_scale):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=spike_dtype)


@_encode_sum_backward_op.register_fake
def _(x, threshold, grad, definitions, numbers, T, frame_weight, needs_threshold):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), threshold.new_empty(threshold.shape if needs_threshold else 0)


def _keep_multi_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, v, threshold, *rest = inputs
    ctx.save_for_backward(x, v, threshold)
    ctx.rest = rest


def _differentiate_multi_step(
    ctx: Any, grad_spikes: torch.Tensor | None, grad_v_last: torch.Tensor | None
) -> tuple[Any, ...]:
    x, v, threshold = ctx.saved_tensors
    definitions, numbers, T, spike_dtype, start, started, keep_state = ctx.rest
    _, needs_v, needs_threshold, *_ = ctx.needs_input_grad
    if spike_dtype != x.dtype:
        grad_spikes = None
    operator = _MultiStepGradient.apply if _is_transformed() else _multi_step_backward_op
    grad_x, grad_v, grad_threshold = operator(
        x, v, threshold, grad_spikes, grad_v_last if keep_state else None,
        definitions, numbers, T, start, started, needs_v, needs_threshold,
    )  # fmt: skip
    return grad_x, grad_v if needs_v else None, grad_threshold if needs_threshold else None, *(None for _ in ctx.rest)


def _keep_encode_sum(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, threshold, *rest = inputs
    ctx.save_for_backward(x, threshold)
    ctx.rest = rest


def _differentiate_encode_sum(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, threshold = ctx.saved_tensors
    definitions, numbers, T, _, frame_weight, _ = ctx.rest
    needs_threshold = ctx.needs_input_grad[1]
    operator = _EncodeSumGradient.apply if _is_transformed() else _encode_sum_backward_op
    grad_x, grad_threshold = operator(x, threshold, grad, definitions, numbers, T, frame_weight, needs_threshold)
    return grad_x, grad_threshold if needs_threshold else None, *(None for _ in ctx.rest)


_multi_step_op.register_autograd(_differentiate_multi_step, setup_context=_keep_multi_step)
_encode_sum_op.register_autograd(_differentiate_encode_sum, setup_context=_keep_encode_sum)


# Under several of torch.func's transforms, PyTorch takes no autograd rule of an operator, but one of a Function.


class _MultiStepTransformed(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda *arguments: _multi_step_op(*arguments))
    setup_context = staticmethod(_keep_multi_step)
    backward = staticmethod(_differentiate_multi_step)


class _EncodeSumTransformed(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda *arguments: _encode_sum_op(*arguments))
    setup_context = staticmethod(_keep_encode_sum)
    backward = staticmethod(_differentiate_encode_sum)


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise SpikelmError("the kernels have no second derivative; use backend='torch'")


class _MultiStepGradient(_Gradient):
    forward = staticmethod(lambda *arguments: _multi_step_backward_op(*arguments))


class _EncodeSumGradient(_Gradient):
    forward = staticmethod(lambda *arguments: _encode_sum_backward_op(*arguments))
