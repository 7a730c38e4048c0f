"""ATMN against the closed forms of its paper. The contract that it shares with the others: test_contract.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate

from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN

TAUS = st.floats(1.0, 4.0)
ANY_TAU = st.floats(0.3, 4.0)
THRESHOLDS = st.floats(0.05, 5.0)
STEPS = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def inputs(seed: int, threshold: float, count: int = 64) -> torch.Tensor:
    """Random float64 inputs of about the size of the threshold; ties have probability zero."""
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4 * threshold


def float64_neuron(**arguments: object) -> ATMN:
    return ATMN(**arguments).double()


def comparators(neuron: ATMN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sign(x) [|x| >= V sum_{i<=t} tau^i], whether no comparison is closer than rounding can decide)."""
    powers = torch.tensor([neuron.tau**t for t in range(neuron.T)], dtype=torch.float64)
    levels = (neuron.v_threshold * powers.cumsum(0))[:, None]
    clear = ((x.abs() - levels).abs() > 1e-9 * levels).all(0)
    return x.sign() * (x.abs() >= levels), clear


@given(TAUS, THRESHOLDS, STEPS, SEEDS)
def test_frames_are_ternary_comparators_for_tau_of_at_least_one(tau: float, V: float, T: int, seed: int) -> None:
    neuron, x = float64_neuron(tau=tau, v_threshold=V, T=T), inputs(seed, V)
    expected, clear = comparators(neuron, x)
    assert clear.sum() > 50
    assert torch.equal(neuron.encode(x)[:, clear], expected[:, clear])


@given(TAUS, THRESHOLDS, STEPS, SEEDS)
def test_spikes_are_a_prefix_of_one_sign_for_tau_of_at_least_one(tau: float, V: float, T: int, seed: int) -> None:
    neuron, x = float64_neuron(tau=tau, v_threshold=V, T=T), inputs(seed, V)
    _, clear = comparators(neuron, x)
    frames = neuron.encode(x)[:, clear]
    assert torch.equal(frames.abs().cummin(0).values, frames.abs())
    assert bool(((frames == 0) | (frames == x[clear].sign())).all())


def test_no_prefix_for_tau_below_one() -> None:
    neuron = float64_neuron(tau=0.5, T=4)
    x = torch.tensor([0.6, 1.1, -1.9], dtype=torch.float64)
    # 0.6 -> 1.2: spike at t = 1; 1.1: a spike, then .1 .2 .4 .8; -1.9: -.9 -> -1.8, -.8 -> -1.6, -.6 -> -1.2
    assert neuron.encode(x).T.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [-1, -1, -1, -1]]


@given(ANY_TAU, THRESHOLDS, STEPS, SEEDS)
def test_input_is_recovered_from_frames_and_last_membrane(tau: float, V: float, T: int, seed: int) -> None:
    neuron, x = float64_neuron(tau=tau, v_threshold=V, step_mode="m"), inputs(seed, V)
    frames = neuron(x.expand(T, -1))
    powers = torch.tensor([tau**t for t in range(T)], dtype=torch.float64)[:, None]
    recovered = neuron.v_threshold * (powers * frames).sum(0) + tau ** (T - 1) * neuron.v
    # the residual grows to (1 / tau)^T before tau^(T-1) shrinks it again: rounding is relative to the largest part
    scale = x.abs() + V * powers.sum()
    assert bool(((recovered - x).abs() < 1e-10 * scale).all())


@given(THRESHOLDS, STEPS, SEEDS)
def test_counts_for_tau_one(V: float, T: int, seed: int) -> None:
    neuron, x = float64_neuron(tau=1.0, v_threshold=V, T=T), inputs(seed, V)
    ratio = (x / neuron.v_threshold).detach()
    clear = (ratio - ratio.round()).abs() > 1e-9
    expected = x.sign() * ratio.abs().floor().clamp(max=T)
    assert torch.equal(neuron.encode(x).sum(0)[clear], expected[clear])
    assert torch.equal(neuron.encode_sum(x)[clear], expected[clear])


@given(ANY_TAU, SEEDS)
def test_odd_symmetry(tau: float, seed: int) -> None:
    neuron, x = ATMN(tau=tau, T=6), inputs(seed, 1.0).float()
    assert torch.equal(neuron.encode(-x), -neuron.encode(x))
    assert torch.equal(neuron.encode_sum(-x), -neuron.encode_sum(x))


def test_ties_fire() -> None:
    assert ATMN(T=3).encode(torch.tensor([1.0, -2.0, 0.0])).T.tolist() == [[1, 0, 0], [-1, -1, 0], [0, 0, 0]]


def test_a_bfloat16_membrane_would_spike_differently() -> None:
    """The state is float32: 1 + 2^-9 of residual survives many steps, which bfloat16 would round away."""
    neuron = ATMN(inject="every", step_mode="m")
    x_seq = torch.full((257, 1), 2**-8, dtype=torch.bfloat16)
    assert neuron(x_seq).sum() == 1
    assert neuron.v.tolist() == [2**-8]


def test_multi_step_uses_the_first_input_alone() -> None:
    x_seq = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    neuron = ATMN(step_mode="m", T=4)
    assert not neuron.started
    assert torch.equal(neuron(x_seq), neuron.encode(x_seq[0]))
    assert neuron.started
    neuron.reset()
    assert torch.equal(torch.cat([neuron(part) for part in x_seq.split([0, 1, 3])]), neuron.encode(x_seq[0]))


def test_input_enters_again_after_a_reset_and_with_a_new_shape() -> None:
    neuron, x = ATMN(), torch.full((2, 3), 5.0)
    membranes = []
    for used in (x, x, x.repeat(2, 1)):
        neuron(used)
        membranes.append(neuron.v.unique().item())
    neuron.reset()
    neuron(x)
    assert [*membranes, neuron.v.unique().item()] == [4.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frame_weight", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_encode_sum_is_the_weighted_sum_of_encode_bit_for_bit(
    dtype: torch.dtype, frame_weight: float, tau: float
) -> None:
    x = (3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(3))).to(dtype)
    neuron = ATMN(tau=tau, T=5, num_channels=6, frame_weight=frame_weight)
    neuron.v_threshold = torch.linspace(0.2, 2.0, 6)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(x.shape, dtype=state)
    for t, frame in enumerate(neuron.encode(x)):
        expected = expected.add(frame.to(state), alpha=frame_weight**t)
    total = neuron.encode_sum(x)
    assert total.dtype == dtype
    assert torch.equal(total, expected.to(dtype))


def test_halving_code_reaches_its_stated_precision() -> None:
    """tau = 0.5 with weights 2^-t codes |x| < 2 V (1 - 2^-T) to V 2^-(T-1)."""
    T, V = 6, 0.7
    neuron = ATMN(tau=0.5, frame_weight=0.5, T=T, v_threshold=V).double()
    x = torch.linspace(-1.9 * V, 1.9 * V, 4001, dtype=torch.float64)
    assert bool(((V * neuron.encode_sum(x) - x).abs() <= V * 2 ** -(T - 1) + 1e-6).all())


def test_encode_leaves_the_membrane_alone() -> None:
    neuron, x = ATMN(), torch.randn(3, 4)
    neuron(x)
    before = neuron.v.clone()
    neuron.encode(x)
    neuron.encode_sum(x)
    assert torch.equal(neuron.v, before)


def test_nan_never_fires_and_stays() -> None:
    neuron = ATMN(step_mode="m")
    x_seq = torch.tensor([float("nan"), 2.0]).expand(3, 2)
    assert neuron(x_seq).T.tolist() == [[0, 0, 0], [1, 1, 0]]
    assert neuron.v.isnan().tolist() == [True, False]
    assert neuron.encode_sum(x_seq[0]).tolist() == [0, 2]
    assert neuron.encode(x_seq[0])[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_infinite_input_fires_at_the_top_level(tau: float) -> None:
    neuron = ATMN(tau=tau, T=4)
    x = torch.tensor([float("inf"), -float("inf")])
    assert neuron.encode_sum(x).tolist() == [4, -4]
    assert neuron.encode(x).sum(0).tolist() == [4, -4]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_encoding_an_empty_batch(requires_grad: bool) -> None:
    neuron = ATMN(num_channels=3)
    x = torch.randn(0, 3, requires_grad=requires_grad)
    assert neuron.encode(x).shape == (4, 0, 3)
    total = neuron.encode_sum(x)
    assert total.shape == (0, 3)
    if requires_grad:
        total.sum().backward()
        assert torch.equal(neuron.a.grad, torch.zeros(3))


def test_other_surrogates_drive_the_gradient() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    gradients = []
    for function in (None, surrogate.Sigmoid(alpha=4.0, spiking=False)):
        ATMN(surrogate_function=function).encode_sum(x).sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert float(gradients[0].abs().min()) > 0
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, "tau must be a finite number > 0; got 0.0"),
        ({"tau": -1}, "tau must be .*got -1"),
        ({"tau": float("nan")}, "tau must be .*got nan"),
        ({"tau": float("inf")}, "tau must be .*got inf"),
        ({"tau": "1"}, "tau must be .*got '1'"),
        ({"v_threshold": 0.0}, "v_threshold must be .*got 0.0"),
        ({"frame_weight": 0}, "frame_weight must be .*got 0"),
        ({"T": 0}, "T must be an integer >= 1; got 0"),
        ({"T": 2.0}, "T must be an integer >= 1; got 2.0"),
        ({"T": True}, "T must be an integer >= 1; got True"),
        ({"num_channels": 0}, "num_channels must be an integer >= 1; got 0"),
        ({"inject": "last"}, "inject must be one of every, first; got 'last'"),
        ({"backend": "cupy9"}, "backend must be one of auto, torch.*; got 'cupy9'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        ATMN(**arguments)


def test_bad_inputs_are_named() -> None:
    neuron = ATMN(num_channels=3)
    for call in (neuron, neuron.encode, neuron.encode_sum):
        with pytest.raises(SpikelmError, match=r"3 channels on the last axis; got input of shape \(2, 4\)"):
            call(torch.randn(2, 4))
        with pytest.raises(SpikelmError, match="floating-point tensor; got torch.int64"):
            call(torch.ones(2, 3, dtype=torch.long))
    neuron.step_mode = "m"
    with pytest.raises(SpikelmError, match=r"x_seq \[T, N, \*\]; got shape \(\)"):
        neuron(torch.tensor(1.0))
    with pytest.raises(SpikelmError, match="v_threshold must be a float .* got values from -1 to 2"):
        neuron.v_threshold = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(SpikelmError, match="backend must be one of"):
        neuron.backend = "nothing"
    with pytest.raises(ValueError):
        neuron.step_mode = "x"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_encode_sum_compiles_without_graph_breaks() -> None:
    neuron = ATMN(tau=0.5, frame_weight=0.5, num_channels=3)
    x = (3 * torch.randn(4, 2, 3)).requires_grad_()
    results = []
    for function in (torch.compile(neuron.encode_sum, backend="aot_eager", fullgraph=True), neuron.encode_sum):
        total = function(x)
        results.append((total, *torch.autograd.grad(total.sum(), [x, neuron.a])))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
