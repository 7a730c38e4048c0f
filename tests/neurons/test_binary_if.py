"""What is BinaryIF's alone: three resets, the first membrane, and every surrogate of SpikingJelly and snnTorch."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate

from spikelm.errors import SpikelmError
from spikelm.neurons import BinaryIF
from spikelm.ops.dynamics import Dynamics
from tests.kernel_cases import build_together


def slow_loop(
    x_seq: torch.Tensor, V: float, beta: float, v_reset: float | None, reset_delay: bool
) -> tuple[list[float], list[float]]:
    """(spikes, membranes after each step) of one neuron's inputs [T], number by number."""
    v, s, spikes, membranes = v_reset or 0.0, 0.0, [], []
    for x in x_seq.tolist():
        h = beta * v + x
        if reset_delay:
            h -= s * V
        s = float(h >= V)
        if v_reset is not None:
            v = v_reset if s else h
        else:
            v = h if reset_delay else h - s * V
        spikes.append(s)
        membranes.append(v)
    return spikes, membranes


@pytest.mark.parametrize(
    ("v_reset", "reset_delay"), [(None, False), (None, True), (0.0, False), (0.35, False), (-0.5, False)]
)
@pytest.mark.parametrize("beta", [1.0, 0.9, 0.4])
@pytest.mark.parametrize("V", [1.0, 0.7])
def test_against_a_slow_loop(V: float, beta: float, v_reset: float | None, reset_delay: bool) -> None:
    x_seq = torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    neuron = BinaryIF(beta, V, v_reset, reset_delay, step_mode="m", store_v_seq=True)
    spikes = neuron(x_seq)
    assert 0.05 < float(spikes.mean()) < 0.6
    for n in range(30):
        slow_spikes, membranes = slow_loop(x_seq[:, n], V, beta, v_reset, reset_delay)
        assert spikes[:, n].tolist() == slow_spikes
        assert neuron.v_seq[:, n].tolist() == membranes


def test_the_three_resets_by_hand() -> None:
    x_seq = torch.tensor([[1.5], [0.25], [0.5]])
    for arguments, spikes, membranes in (
        ({}, [1, 0, 0], [0.5, 0.5, 0.75]),  # .5; .25 + .25; .25 + .5
        ({"reset_delay": True}, [1, 0, 0], [1.5, 0.0, 0.5]),  # .75 + .25 - 1; 0 + .5
        ({"v_reset": 0.25}, [1, 0, 0], [0.25, 0.375, 0.6875]),  # .125 + .25; .1875 + .5
    ):
        neuron = BinaryIF(beta=0.5, step_mode="m", store_v_seq=True, **arguments)
        assert neuron(x_seq).flatten().tolist() == spikes
        assert neuron.v_seq.flatten().tolist() == membranes


def test_the_first_membrane_is_v_reset() -> None:
    neuron = BinaryIF(beta=0.5, v_reset=-0.5)
    for _ in range(2):
        assert neuron.v == -0.5
        assert neuron(torch.tensor([1.24, 1.25])).tolist() == [0, 1]
        neuron.reset()
    assert BinaryIF().v == BinaryIF(reset_delay=True).v == 0.0


# The surrogates are found in the libraries: one that a later release adds is tested too.

SPIKINGJELLY = {
    name: found
    for name, found in inspect.getmembers(surrogate, inspect.isclass)
    if issubclass(found, torch.nn.Module) and found.__module__ == surrogate.__name__ and not name.endswith("Base")
}
NO_STEP = {
    "MultiLevelSpikeCount": "counts spikes: round(clamp(x, 0, max_spike_count))",
    "PoissonPass": "draws a spike with probability x, which it wants within [0, 1]",
}
SNNTORCH = {
    name: found
    for name, found in inspect.getmembers(snntorch.surrogate, inspect.isfunction)
    if found.__module__ == snntorch.surrogate.__name__
}
BROKEN = {"LSO": "snnTorch 1.0.0 calls its function of three arguments with two"}
RANDOM = ("SSO",)


def fast_sigmoid_by_hand(x: torch.Tensor, gradient: torch.Tensor, spikes: torch.Tensor) -> torch.Tensor:
    return gradient / (1 + 5 * x.abs()) ** 2


def make(name: str) -> Callable:
    """A surrogate with its default parameters."""
    if name in SPIKINGJELLY:
        return SPIKINGJELLY[name]()
    return SNNTORCH[name](*[fast_sigmoid_by_hand] * (name == "custom_surrogate"))


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The kernels of the tests of every surrogate in every type."""

    def called(one: dict[str, Any]) -> tuple[Dynamics, torch.dtype] | None:
        both = {"name", "dtype"} <= one.keys()
        return (BinaryIF(surrogate_function=make(one["name"])).dynamics, one["dtype"]) if both else None

    build_together(request, called)


STEPS = [*(name for name in SPIKINGJELLY if name not in NO_STEP), *(name for name in SNNTORCH if name not in BROKEN)]


def test_the_libraries_have_the_surrogates_that_are_known() -> None:
    """What the introspection finds, so that it cannot come to find nothing."""
    of_both_versions = "ATan Erf LeakyKReLU LogTailedReLU NonzeroSignLogAbs PiecewiseExp PiecewiseLeakyReLU "
    of_both_versions += "PiecewiseQuadratic QPseudoSpike S2NN Sigmoid SoftSign SquarewaveFourierSeries"
    assert set(of_both_versions.split()) < set(SPIKINGJELLY)
    assert set(SNNTORCH) >= set(
        "LSO SFS SSO atan custom_surrogate fast_sigmoid heaviside sigmoid spike_rate_escape "
        "straight_through_estimator triangular".split()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_every_surrogate_fires_from_the_threshold_on(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, 0.0, 0.25, 0.49, 0.5, 0.51, 1.0, 3.0]).to(dtype)
    neuron = BinaryIF(v_threshold=0.5, surrogate_function=make(name))
    spikes = neuron(x)
    assert spikes.dtype == dtype
    assert spikes.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert neuron.v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    nan = torch.tensor([math.nan], dtype=dtype)
    neuron.reset()
    assert neuron(nan).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_every_surrogate_gives_its_own_gradient(name: str, dtype: torch.dtype) -> None:
    """ds/dh = g(h / V - 1) / V, with g what the surrogate itself gives."""
    V, function = 0.5, make(name)
    x = torch.randn(100, dtype=dtype, generator=torch.Generator().manual_seed(3)).requires_grad_()
    at = (x.detach() / V - 1).requires_grad_()
    torch.manual_seed(0)
    try:
        (own,) = torch.autograd.grad(function(at).sum(), at)
    except RuntimeError as error:  # it hands a tuple to its own formula
        assert (name, hasattr(surrogate, "Rect")) == ("NonzeroSignLogAbs", False)
        pytest.skip(f"SpikingJelly 0.0.0.0.14 cannot differentiate its {name}: {str(error).splitlines()[0]}")
    torch.manual_seed(0)
    (ours,) = torch.autograd.grad(BinaryIF(v_threshold=V, surrogate_function=function)(x).sum(), x)
    assert ours.dtype == dtype
    assert float(own.nan_to_num().abs().max()) > 0
    known = own.isfinite()  # snnTorch's sigmoid overflows to NaN at its default slope, from h = -0.8 V down in float32
    assert bool(known.all()) or name == "sigmoid"
    assert bool(ours.isfinite().all())
    torch.testing.assert_close(ours[known], own[known] / V)


@pytest.mark.parametrize("name", ["ATan", "Sigmoid", "atan", "fast_sigmoid", "custom_surrogate"])
def test_surrogates_in_all_resets_over_time(name: str) -> None:
    """The gradient through time needs the same derivative in the reset: against the step written out."""
    function, beta = make(name), 0.8
    x_seq = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    weights = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def step(h: torch.Tensor) -> torch.Tensor:
        spikes = function(h - 1)
        return spikes.double() + ((h >= 1).double() - spikes).detach()

    for reset in ("soft", "soft_delayed", "hard"):
        v, s, outputs = torch.full((20,), 0.25 if reset == "hard" else 0.0, dtype=torch.float64), 0.0, []
        for x in x_seq:
            h = beta * v + x - (s if reset == "soft_delayed" else 0.0)
            s = step(h)
            v = {"soft": h - s, "soft_delayed": h, "hard": (1 - s) * h + s * 0.25}[reset]
            outputs.append(s)
        expected = torch.stack(outputs)
        neuron = BinaryIF(
            beta,
            v_reset=0.25 if reset == "hard" else None,
            reset_delay=reset == "soft_delayed",
            surrogate_function=function,
            step_mode="m",
        )
        spikes = neuron(x_seq)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(
            torch.autograd.grad((spikes * weights).sum(), x_seq), torch.autograd.grad((expected * weights).sum(), x_seq)
        )


@pytest.mark.parametrize("name", RANDOM)
def test_random_surrogates_have_random_gradients_and_certain_spikes(name: str) -> None:
    neuron, x = BinaryIF(surrogate_function=make(name)), torch.full((50,), 0.3, requires_grad=True)
    gradients = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        neuron.reset()
        spikes = neuron(x)
        assert not bool(spikes.any())
        gradients.append(torch.autograd.grad(spikes.sum(), x)[0])
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("spiking", [True, False])
def test_a_primitive_takes_the_place_of_the_step(spiking: bool) -> None:
    function = surrogate.Sigmoid(alpha=4.0, spiking=spiking)
    x = torch.tensor([0.2, 0.5, 0.9])
    expected = torch.sigmoid(4 * (x / 0.5 - 1)) if not spiking else torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(BinaryIF(v_threshold=0.5, surrogate_function=function)(x), expected)


@pytest.mark.parametrize("most", [1, 4])
def test_surrogates_that_count_are_refused(most: int) -> None:
    if "MultiLevelSpikeCount" not in SPIKINGJELLY:
        pytest.skip("this SpikingJelly has no MultiLevelSpikeCount; it came with 2.0.0")
    with pytest.raises(SpikelmError, match="surrogate_function must stand for a step from 0 to 1; .*counts spikes"):
        BinaryIF(surrogate_function=surrogate.MultiLevelSpikeCount(most))


def test_a_surrogate_that_draws_spikes_is_refused() -> None:
    if "PoissonPass" not in SPIKINGJELLY:
        pytest.skip("this SpikingJelly has no PoissonPass; it came with 2.0.0")
    with pytest.raises(SpikelmError, match="draws at random"):
        BinaryIF(surrogate_function=surrogate.PoissonPass())


@pytest.mark.parametrize("name", BROKEN)
def test_snntorchs_broken_surrogates_fail_aloud(name: str) -> None:
    with pytest.raises(TypeError):
        make(name)(torch.zeros(1))
    with pytest.raises(TypeError):
        BinaryIF(surrogate_function=make(name))(torch.zeros(1))
