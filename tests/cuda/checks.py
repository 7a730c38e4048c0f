"""What the CUDA kernels must compute for a case of tests/kernel_cases.py: on the shim and on a GPU alike."""

from dataclasses import dataclass

import torch

from spikelm.cuda import launch
from spikelm.ops import reference
from tests.kernel_cases import (
    Case,
    Inputs,
    autograd,
    draw,
    dynamics,
    is_exact,
    kernel_for,
    transcribe,
    transcribe_sum,
    weights,
)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Outputs:
    """Everything that the sequence kernels return for a case."""

    spikes: torch.Tensor
    v_last: torch.Tensor
    grad_x: torch.Tensor
    grad_v: torch.Tensor
    grad_threshold: torch.Tensor

    def equal(self, other: "Outputs") -> bool:
        return all(bits_equal(mine, getattr(other, name)) for name, mine in vars(self).items())


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values of one type, NaN to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def run(case: Case, device: str = "cpu", spike_dtype: torch.dtype | None = None) -> Outputs:
    """The kernels' results, on the CPU."""
    inputs, kernel = draw(case, device), kernel_for(case)
    spikes, v_last = launch.forward(
        kernel, inputs.x, inputs.v, inputs.threshold, case.T, spike_dtype or case.dtype, case.start, case.started, True
    )
    grads = launch.backward(
        kernel, inputs.x, inputs.v, inputs.threshold, case.T, inputs.grad_spikes, inputs.grad_v_last,
        case.start, case.started, True, True,
    )  # fmt: skip
    results = [tensor.cpu() for tensor in (spikes, v_last, *grads) if tensor is not None]
    return Outputs(*results)


def check(case: Case, device: str = "cpu", spike_dtype: torch.dtype | None = None) -> None:
    """The forward bit for bit as in the reference; the gradients bit for bit as in steps.cuh written in torch, and
    to rounding as autograd's (whose products make NaN of infinite input)."""
    inputs, outputs = draw(case), run(case, device, spike_dtype)
    by_autograd, same_order = autograd(case, inputs), transcribe(case, inputs)
    assert bits_equal(outputs.spikes, by_autograd.spikes.to(spike_dtype or case.dtype))
    assert bits_equal(outputs.v_last, by_autograd.v_last)
    if is_exact(kernel_for(case)):
        assert bits_equal(outputs.grad_x, same_order.grad_x.to(case.dtype))
        assert bits_equal(outputs.grad_v, same_order.grad_v)
    close_sums(outputs.grad_threshold, same_order.grad_threshold, case)
    expected = same_order if case.special else by_autograd
    close(outputs.grad_x, expected.grad_x)
    close(outputs.grad_v, expected.grad_v)
    close(outputs.grad_threshold, expected.grad_threshold.double().sum_to_size(case.threshold))


def check_sum(case: Case, frame_weight: float, device: str = "cpu") -> None:
    """The sum of a case whose input enters once, in its type and in int8, and its gradients."""
    inputs, kernel = draw_sum(case), kernel_for(case)
    x, _, threshold, grad_spikes, _ = draw_sum(case, device)
    total = torch.zeros_like(inputs.threshold)
    factors = weights(frame_weight, case.T, total)
    frames = reference.encode(inputs.x.to(total.dtype), inputs.threshold, case.dynamics, case.T)
    for weight, frame in zip(factors, frames, strict=True):
        total = total + weight * frame
    found = launch.forward_sum(kernel, x, threshold, case.T, case.dtype, frame_weight, 1.0)
    assert bits_equal(found.cpu(), total.to(case.dtype))
    if case.T <= 4:  # fits
        scale = frame_weight ** (1 - case.T)
        found = launch.forward_sum(kernel, x, threshold, case.T, torch.int8, frame_weight, scale)
        assert bits_equal(found.cpu(), (total * scale).to(torch.int8))
    expected_x, shares = transcribe_sum(case, inputs, frame_weight)
    grad_x, grad_threshold = launch.backward_sum(kernel, x, threshold, case.T, grad_spikes[0], frame_weight, True)
    assert grad_threshold is not None
    if is_exact(kernel):
        assert bits_equal(grad_x.cpu(), expected_x.to(case.dtype))
    close(grad_x.cpu(), expected_x)
    close_sums(grad_threshold.cpu(), shares, case)


def draw_sum(case: Case, device: str = "cpu") -> Inputs:
    """The inputs of a case, x one frame: it enters once, whatever the kernel does with a sequence."""
    inputs = draw(case, device)
    return inputs if case.dynamics.inject == "first" else inputs._replace(x=inputs.x[0])


def check_rounding(dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradient of x, which is that of v here, rounds to 16 bits as torch does: ties, NaN and the largest too."""
    bits = torch.arange(-(2**31), 2**31, 2**12 - 1).to(torch.int32)
    ties = bits & ~0x1FFF | 0x1000 if dtype == torch.float16 else bits & ~0xFFFF | 0x8000
    numbers = torch.cat([bits, ties]).view(torch.float32)
    case = Case(dynamics("ternary", "soft", "TRIANGLE", detach=True), dtype, 1, tuple(numbers.shape))
    x, threshold = torch.zeros(1, *numbers.shape, dtype=dtype, device=device), torch.ones((), device=device)
    rounded, _, _ = launch.backward(
        kernel_for(case), x, None, threshold, 1, None, numbers.to(device), 0.0, False, False, False
    )
    assert bits_equal(rounded.cpu()[0], numbers.to(dtype))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    scale = max(1.0, expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item())
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def close_sums(found: torch.Tensor, shares: torch.Tensor, case: Case) -> None:
    """``found`` is the sum of the shares, added in double and rounded once; the shares differ where exp does."""
    expected = shares.double().sum_to_size(case.threshold)
    magnitude = shares.double().abs().nan_to_num(0.0, 0.0, 0.0).sum().item()
    single = found.dtype == torch.float32
    rtol, of_magnitude = 6e-8 if single else 1e-13, 1e-13 if is_exact(kernel_for(case)) or not single else 1e-7
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=of_magnitude * magnitude, equal_nan=True)
