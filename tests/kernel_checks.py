"""The comparison of kernels with what they must compute, for every backend that has cpu/launch.py's functions.

The forward is the reference's, bit for bit. The backward is close to autograd of the reference, and equal bit for bit
to the transcription of cuda/steps.cuh where the surrogate needs no exp. In 16 bit both hold for the float32 results of
the upcast inputs, rounded once. Every function here raises AssertionError.
"""

from typing import Any

import torch

from spikelm.ops import reference
from tests.kernel_cases import (
    Case,
    Inputs,
    Results,
    autograd,
    draw,
    is_exact,
    kernel_for,
    transcribe,
    transcribe_sum,
    weights,
)


def changed(text: str, old: str, new: str) -> str:
    """A source with the one place that reads ``old`` changed."""
    assert text.count(old) == 1, f"{text.count(old)} places read {old!r}; the change has to be written anew"
    return text.replace(old, new)


def equal(name: str, found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """The same type, shape and values, NaN for NaN."""
    assert found is not None, f"{name} is missing"
    assert found.dtype == expected.dtype, f"{name}: {found.dtype} instead of {expected.dtype}"
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    differs = (found != expected) & ~(found.isnan() & expected.isnan())
    if differs.any():
        where = differs.nonzero()[0].tolist()
        values = f"{found[tuple(where)].item()!r} instead of {expected[tuple(where)].item()!r}"
        raise AssertionError(f"{name}: {int(differs.sum())} of {differs.numel()} differ, first at {where}: {values}")


def close(name: str, found: torch.Tensor | None, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` times the largest finite value expected (and 1); NaN and infinities in the same places."""
    assert found is not None, f"{name} is missing"
    largest = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    absolute = tolerance * max(1.0, largest)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=absolute, equal_nan=True, msg=lambda message: f"{name}: {message}"
    )


def check_gradient(
    name: str, found: torch.Tensor | None, expected: torch.Tensor, exact: bool, by_autograd: torch.Tensor | None
) -> None:
    """``found`` in its storage type against results in the state's type."""
    assert found is not None, f"{name} is missing"
    state = expected.dtype
    tolerance = 2e-12 if state == torch.float64 else 6e-6
    unit = 0.0 if found.dtype == state else torch.finfo(found.dtype).eps
    if exact:
        equal(name, found, expected.to(found.dtype))
    else:
        close(name, found.to(state), expected, tolerance + unit)
    if by_autograd is not None:
        close(f"{name} by autograd", found.to(state), by_autograd, tolerance + unit)


def check_thresholds(
    name: str,
    found: torch.Tensor | None,
    inputs: Inputs,
    shares: torch.Tensor,
    exact: bool,
    by_autograd: Results | None,
) -> None:
    """The threshold's gradient: the shares summed in float64 and rounded once; equal where nothing is summed."""
    like = inputs.threshold
    assert found is not None, f"{name} is missing"
    assert (found.shape, found.dtype) == (like.shape, like.dtype), f"{name}: {found.dtype} {tuple(found.shape)}"
    total, size = (part.double().sum_to_size(like.shape) for part in (shares, shares.abs()))
    if exact and like.numel() == shares.numel():
        equal(name, found, total.to(like.dtype))
    elif exact:
        bound = torch.finfo(like.dtype).eps * total.abs() + 1e-13 * size
        error = (found.double() - total).abs()
        assert bool(((error <= bound) | (found.isnan() & total.isnan())).all()), f"{name} is off by {error.max():.3g}"
    if by_autograd is not None:
        scale = size.max().clamp(min=1.0)
        total = by_autograd.grad_threshold.double().sum_to_size(like.shape)
        tolerance = 2e-12 if like.dtype == torch.float64 else 6e-6
        close(f"{name} by autograd", found.double() / scale, total / scale, tolerance)


def check_sequence(launch: Any, case: Case, device: str = "cpu", to_autograd: bool = True) -> None:
    """``launch.forward`` and ``launch.backward`` on a case: against the reference and the transcription.

    ``to_autograd=False`` leaves out the comparison with autograd's gradients, which NaN and infinities reach otherwise.
    """
    inputs, kernel = draw(case, device), kernel_for(case)
    by_autograd, expected, exact = autograd(case, inputs), transcribe(case, inputs), is_exact(kernel)
    before = inputs.x.clone(), inputs.grad_spikes.clone()
    spikes, v_last = launch.forward(
        kernel, inputs.x, inputs.v, inputs.threshold, case.T, case.dtype, case.start, case.started, True
    )
    equal("spikes", spikes, by_autograd.spikes.to(case.dtype))
    equal("v_last", v_last, by_autograd.v_last)
    grads = launch.backward(
        kernel, inputs.x, inputs.v, inputs.threshold, case.T, inputs.grad_spikes, inputs.grad_v_last, case.start,
        case.started, True, True,
    )  # fmt: skip
    others = by_autograd if to_autograd else None
    check_gradient("grad_x", grads[0], expected.grad_x, exact, others and others.grad_x)
    check_gradient("grad_v", grads[1], expected.grad_v, exact, others and others.grad_v)
    check_thresholds("grad_threshold", grads[2], inputs, expected.grad_threshold, exact, others)
    equal("x afterwards", inputs.x, before[0])
    equal("grad_spikes afterwards", inputs.grad_spikes, before[1])


def check_sum(launch: Any, case: Case, frame_weight: float, device: str = "cpu") -> None:
    """``launch.forward_sum`` and ``launch.backward_sum``: against the reference's frames and the transcription.

    The case injects first, so that its x is one frame, and has no state to start from.
    """
    inputs, kernel = draw(case, device), kernel_for(case)
    found = launch.forward_sum(kernel, inputs.x, inputs.threshold, case.T, case.dtype, frame_weight, 1.0)
    equal("sum", found, reference.encode_sum(inputs.x, inputs.threshold, case.dynamics, case.T, frame_weight))
    expected, shares = transcribe_sum(case, inputs, frame_weight)
    # To autograd, G's gradient in the sum is G * weight in each frame.
    G = inputs.grad_spikes[0].to(expected)
    factors = weights(frame_weight, case.T, G)
    upcast = inputs._replace(grad_spikes=torch.stack([G * factor for factor in factors]), grad_v_last=0 * G)
    by_autograd = autograd(case, upcast)
    grad_x, grad_threshold = launch.backward_sum(
        kernel, inputs.x, inputs.threshold, case.T, inputs.grad_spikes[0], frame_weight, needs_threshold=True
    )
    check_gradient("grad_x of the sum", grad_x, expected, is_exact(kernel), by_autograd.grad_x)
    check_thresholds("grad_threshold of the sum", grad_threshold, inputs, shares, is_exact(kernel), by_autograd)
