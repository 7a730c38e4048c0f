"""The step that every neuron fires with: where it fires, and whose gradient it has."""

import math
from collections.abc import Callable

import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate

from spikelm.ops.surrogate import atan_derivative, derivative_of, heaviside


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


FUNCTIONS = {
    "spikingjelly": surrogate.Sigmoid(alpha=4.0),
    "snntorch": snntorch.surrogate.fast_sigmoid(slope=5),
    "any callable": identity,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_fires_at_zero_and_above(function: Callable, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    x = torch.tensor([-1.0, -least, -0.0, 0.0, least, 1.0], dtype=dtype)
    spikes = heaviside(x, function)
    assert spikes.dtype == dtype
    assert spikes.tolist() == [0, 0, 1, 1, 1, 1]


@every_function
def test_special_values(function: Callable) -> None:
    spikes = heaviside(torch.tensor([math.nan, math.inf, -math.inf]), function)
    assert spikes.tolist() == [0, 1, 0]


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_the_functions(function: Callable, dtype: torch.dtype) -> None:
    x = torch.randn(100, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(100, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (own,) = torch.autograd.grad((function(x) * weights).sum(), x)
    (gradient,) = torch.autograd.grad((heaviside(x, function) * weights).sum(), x)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, own)


def test_snntorchs_gradient_is_not_cut_to_float32() -> None:
    """snnTorch returns float32 spikes; the derivative itself is taken at the float64 membrane."""
    x = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(heaviside(x, FUNCTIONS["snntorch"]).sum(), x)
    assert abs(float(gradient) - 1 / 1.5**2) < 1e-15


@pytest.mark.parametrize("function", [surrogate.ATan(alpha=2.0), surrogate.Sigmoid(alpha=4.0)], ids=["ATan", "Sigmoid"])
def test_a_primitive_is_returned_as_it_is(function: torch.nn.Module) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    function.set_spiking_mode(False)
    try:
        values = heaviside(x, function)
        assert torch.equal(values, function(x))
    finally:
        function.set_spiking_mode(True)
    assert len(values.unique()) == 9
    assert set(heaviside(x, function).tolist()) == {0.0, 1.0}


def test_a_callable_that_is_large_leaves_the_spikes_whole() -> None:
    """Only its gradient is taken: value - value.detach() is 0, not a rounding error."""
    x = torch.tensor([-3.7e7, 3.7e7], requires_grad=True)
    spikes = heaviside(x, lambda x: 1e6 * x)
    assert spikes.tolist() == [0, 1]
    assert torch.autograd.grad(spikes.sum(), x)[0].tolist() == [1e6, 1e6]


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_the_closed_derivative_of_atan(alpha: float) -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    primitive = surrogate.ATan(alpha=alpha, spiking=False)
    (slope,) = torch.autograd.grad(primitive(x).sum(), x)
    torch.testing.assert_close(atan_derivative(x.detach(), alpha), slope)
    torch.testing.assert_close(derivative_of(surrogate.ATan(alpha=alpha))(x.detach()), slope)
    assert torch.equal(x.detach(), before)  # out of place


def test_only_the_class_itself_has_a_closed_derivative() -> None:
    class Other(surrogate.ATan):
        """May have another derivative."""

    for function in (Other(alpha=2.0), surrogate.ATan(alpha=2.0, spiking=False), snntorch.surrogate.atan(), None):
        assert derivative_of(function) is None
