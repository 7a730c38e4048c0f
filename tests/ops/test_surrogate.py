"""The step that every neuron fires with: where it fires, and whose gradient it has."""

import math
from collections.abc import Callable

import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate

from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel, kernel_of
from spikelm.ops.surrogate import heaviside, kernel_surrogate
from tests.kernel_cases import Steps


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


# ---- which have a kernel

HAVE = ("ATan", "Sigmoid", "SoftSign", "SuperSpike", "PiecewiseQuadratic", "PiecewiseExp", "Erf", "Rect")
OF_SPIKINGJELLY = [name for name in HAVE if hasattr(surrogate, name)]  # the older release has no SuperSpike and Rect
OF_SNNTORCH = ["atan", "sigmoid", "fast_sigmoid"]
KNOWN = {
    f"{name}-{alpha}": getattr(surrogate, name)(alpha=alpha) for name in OF_SPIKINGJELLY for alpha in (0.3, 1.0, 5)
}
# snnTorch multiplies its slope in float32.
KNOWN |= {
    f"{name}-{slope}": getattr(snntorch.surrogate, name)(slope) for name in OF_SNNTORCH for slope in (0.25, 2, 25)
}
KNOWN["straight_through_estimator"] = snntorch.surrogate.straight_through_estimator()


@pytest.mark.parametrize("function", KNOWN.values(), ids=KNOWN)
def test_the_kernels_derivative_is_the_surrogates(function: Callable) -> None:
    """The formula of steps.cuh, with the shape and the numbers given to it, against autograd of the real one."""
    kernel = kernel_of(Dynamics("binary", function))
    assert isinstance(kernel, Kernel)
    corners = [sign * corner for sign in (1, -1) for corner in (0.0, 0.1, 0.2, 0.5, 1.0, 5 / 3, 10 / 3, 40.0)]
    x = torch.cat([torch.linspace(-6, 6, 2001), torch.tensor(corners)]).double().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    found = Steps(kernel, x.detach()).derivative(x.detach())
    overflown = expected.isnan()  # snnTorch's sigmoid far below the threshold, where its exp is infinite
    assert not overflown.any() or bool((x[overflown] * 25 < -700).all())
    torch.testing.assert_close(found[~overflown], expected[~overflown], rtol=1e-12, atol=1e-15)


def test_the_shapes() -> None:
    assert kernel_surrogate(surrogate.ATan(alpha=2.0)) == ("ATAN", 1.0, math.pi)
    assert kernel_surrogate(snntorch.surrogate.fast_sigmoid(slope=25)) == ("INVERSE_SQUARE", 1.0, 25.0)
    shapes = {name.split("-")[0]: found[0] for name, function in KNOWN.items() if (found := kernel_surrogate(function))}
    assert shapes == {
        "ATan": "ATAN",
        "Sigmoid": "SIGMOID",
        "SoftSign": "INVERSE_SQUARE",
        "PiecewiseQuadratic": "TRIANGLE",
        "PiecewiseExp": "EXPONENTIAL",
        "Erf": "GAUSSIAN",
        "atan": "ATAN",
        "sigmoid": "SIGMOID",
        "fast_sigmoid": "INVERSE_SQUARE",
        "straight_through_estimator": "RECTANGLE",
    } | {
        name: shape
        for name, shape in (("SuperSpike", "INVERSE_SQUARE"), ("Rect", "RECTANGLE"))
        if name in OF_SPIKINGJELLY
    }


def test_every_number_is_a_float() -> None:
    """Whatever the parameter was; the kernel's arguments are doubles."""
    for function in KNOWN.values():
        found = kernel_surrogate(function)
        assert found is not None
        assert [type(number) for number in found[1:]] == [float, float]


class Subclass(surrogate.ATan):
    """May have another derivative."""


class Stranger(torch.nn.Module):
    """Has the name and the parameters of a known class only."""

    spiking, alpha = True, 2.0


Stranger.__name__ = "ATan"


def own_closure(slope: float) -> Callable:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return slope * x

    return inner


def disguised(name: str, *cells: object) -> Callable:
    """A function that calls itself one of snnTorch's, closing over ``cells``."""
    first, *rest = cells or (None,)

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * bool(first) if not rest else x * len((first, rest))

    inner.__qualname__, inner.__module__ = f"{name}.<locals>.inner", "snntorch.surrogate"
    return inner


def with_alpha(alpha: object) -> torch.nn.Module:
    function = surrogate.ATan(alpha=2.0)
    function.alpha = alpha
    return function


UNKNOWN = {
    "None": None,
    "a function": identity,
    "one's own closure": own_closure(25.0),
    "a subclass": Subclass(alpha=2.0),
    "a class of the same name": Stranger(),
    "a primitive": surrogate.ATan(alpha=2.0, spiking=False),
    "a tensor": with_alpha(torch.tensor(2.0)),
    "a parameter": with_alpha(torch.nn.Parameter(torch.tensor(2.0))),
    "a flag": with_alpha(True),
    "zero": with_alpha(0.0),
    "a negative number": with_alpha(-1.0),
    "infinity": with_alpha(math.inf),
    "NaN": with_alpha(math.nan),
    "no number": with_alpha("2"),
    "a slope that is a tensor": snntorch.surrogate.atan(alpha=torch.tensor(2.0)),
    "a slope that is a flag": snntorch.surrogate.atan(alpha=True),
    "a negative slope": snntorch.surrogate.fast_sigmoid(slope=-25),
    "two cells": disguised("atan", 1.0, 2.0),
    "another of snnTorch's": disguised("something_new", 1.0),
}
UNKNOWN |= {
    name: getattr(surrogate, name)()
    for name in ("NonzeroSignLogAbs", "PiecewiseLeakyReLU", "SquarewaveFourierSeries", "S2NN", "QPseudoSpike",
                 "LeakyKReLU", "FakeNumericalGradient", "LogTailedReLU", "DeterministicPass", "PoissonPass")
    if hasattr(surrogate, name)
}  # fmt: skip
UNKNOWN |= {
    name: getattr(snntorch.surrogate, name)() for name in ("triangular", "spike_rate_escape", "LSO", "SFS", "SSO")
}


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN)
def test_all_others_have_none(function: object) -> None:
    assert kernel_surrogate(function) is None


def test_every_class_of_spikingjelly_is_in_one_of_the_lists() -> None:
    """A new one is looked at once before it is left to the reference."""
    bases = {"SurrogateFunctionBase", "MultiArgsSurrogateFunctionBase", "MultiLevelSpikeCount"}  # the last is refused
    classes = {
        name
        for name, found in vars(surrogate).items()
        if isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__ == surrogate.__name__
    }
    assert classes - bases == set(OF_SPIKINGJELLY) | (set(UNKNOWN) & classes)


def test_it_looks_at_the_surrogate_as_it_is_now() -> None:
    function = surrogate.ATan(alpha=2.0)
    function.set_spiking_mode(False)
    assert kernel_surrogate(function) is None
    function.set_spiking_mode(True)
    function.alpha = 4.0
    assert kernel_surrogate(function) == ("ATAN", 2.0, 2 * math.pi)
