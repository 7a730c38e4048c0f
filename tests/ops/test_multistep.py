"""The hand-written encode_sum against the reference's autograd."""

from contextlib import nullcontext

import pytest
import torch
from spikingjelly.activation_based import surrogate

from spikelm import errors
from spikelm.errors import SpikelmWarning
from spikelm.ops import multistep, reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.multistep import encode_sum
from spikelm.ops.surrogate import derivative_of


def by_reference(
    x: torch.Tensor, threshold: torch.Tensor, dynamics: Dynamics, T: int, frame_weight: float
) -> torch.Tensor:
    frames = reference.encode(x, threshold, dynamics, T)
    return sum((frame * frame_weight**t for t, frame in enumerate(frames)), torch.zeros_like(x))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("frame_weight", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("T", [1, 4])
def test_hand_gradient_equals_autograd(
    T: int, tau: float, frame_weight: float, detach_reset: bool, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(T)
    dynamics = Dynamics("ternary", surrogate.ATan(alpha=2.0), 1 / tau, inject="first", detach_reset=detach_reset)
    weights = torch.randn(6, 7, 5, dtype=torch.float64, generator=generator)
    data = 3 * torch.randn(6, 7, 5, dtype=torch.float64, generator=generator)
    a = torch.linspace(-1, 1, 5, dtype=torch.float64) if per_channel else torch.tensor(0.2, dtype=torch.float64)
    results = []
    for function in (encode_sum, by_reference):
        x, log_threshold = data.clone().requires_grad_(), a.clone().requires_grad_()
        y = function(x, log_threshold.exp(), dynamics, T, frame_weight)
        (y * weights).sum().backward()
        results.append((y.detach(), x.grad, log_threshold.grad))
    for ours, theirs in zip(*results, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_the_asked_gradients() -> None:
    dynamics = Dynamics("ternary", surrogate.ATan(alpha=2.0))
    for x_grad, threshold_grad in ((True, False), (False, True)):
        x = torch.randn(4, 3).requires_grad_(x_grad)
        threshold = torch.ones(3).requires_grad_(threshold_grad)
        encode_sum(x, threshold, dynamics, 3, 1.0).sum().backward()
        assert (x.grad is not None) == x_grad
        assert (threshold.grad is not None) == threshold_grad


def test_gradients_come_in_the_dtype_of_the_input() -> None:
    x = (2 * torch.randn(50, 3)).bfloat16().requires_grad_()
    threshold = torch.ones(3, requires_grad=True)
    encode_sum(x, threshold, Dynamics("ternary", surrogate.ATan(alpha=2.0)), 4, 1.0).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert threshold.grad.dtype == torch.float32
    exact = x.detach().float().requires_grad_()
    encode_sum(exact, threshold, Dynamics("ternary", surrogate.ATan(alpha=2.0)), 4, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad.bfloat16())


def test_which_surrogates_have_a_hand_derivative() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    for alpha in (0.5, 2.0, 5.0):
        function = surrogate.ATan(alpha=alpha)
        (expected,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(derivative_of(function)(x.detach()), expected)
    assert derivative_of(surrogate.ATan(alpha=2.0, spiking=False)) is None
    assert derivative_of(surrogate.Sigmoid()) is None
    assert derivative_of(lambda x: x) is None


@pytest.mark.parametrize("function", [surrogate.Sigmoid(alpha=3.0), surrogate.ATan(alpha=2.0, spiking=False)])
def test_other_surrogates_take_the_reference(monkeypatch: pytest.MonkeyPatch, function: torch.nn.Module) -> None:
    monkeypatch.setattr(multistep, "_TernaryEncodeSum", None)  # using it would be an error
    x = (2 * torch.randn(20, 3, dtype=torch.float64)).requires_grad_()
    threshold = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    dynamics = Dynamics("ternary", function, 0.5)
    monkeypatch.setattr(errors, "_SAID", set())
    said = pytest.warns(SpikelmWarning, match="no kernel for this surrogate") if function.spiking else nullcontext()
    with said:  # and the second call says nothing: a warning is an error here
        ours = encode_sum(x, threshold, dynamics, 4, 0.5)
    ours = encode_sum(x, threshold, dynamics, 4, 0.5)
    theirs = by_reference(x, threshold, dynamics, 4, 0.5)
    assert torch.equal(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), [x, threshold]), torch.autograd.grad(theirs.sum(), [x, threshold]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_smooth_primitive_is_smooth_without_gradients_too() -> None:
    """What is computed must not depend on whether a gradient is wanted."""
    dynamics = Dynamics("ternary", surrogate.ATan(alpha=2.0, spiking=False))
    x, threshold = torch.randn(20, 3, requires_grad=True), torch.ones(3)
    with torch.no_grad():
        without = encode_sum(x, threshold, dynamics, 3, 1.0)
    torch.testing.assert_close(without, encode_sum(x, threshold, dynamics, 3, 1.0).detach())


def test_the_input_is_left_as_it_was() -> None:
    x = 3 * torch.randn(20, 4)
    before = x.clone()
    encode_sum(x, torch.ones(4), Dynamics("ternary", surrogate.ATan(alpha=2.0), 2.0), 4, 0.5)
    assert torch.equal(x, before)


def test_non_contiguous_input() -> None:
    x = (3 * torch.randn(4, 20)).T.requires_grad_()
    dynamics = Dynamics("ternary", surrogate.ATan(alpha=2.0))
    one = encode_sum(x, torch.ones(4), dynamics, 4, 1.0)
    other = encode_sum(x.contiguous(), torch.ones(4), dynamics, 4, 1.0)
    assert torch.equal(one, other)
