"""Equal to neurons of SpikingJelly and snnTorch, bit for bit in float32, where the parameters coincide.

SpikingJelly's LIF nodes with decay_input=False compute v - v / tau or v (1 - 1 / tau), ours v * decay. For tau a power
of two, v / tau and 1 - 1 / tau are exact and both round once, to the same number: hence TAUS.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import snntorch
import torch
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.base import MemoryModule

from spikelm.neurons import ATMN, TILIF, BinaryIF

DRAWS = 120
TAUS = (2.0, 4.0, 8.0)
SHAPES = ((1,), (67,), (3, 5), (4, 3, 6), (2, 3, 4, 5))


def spikingjelly_2(name: str) -> type:
    if not hasattr(neuron, name):
        pytest.skip(f"this SpikingJelly has no {name}; it came with 2.0.0")
    return getattr(neuron, name)


def draws(count: int = DRAWS) -> Iterator[tuple[int, float, torch.Tensor]]:
    """(number, threshold, x_seq [T, N, *] of about twice the threshold), T from 1 to 8 with every shape."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        V = float(torch.empty(()).uniform_(0.2, 3.0, generator=generator))
        shape = (1 + number % 8, *SHAPES[number % len(SHAPES)])
        yield number, V, 2 * V * torch.randn(shape, generator=generator)


def assert_same_in_all_draws(
    pair: Callable[[int, float], tuple[MemoryModule, MemoryModule]], prepare: Callable = lambda x_seq: x_seq
) -> None:
    """Two sequences after each other, in training and in evaluation, and then the same in single steps."""
    fired = total = 0
    for number, V, x_seq in draws():
        ours, theirs = pair(number, V)
        for node in (ours, theirs):
            node.step_mode = "m"
            node.store_v_seq = True
            node.train(number % 2 == 0)
        x_seq = prepare(x_seq)
        for part in (x_seq, x_seq.flip(0)):
            spikes = ours(part)
            assert torch.equal(spikes, theirs(part)), number
            assert torch.equal(ours.v_seq, theirs.v_seq), number
            assert torch.equal(ours.v, theirs.v), number
            fired, total = fired + int((spikes != 0).sum()), total + spikes.numel()
        for node in (ours, theirs):
            node.reset()
            node.step_mode = "s"
        for x in x_seq:
            assert torch.equal(ours(x), theirs(x)), number
            assert torch.equal(ours.v, theirs.v), number
    assert 0.1 < fired / total < 0.9


def test_ternary_soft_reset_is_TernaryIFNode() -> None:
    theirs = spikingjelly_2("TernaryIFNode")
    assert_same_in_all_draws(
        lambda number, V: (
            ATMN(inject="every", v_threshold=V, learn_threshold=False),
            theirs(v_threshold=V, v_reset=None),
        )
    )


def test_ternary_soft_reset_is_TernaryLIFNode() -> None:
    theirs = spikingjelly_2("TernaryLIFNode")

    def pair(number: int, V: float) -> tuple[MemoryModule, MemoryModule]:
        tau = TAUS[number % 3]
        ours = ATMN(tau=1 / (1 - 1 / tau), inject="every", v_threshold=V, learn_threshold=False)
        assert ours.dynamics.decay == 1 - 1 / tau
        return ours, theirs(tau=tau, decay_input=False, v_threshold=V, v_reset=None)

    assert_same_in_all_draws(pair)


def test_integer_firing_is_ILIFNode_on_non_negative_input() -> None:
    """Inputs >= 0 keep h > -V / 2, where both round to 0; random normal numbers have no ties."""
    theirs = spikingjelly_2("ILIFNode")

    def pair(number: int, V: float) -> tuple[MemoryModule, MemoryModule]:
        tau, D = TAUS[number % 3], 1 + number % 6
        return (
            TILIF(D=D, beta=1 - 1 / tau, v_threshold=V),
            theirs(tau=tau, v_threshold=V, surrogate_function=surrogate.MultiLevelSpikeCount(D)),
        )

    assert_same_in_all_draws(pair, prepare=torch.abs)


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3, 0.15])
def test_binary_is_IFNode(v_reset: float | None) -> None:
    assert_same_in_all_draws(
        lambda number, V: (
            BinaryIF(v_threshold=V, v_reset=v_reset),
            neuron.IFNode(v_threshold=V, v_reset=v_reset),
        )
    )


@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_leaky_binary_is_LIFNode(v_reset: float | None) -> None:
    assert_same_in_all_draws(
        lambda number, V: (
            BinaryIF(beta=1 - 1 / TAUS[number % 3], v_threshold=V, v_reset=v_reset),
            neuron.LIFNode(tau=TAUS[number % 3], decay_input=False, v_threshold=V, v_reset=v_reset),
        )
    )


def run_leaky(leaky: snntorch.Leaky, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    membrane, spikes, membranes = torch.zeros_like(x_seq[0]), [], []
    for x in x_seq:
        spike, membrane = leaky(x, membrane)
        spikes.append(spike)
        membranes.append(membrane)
    return torch.stack(spikes), torch.stack(membranes)


def test_delayed_soft_reset_is_snntorch_Leaky() -> None:
    fired = total = 0
    for number, V, x_seq in draws():
        beta = float(torch.empty(()).uniform_(0.05, 1.0, generator=torch.Generator().manual_seed(number)))
        ours = BinaryIF(beta=beta, v_threshold=V, reset_delay=True, step_mode="m", store_v_seq=True)
        leaky = snntorch.Leaky(beta=beta, threshold=V, reset_mechanism="subtract")
        assert leaky.reset_delay
        spikes, membranes = run_leaky(leaky, x_seq)
        assert torch.equal(ours(x_seq), spikes), number
        assert torch.equal(ours.v_seq, membranes), number
        fired, total = fired + int(spikes.sum()), total + spikes.numel()
    assert 0.1 < fired / total < 0.9


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x_seq: torch.Tensor) -> torch.Tensor:
    """Of a random combination of the outputs."""
    x_seq = x_seq.clone().requires_grad_()
    outputs = function(x_seq)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(7))
    (result,) = torch.autograd.grad((outputs * weights).sum(), x_seq)
    assert float(result.abs().max()) > 0
    return result


def assert_same_gradients(pair: Callable[[int], tuple[MemoryModule, MemoryModule]], prepare: Callable) -> None:
    for number, V, x_seq in draws(40):
        ours, theirs = pair(number)
        for node in (ours, theirs):
            node.step_mode = "m"
        x_seq = prepare(x_seq / V)
        torch.testing.assert_close(gradient(ours, x_seq), gradient(theirs, x_seq), rtol=1e-5, atol=3e-6)


# V = 1: SpikingJelly and snnTorch take a surrogate at h - V, ours takes it at h / V - 1.
@pytest.mark.parametrize("function", [surrogate.ATan(alpha=2.0), surrogate.Sigmoid(alpha=4.0)], ids=["ATan", "Sigmoid"])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [None, 0.0, 0.3])
def test_gradients_of_IFNode(v_reset: float | None, detach_reset: bool, function: torch.nn.Module) -> None:
    arguments = {"v_reset": v_reset, "detach_reset": detach_reset, "surrogate_function": function}
    assert_same_gradients(lambda number: (BinaryIF(**arguments), neuron.IFNode(**arguments)), lambda x_seq: x_seq)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_gradients_of_LIFNode(v_reset: float | None, detach_reset: bool) -> None:
    arguments = {"v_reset": v_reset, "detach_reset": detach_reset, "surrogate_function": surrogate.ATan(alpha=2.0)}
    assert_same_gradients(
        lambda number: (
            BinaryIF(beta=1 - 1 / TAUS[number % 3], **arguments),
            neuron.LIFNode(tau=TAUS[number % 3], decay_input=False, **arguments),
        ),
        lambda x_seq: x_seq,
    )


@pytest.mark.parametrize("detach_reset", [False, True])
def test_gradients_of_TernaryLIFNode(detach_reset: bool) -> None:
    theirs = spikingjelly_2("TernaryLIFNode")
    arguments = {"detach_reset": detach_reset, "surrogate_function": surrogate.ATan(alpha=2.0)}
    assert_same_gradients(
        lambda number: (
            ATMN(tau=1 / (1 - 1 / TAUS[number % 3]), inject="every", **arguments),
            theirs(tau=TAUS[number % 3], decay_input=False, v_reset=None, **arguments),
        ),
        lambda x_seq: x_seq,
    )


@pytest.mark.parametrize("detach_reset", [False, True])
def test_gradients_of_ILIFNode(detach_reset: bool) -> None:
    """From V / 2 on, h stays >= 0: below it ILIFNode's window ends and ours does not."""
    theirs = spikingjelly_2("ILIFNode")
    assert_same_gradients(
        lambda number: (
            TILIF(D=4, beta=1 - 1 / TAUS[number % 3], detach_reset=detach_reset),
            theirs(tau=TAUS[number % 3], detach_reset=detach_reset),
        ),
        lambda x_seq: 0.5 + x_seq.abs(),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (surrogate.ATan(alpha=2.0), None),  # snnTorch's default
        (snntorch.surrogate.atan(alpha=2.0), None),
        (snntorch.surrogate.fast_sigmoid(slope=5), snntorch.surrogate.fast_sigmoid(slope=5)),
        (snntorch.surrogate.sigmoid(slope=1), snntorch.surrogate.sigmoid(slope=1)),  # 5 overflows to NaN at h = -10
    ],
    ids=["ATan", "atan", "fast_sigmoid", "sigmoid"],
)
def test_gradients_of_snntorch_Leaky(ours: Callable, theirs: Callable | None) -> None:
    """Leaky detaches its reset."""
    for _, V, x_seq in draws(40):
        node = BinaryIF(beta=0.9, reset_delay=True, detach_reset=True, surrogate_function=ours, step_mode="m")
        leaky = snntorch.Leaky(beta=0.9, spike_grad=theirs)
        expected = gradient(lambda x_seq, leaky=leaky: run_leaky(leaky, x_seq)[0], x_seq / V)
        torch.testing.assert_close(gradient(node, x_seq / V), expected, rtol=1e-5, atol=3e-6)


# And where they are different neurons.


def test_spikingjellys_soft_reset_is_not_the_delayed_one() -> None:
    """I = theta = 1, T = 4, beta = 0.9: rate 1.0 with SpikingJelly's soft reset, 0.75 with BiSpikCLM's, snnTorch's."""
    x_seq = torch.ones(4, 1)
    lif = neuron.LIFNode(tau=10.0, decay_input=False, v_reset=None, step_mode="m")
    assert lif(x_seq).flatten().tolist() == [1, 1, 1, 1]
    assert BinaryIF(beta=0.9, step_mode="m")(x_seq).flatten().tolist() == [1, 1, 1, 1]
    assert BinaryIF(beta=0.9, reset_delay=True, step_mode="m")(x_seq).flatten().tolist() == [1, 0, 1, 1]
    # Leaky does not fire at the tie of the first step, and makes up for it at the second.
    assert run_leaky(snntorch.Leaky(beta=0.9), x_seq)[0].flatten().tolist() == [0, 1, 1, 1]
    assert run_leaky(snntorch.Leaky(beta=0.9), 1.001 * x_seq)[0].flatten().tolist() == [1, 0, 1, 1]


def test_snntorch_does_not_fire_at_a_tie() -> None:
    x = torch.tensor([1 - 2**-24, 1.0, 1 + 2**-23])  # the float32 numbers around the threshold
    for arguments in ({}, {"surrogate_function": snntorch.surrogate.atan()}):
        assert BinaryIF(reset_delay=True, **arguments)(x).tolist() == [0, 1, 1]
    assert snntorch.Leaky(beta=1.0)(x)[0].tolist() == [0, 0, 1]


def test_hard_reset_leaks_towards_zero_where_LIFNode_leaks_towards_v_reset() -> None:
    x_seq = torch.zeros(1, 1)
    ours, theirs = BinaryIF(beta=0.5, v_reset=0.5), neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.5)
    ours(x_seq)
    theirs(x_seq)
    assert (float(ours.v), float(theirs.v)) == (0.25, 0.5)


def test_ILIFNode_has_no_negative_spikes_and_rounds_half_to_even() -> None:
    ilif = spikingjelly_2("ILIFNode")
    x = torch.tensor([-2.0, 0.5, 1.5, 2.5])
    assert ilif()(x).tolist() == [0, 0, 2, 2]
    assert TILIF()(x).tolist() == [-2, 1, 2, 3]


def test_IFNode_makes_nan_of_the_infinite_membrane_that_our_hard_reset_clears() -> None:
    x = torch.tensor([math.inf])
    theirs, ours = neuron.IFNode(), BinaryIF(v_reset=0.0)
    assert theirs(x).tolist() == ours(x).tolist() == [1]
    assert bool(theirs.v.isnan())
    assert ours.v.tolist() == [0]
