"""Wrong arguments and inputs: one line that names what was given and what is accepted, and nothing half changed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from spikingjelly.activation_based import surrogate

from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, BinaryIF, DynamicsNode, set_backend
from spikelm.ops.dynamics import Dynamics

all_neurons = pytest.mark.parametrize("neuron", [ATMN, TILIF, BinaryIF])
NAN, INF = math.nan, math.inf


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block raises a SpikelmError of one line that contains every part."""
    with pytest.raises(SpikelmError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def wrong(name: str, accepted: str, *values: object) -> list[tuple[dict, str, str]]:
    return [({name: value}, f"{name} must be {accepted}", f"got {value!r}") for value in values]


THRESHOLD = "a float within [1.175e-38, 3.403e+38]"
COUNT = "an integer >= 1"
POSITIVE = "a finite number > 0"
FLAG = "True or False"
BACKENDS = "one of auto, torch, cpu, cupy"


@all_neurons
@pytest.mark.parametrize(
    ("arguments", "accepted", "given"),
    [
        *wrong("v_threshold", THRESHOLD, 0.0, -1.0, -INF, INF, NAN, 1e-39, 1e39, 1, True, "1", None),
        *wrong("num_channels", COUNT, 0, -3, 2.0, True),
        *wrong("channel_dim", "an integer", 1.0, "1", True, None),
        *wrong("learn_threshold", FLAG, 1, None, "yes"),
        *wrong("detach_reset", FLAG, 0, None, "no"),
        *wrong("backend", BACKENDS, "cuda", "triton", None),
    ],
)
def test_arguments_of_all_neurons(neuron: type[DynamicsNode], arguments: dict, accepted: str, given: str) -> None:
    with refused(accepted, given):
        neuron(**arguments)


@all_neurons
def test_spikingjelly_refuses_an_unknown_step_mode(neuron: type[DynamicsNode]) -> None:
    with pytest.raises(ValueError, match='step_mode can only be .*got "x"'):
        neuron(step_mode="x")


@pytest.mark.parametrize("neuron", [TILIF, BinaryIF])
@pytest.mark.parametrize("allow_growth", [False, True])
@pytest.mark.parametrize("beta", [0, 0.0, -0.5, NAN, INF, True, "0.9", None])
def test_beta(neuron: type[DynamicsNode], beta: object, allow_growth: bool) -> None:
    with refused(f"beta must be {POSITIVE}", f"got {beta!r}"):
        neuron(beta=beta, allow_growth=allow_growth)


@pytest.mark.parametrize("neuron", [TILIF, BinaryIF])
def test_growth_must_be_allowed(neuron: type[DynamicsNode]) -> None:
    with refused("beta must be within (0, 1]", "got 1.01", "allow_growth=True"):
        neuron(beta=1.01)
    with refused(f"allow_growth must be {FLAG}", "got 'yes'"):
        neuron(beta=1.5, allow_growth="yes")
    growing = neuron(beta=1.5, allow_growth=True)
    growing(torch.tensor([0.25]))
    growing(torch.tensor([0.0]))
    assert growing.v.tolist() == [0.375]


@pytest.mark.parametrize(
    ("arguments", "accepted", "given"),
    [
        *wrong("tau", POSITIVE, 0.0, -1, NAN, INF, True, "1"),
        *wrong("frame_weight", POSITIVE, 0, -0.5, NAN),
        *wrong("T", COUNT, 0, -1, 2.0, True, "4"),
        *wrong("inject", "one of every, first", "last", None),
        ({"surrogate_function": 3}, "surrogate_function must be an object that can be called", "got 3"),
    ],
)
def test_arguments_of_atmn(arguments: dict, accepted: str, given: str) -> None:
    with refused(accepted, given):
        ATMN(**arguments)


@pytest.mark.parametrize(
    ("arguments", "accepted", "given"),
    [
        *wrong("D", COUNT, 0, -4, 4.0, True, "4", None),
        *wrong("alpha", POSITIVE, 0.0, -1.0, NAN, INF, True),
        *wrong("sgc", "None or one of gradient, blend", "both", True, 0.3, ""),
        *wrong("sgc_weight", "a number within [0, 1]", -0.1, 1.1, NAN, True, "0.3", None),
    ],
)
def test_arguments_of_tilif(arguments: dict, accepted: str, given: str) -> None:
    with refused(accepted, given):
        TILIF(**arguments)


@pytest.mark.parametrize(
    ("arguments", "accepted", "given"),
    [
        *wrong("v_reset", "a finite float (hard reset) or None (soft reset)", 0, 1, True, NAN, INF, "hard"),
        *wrong("reset_delay", FLAG, 1, None, "subtract"),
        (
            {"reset_delay": True, "v_reset": 0.0},
            "reset_delay=True is a soft reset and takes v_reset=None",
            "got v_reset=0",
        ),
        ({"surrogate_function": 3}, "surrogate_function must be an object that can be called", "got 3"),
    ],
)
def test_arguments_of_binary_if(arguments: dict, accepted: str, given: str) -> None:
    with refused(accepted, given):
        BinaryIF(**arguments)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("neuron", [ATMN, BinaryIF])
def test_a_surrogate_that_counts_spikes(neuron: type[DynamicsNode], most: int) -> None:
    if not hasattr(surrogate, "MultiLevelSpikeCount"):
        pytest.skip("this SpikingJelly has no MultiLevelSpikeCount; it came with 2.0.0")
    with refused("must stand for a step from 0 to 1", f"max_spike_count={most}", "counts spikes", "TILIF"):
        neuron(surrogate_function=surrogate.MultiLevelSpikeCount(most))


@pytest.mark.parametrize("reset", ["zero", "subtract", None])
def test_an_unknown_reset(reset: str | None) -> None:
    with refused("reset must be one of soft, soft_delayed, hard", f"got {reset!r}"):
        Dynamics("integer", reset=reset)


def calls(node: DynamicsNode) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Everything that takes an input of one step."""
    return [node, *(getattr(node, name) for name in ("encode", "encode_sum") if hasattr(node, name))]


@all_neurons
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_input_types(neuron: type[DynamicsNode], dtype: torch.dtype) -> None:
    for call in calls(neuron()):
        with refused(f"{neuron.__name__} takes a floating-point tensor", f"got {dtype}"):
            call(torch.ones(2, 3, dtype=dtype))


@all_neurons
@pytest.mark.parametrize("shape", [(), (7,)])
def test_a_sequence_without_a_batch(neuron: type[DynamicsNode], shape: tuple[int, ...]) -> None:
    with refused("step_mode 'm' takes x_seq [T, N, *]", f"got shape {shape}"):
        neuron(step_mode="m")(torch.ones(shape))


@all_neurons
@pytest.mark.parametrize(
    ("channel_dim", "shape", "axis"),
    [
        (-1, (5, 4), "the last axis"),
        (-1, (), "the last axis"),
        (1, (2, 5, 3), "axis 1"),
        (1, (3,), "axis 1"),
        (0, (5, 3), "axis 0"),
        (-3, (3, 3), "axis -3"),
        (7, (3, 3), "axis 7"),
    ],
)
def test_channels_that_are_not_there(
    neuron: type[DynamicsNode], channel_dim: int, shape: tuple[int, ...], axis: str
) -> None:
    node = neuron(num_channels=3, channel_dim=channel_dim)
    for call in calls(node):
        with refused(f"{neuron.__name__} has 3 channels on {axis};", f"got input of shape {shape}"):
            call(torch.ones(shape))
    node.step_mode = "m"
    if shape:  # the axis is one of a step: [T, N] has no axis 1, and (3, 3, 3) no axis -3 to spare
        with refused(f"{neuron.__name__} has 3 channels on {axis};", f"got input of shape {(3, *shape)}"):
            node(torch.ones(3, *shape))


@all_neurons
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_refused_input_leaves_the_state_alone(neuron: type[DynamicsNode], step_mode: str) -> None:
    node = neuron(num_channels=3, step_mode=step_mode, store_v_seq=True)
    shape = (2, 3) if step_mode == "s" else (4, 2, 3)
    with torch.no_grad():
        node(torch.rand(shape))
    before, v_seq = dict(node.named_memories()), node.v_seq
    for x in (torch.rand(4, 2, 4), torch.ones(shape, dtype=torch.long)):
        with refused():
            node(x)
        assert all(value is before[name] for name, value in node.named_memories())
        assert node.v_seq is v_seq


def settings(node: DynamicsNode) -> tuple[str, list[list[float]]]:
    return f"{node.extra_repr()} {node.v_threshold}", [value.tolist() for value in node.state_dict().values()]


@all_neurons
@pytest.mark.parametrize("num_channels", [None, 3])
@pytest.mark.parametrize("learn_threshold", [False, True])
def test_setting_the_threshold(neuron: type[DynamicsNode], learn_threshold: bool, num_channels: int | None) -> None:
    node = neuron(v_threshold=0.5, num_channels=num_channels, learn_threshold=learn_threshold)
    before, shape = settings(node), () if num_channels is None else (3,)
    for value in (0.0, -1.0, 1, NAN, INF, 1e-39):
        with refused(f"v_threshold must be {THRESHOLD}", f"got {value!r}"):
            node.v_threshold = value
        assert settings(node) == before
    for value in (0.0, -1.0, NAN, INF, 1e-39):
        values = torch.ones(shape)
        values.view(-1)[-1] = value
        with refused(f"v_threshold must be {THRESHOLD}, or a tensor of such; got values from", f"{values.min():g}"):
            node.v_threshold = values
        assert settings(node) == before
    with refused(f"v_threshold must be {THRESHOLD}, or a tensor of such", "got torch.int64"):
        node.v_threshold = torch.ones(shape, dtype=torch.long)
    for other in ((2,), (4,), (2, 3), (3, 1)):
        with refused(f"{neuron.__name__} has a v_threshold of shape {shape}", f"got one of shape {other}"):
            node.v_threshold = torch.ones(other)
        assert settings(node) == before
    for accepted in (0.25, torch.tensor(0.25), torch.full(shape, 0.25)):
        node.v_threshold = 2.0
        node.v_threshold = accepted
        torch.testing.assert_close(torch.as_tensor(node.v_threshold).expand(shape), torch.full(shape, 0.25))


@all_neurons
def test_setting_the_backend(neuron: type[DynamicsNode]) -> None:
    node = neuron(backend="torch")
    with refused(f"backend must be {BACKENDS}", "got 'cuda'"):
        node.backend = "cuda"
    assert node.backend == "torch"


@pytest.mark.parametrize(
    ("neuron", "name", "value", "message"),
    [
        (ATMN, "tau", -1.0, "decay must be a finite number > 0; got -1.0"),
        (ATMN, "inject", "last", "inject must be one of every, first; got 'last'"),
        (TILIF, "D", 0, "levels must be an integer >= 1; got 0"),
        (TILIF, "sgc", "both", "sgc must be None or one of gradient, blend; got 'both'"),
        (TILIF, "sgc_weight", 1.5, "sgc_weight must be a number within [0, 1]; got 1.5"),
        (TILIF, "alpha", -1.0, "alpha must be a finite number > 0; got -1.0"),
        (BinaryIF, "beta", 0.0, "decay must be a finite number > 0; got 0.0"),
        (
            BinaryIF,
            "surrogate_function",
            None,
            "surrogate_function must be an object that can be called, no class; got None",
        ),
    ],
)
def test_plain_attributes_are_refused_at_the_next_step(
    neuron: type[DynamicsNode], name: str, value: object, message: str
) -> None:
    node = neuron()
    node(torch.ones(2))
    v = node.v
    setattr(node, name, value)
    with refused(message):
        node(torch.ones(2))
    assert node.v is v


@pytest.mark.parametrize("backend", ["cuda", "", None])
def test_set_backend(backend: str | None) -> None:
    network = torch.nn.Sequential(ATMN(), torch.nn.Sequential(TILIF(), torch.nn.Linear(2, 2)), BinaryIF())
    neurons = [network[0], network[1][0], network[2]]
    set_backend(network, "torch")
    assert [node.backend for node in neurons] == ["torch"] * 3
    with refused(f"backend must be {BACKENDS}", f"got {backend!r}"):
        set_backend(network, backend)
    assert [node.backend for node in neurons] == ["torch"] * 3
    with refused("set_backend('torch')", "the network holds no spikelm neuron"):
        set_backend(network[1][1], "torch")
