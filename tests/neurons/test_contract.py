"""What SpikingJelly and torch ask of a neuron, for all three. Runs with SpikingJelly 2.0.0 and with 0.0.0.0.14."""

import copy
import importlib
import io
import logging
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, BinaryIF, DynamicsNode, set_backend
from tests.kernel_cases import build_together

CHANNELS = 6
NEURONS: dict[str, Callable[..., DynamicsNode]] = {
    "ATMN": ATMN,
    "ATMN-every": partial(ATMN, tau=1.7, inject="every"),
    "ATMN-per-channel": partial(ATMN, tau=0.6, num_channels=CHANNELS, detach_reset=True),
    "TILIF": TILIF,
    "TILIF-D=1": partial(TILIF, D=1, v_threshold=0.7),
    "TILIF-leaky": partial(TILIF, beta=0.7, alpha=0.5, detach_reset=True),
    "TILIF-per-channel": partial(TILIF, D=3, num_channels=CHANNELS, learn_threshold=True),
    "TILIF-sgc": partial(TILIF, D=2, beta=0.9, sgc="gradient"),
    "BinaryIF": BinaryIF,
    "BinaryIF-delayed": partial(BinaryIF, beta=0.8, reset_delay=True),
    "BinaryIF-hard": partial(BinaryIF, v_reset=-0.25),
    "BinaryIF-leaky": partial(BinaryIF, beta=0.7, v_threshold=0.8, detach_reset=True),
    "BinaryIF-per-channel": partial(BinaryIF, beta=0.9, num_channels=CHANNELS, learn_threshold=True),
}
EVERY = tuple(NEURONS)
SOME = ("ATMN-per-channel", "TILIF-sgc", "BinaryIF-hard", "BinaryIF-per-channel")  # where a case costs seconds
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

is_2 = hasattr(base, "to_functional_forward")
needs_2 = pytest.mark.skipif(
    not is_2, reason="SpikingJelly 0.0.0.0.14 has no explicit states, no memopt and no op_counter"
)
needs_old = pytest.mark.skipif(is_2, reason="SpikingJelly 2.0.0 has no functional.set_backend")
every_neuron = pytest.mark.parametrize("name", EVERY)
both_step_modes = pytest.mark.parametrize("step_mode", ["s", "m"])
# What torch itself warns of while it traces.
traced = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:The tensor attribute .* was assigned during export:UserWarning",
    "ignore:While compiling, we found certain side effects:UserWarning",
)


def make(name: str, **arguments: object) -> DynamicsNode:
    """A neuron of the table above; thresholds per channel differ."""
    made = NEURONS[name](**arguments)
    if made.num_channels is not None:
        made.v_threshold = torch.linspace(0.4, 1.6, made.num_channels)
    return made


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The kernels of the tests of every neuron in every type."""
    both = {"name", "dtype"}
    build_together(request, lambda one: (make(one["name"]).dynamics, one["dtype"]) if both <= one.keys() else None)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def x_for(step_mode: str, T: int = 4, seed: int = 0) -> torch.Tensor:
    return draw(T, 3, CHANNELS, seed=seed) if step_mode == "m" else draw(3, CHANNELS, seed=seed)


def one_by_one(node: DynamicsNode, x_seq: torch.Tensor) -> torch.Tensor:
    node.step_mode = "s"
    return torch.stack([node(x) for x in x_seq])


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, CHANNELS), make(name), layer.Linear(CHANNELS, CHANNELS), make(name))
    functional.set_step_mode(net, "m")
    return net


# Steps and states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_neuron
def test_single_steps_equal_one_multi_step_call_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    x_seq = draw(7, 5, CHANNELS, dtype=dtype)
    before = x_seq.clone()
    single, multi = make(name), make(name, step_mode="m")
    expected, spikes = one_by_one(single, x_seq), multi(x_seq)
    assert expected.abs().sum() > 0
    assert spikes.dtype == expected.dtype == dtype
    assert torch.equal(spikes, expected)
    assert torch.equal(spikes, spikes.round())
    assert torch.equal(multi.v, single.v)
    assert multi.v.dtype == single.v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(x_seq, before)


@every_neuron
def test_split_sequences_equal_the_whole(name: str) -> None:
    x_seq, node = draw(9, 4, CHANNELS), make(name, step_mode="m")
    whole, v = node(x_seq), node.v
    node.reset()
    assert torch.equal(torch.cat([node(part) for part in x_seq.split([1, 0, 5, 3])]), whole)
    assert torch.equal(node.v, v)
    node.reset()
    parts = [one_by_one(node, x_seq[:2])]
    node.step_mode = "m"
    assert torch.equal(torch.cat([*parts, node(x_seq[2:])]), whole)
    assert torch.equal(node.v, v)


@both_step_modes
@every_neuron
def test_reset_net_and_a_new_shape_start_anew(name: str, step_mode: str) -> None:
    net = nn.Sequential(make(name, step_mode=step_mode))
    start, x = net[0].v, x_for(step_mode)
    first, v = net(x), net[0].v
    assert not torch.equal(net(x), first) or not torch.equal(net[0].v, v)
    functional.reset_net(net)
    assert net[0].v == start
    assert torch.equal(net(x), first)
    assert torch.equal(net[0].v, v)
    other = torch.cat((x, x), dim=-2)
    expected = make(name, step_mode=step_mode)(other)
    assert torch.equal(net(other), expected)


@every_neuron
def test_set_step_mode_reaches_a_network(name: str) -> None:
    net = nn.Sequential(layer.Linear(5, CHANNELS), make(name))
    assert net[1].step_mode == "s"
    functional.set_step_mode(net, "m")
    assert net[1].step_mode == "m"
    assert net(draw(4, 2, 5)).shape == (4, 2, CHANNELS)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert net(draw(2, 5)).shape == (2, CHANNELS)
    with pytest.raises(ValueError, match="step_mode can only be"):
        net[1].step_mode = "x"


@every_neuron
def test_detach_net_truncates_back_propagation(name: str) -> None:
    """The second chunk's gradients are those of a network that begins with the first one's membranes."""
    net, chunks, weights = network(name), draw(2, 4, 3, 5), draw(4, 3, CHANNELS, seed=1)
    (net(chunks[0]) * weights).sum().backward()
    functional.detach_net(net)
    assert all(net[i].v.grad_fn is None for i in (1, 3))
    net.zero_grad()
    other = copy.deepcopy(net)  # torch copies no tensor that has a graph
    for made in (net, other):
        (made(chunks[1]) * weights).sum().backward()
    found = [(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True) if p.grad is not None]
    assert found  # an ATMN takes no input in the second chunk: its last threshold alone has a gradient then
    for one, two in found:
        assert torch.equal(one, two)
        assert one.abs().sum() > 0
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        net(chunks[1]).sum().backward()


# Backends


@every_neuron
def test_set_backend(name: str) -> None:
    net = network(name)
    set_backend(net, "torch")
    assert [net[i].backend for i in (1, 3)] == ["torch", "torch"]
    with pytest.raises(SpikelmError, match="backend must be one of auto, torch, cpu, cupy; got 'nothing'"):
        set_backend(net, "nothing")
    assert [net[i].backend for i in (1, 3)] == ["torch", "torch"]
    with pytest.raises(SpikelmError, match="holds no spikelm neuron"):
        set_backend(nn.Sequential(nn.Linear(2, 2)), "torch")


@needs_old
@every_neuron
def test_set_backend_of_spikingjelly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    net = network(name)
    assert set(net[1].supported_backends) == {"auto", "torch", "cpu", "cupy"}
    functional.set_backend(net, "torch", instance=DynamicsNode)
    assert [net[i].backend for i in (1, 3)] == ["torch", "torch"]
    with caplog.at_level(logging.WARNING):
        functional.set_backend(net, "lava", instance=DynamicsNode)
    assert "does not supports for backend=lava" in caplog.text
    assert [net[i].backend for i in (1, 3)] == ["torch", "torch"]


# The membranes of all steps


@every_neuron
def test_store_v_seq_keeps_every_membrane_in_both_step_modes(name: str) -> None:
    x_seq = draw(5, 3, CHANNELS)
    plain, expected = make(name), []
    for x in x_seq:
        plain(x)
        expected.append(plain.v)
    multi, single = make(name, step_mode="m", store_v_seq=True), make(name)
    single.store_v_seq = True
    spikes = multi(x_seq)
    assert torch.equal(one_by_one(single, x_seq), spikes)
    for node in (multi, single):
        assert torch.equal(node.v_seq, torch.stack(expected))
        node.detach()
        assert node.v_seq.grad_fn is None
        node.reset()
        assert node.v_seq is None
    single(x_seq[0])
    single(draw(4, CHANNELS))
    assert single.v_seq.shape == (1, 4, CHANNELS)  # another shape is another sequence


def test_store_v_seq_survives_a_move_to_another_device() -> None:
    node = BinaryIF(store_v_seq=True)
    node(draw(2, 3))
    node.to("meta")(draw(2, 3).to("meta"))
    assert node.v_seq.device.type == "meta"
    assert node.v_seq.shape[1:] == (2, 3)


# Copies and files


def through_torch_save(node: DynamicsNode) -> DynamicsNode:
    file = io.BytesIO()
    torch.save(node, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@every_neuron
def test_copies_continue_alike_and_apart(name: str, duplicate: Callable[[DynamicsNode], DynamicsNode]) -> None:
    node, x = make(name, store_v_seq=True), draw(3, CHANNELS)
    with torch.no_grad():  # torch copies no tensor that has a graph
        node(x)
    other = duplicate(node)
    assert repr(other) == repr(node)
    v = node.v.clone()
    spikes = other(x)
    assert torch.equal(node.v, v)
    assert torch.equal(node(x), spikes)
    assert torch.equal(node.v, other.v)
    assert torch.equal(node.v_seq, other.v_seq)
    other.v_threshold = 3.0
    assert not torch.equal(torch.as_tensor(other.v_threshold), torch.as_tensor(node.v_threshold))


@every_neuron
def test_state_dict_is_the_threshold_alone(name: str) -> None:
    node = make(name, store_v_seq=True)
    node(draw(3, CHANNELS))
    has_tensor = name.startswith("ATMN") or "per-channel" in name
    assert list(node.state_dict()) == (["a"] if has_tensor else [])
    other = NEURONS[name]()
    other.load_state_dict(node.state_dict())
    assert torch.equal(torch.as_tensor(other.v_threshold), torch.as_tensor(node.v_threshold))
    if node.num_channels is not None:
        frozen = NEURONS[name](learn_threshold=False)
        frozen.load_state_dict(node.state_dict())
        assert torch.equal(frozen.v_threshold, node.v_threshold)
        assert list(frozen.parameters()) == []


@pytest.mark.parametrize("theirs", [neuron.IFNode, neuron.LIFNode, partial(neuron.LIFNode, v_reset=None)])
@pytest.mark.parametrize("ours", [BinaryIF, TILIF, partial(ATMN, learn_threshold=False)])
def test_checkpoints_of_if_and_lif_networks_load_strictly(
    ours: Callable[[], DynamicsNode], theirs: Callable[[], BaseNode]
) -> None:
    def build(spiking: Callable[[], nn.Module]) -> nn.Sequential:
        return nn.Sequential(layer.Linear(5, 4), layer.BatchNorm1d(4), spiking(), layer.Linear(4, 3), spiking())

    source, target = build(theirs), build(ours)
    target.load_state_dict(source.state_dict(), strict=True)
    source.load_state_dict(target.state_dict(), strict=True)
    assert torch.equal(target[0].weight, source[0].weight)


@both_step_modes
@every_neuron
def test_data_parallel_replica(name: str, step_mode: str) -> None:
    """As torch.nn.parallel.replicate does, which needs GPUs: tensors with a graph in place of the parameters."""
    node, x = make(name, step_mode=step_mode), x_for(step_mode)
    x.requires_grad_()
    replica = node._replicate_for_data_parallel()
    for key, parameter in node.named_parameters(recurse=False):
        setattr(replica, key, parameter * 1)
    spikes = replica(x)
    assert node.v == make(name).v  # still the start
    v = replica.v
    assert torch.equal(node(x), spikes)
    spikes.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in node.parameters())
    node.reset()
    assert torch.equal(replica.v, v)
    replica.reset()
    assert replica.v == node.v


# Types


@every_neuron
def test_autocast(name: str) -> None:
    net, x_seq = network(name), draw(4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x_seq)
        loss = (out.float() * draw(4, 3, CHANNELS, seed=1)).sum()
    assert out.dtype == torch.bfloat16
    assert [net[i].v.dtype for i in (1, 3)] == [torch.float32, torch.float32]
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in net.parameters())
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_neuron
def test_sixteen_bit_networks(name: str, dtype: torch.dtype) -> None:
    net = network(name).to(dtype)
    out = net(draw(4, 3, 5, dtype=dtype))
    assert out.dtype == dtype
    assert [net[i].v.dtype for i in (1, 3)] == [torch.float32, torch.float32]
    (out * draw(4, 3, CHANNELS, dtype=dtype, seed=1)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == dtype for p in net.parameters())
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


@every_neuron
def test_module_to_another_dtype_with_a_live_membrane(name: str) -> None:
    x_seq, node, twin = draw(6, 3, CHANNELS), make(name), make(name)
    expected = one_by_one(twin, x_seq)
    spikes = [one_by_one(node, x_seq[:3]), one_by_one(node.double(), x_seq[3:])]
    assert torch.equal(torch.cat(spikes), expected)  # float64 holds what float32 did
    assert torch.equal(node.v, twin.v)
    node(x_seq[0].double())
    assert node.v.dtype == torch.float64
    v = node.to(torch.bfloat16).v
    assert v.dtype == torch.bfloat16
    rounded = v.float()
    twin.to(torch.bfloat16).v = rounded
    assert torch.equal(node(x_seq[0]), twin(x_seq[0]))
    assert torch.equal(node.v, twin.v)
    assert node.v.dtype == torch.float32


# torch.compile and torch.export


def gradients(outs: list[torch.Tensor], xs: list[torch.Tensor], node: DynamicsNode) -> tuple[torch.Tensor, ...]:
    loss = node.v.sum() + sum((out * draw(*out.shape, seed=7)).sum() for out in outs)
    return torch.autograd.grad(loss, [*xs, *node.parameters()], materialize_grads=True)


@traced
@both_step_modes
@pytest.mark.parametrize("name", SOME)
def test_compiles_to_one_graph_and_carries_its_state(name: str, step_mode: str) -> None:
    """Ten calls, back propagation and a reset at every third: a graph for a fresh membrane and one for a carried."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    node, eager = make(name, step_mode=step_mode), make(name, step_mode=step_mode)
    compiled = torch.compile(node, backend=counter, fullgraph=True)
    for first in range(0, 10, 3):
        xs = [x_for(step_mode, seed=first + i).requires_grad_() for i in range(3 if first < 9 else 1)]
        outs, expected = [compiled(x) for x in xs], [eager(x) for x in xs]
        assert torch.equal(torch.stack(outs), torch.stack(expected))
        assert torch.equal(node.v, eager.v)
        for one, other in zip(gradients(outs, xs, node), gradients(expected, xs, eager), strict=True):
            torch.testing.assert_close(one, other)
        functional.reset_net(compiled)
        functional.reset_net(eager)
    assert counter.frame_count == 2


@traced
@pytest.mark.parametrize(
    ("name", "dynamic"),  # ATMN not with True: torch cannot trace a surrogate's float through two firings then
    [("ATMN", None), ("ATMN", False), ("ATMN-every", False), ("TILIF", True), ("BinaryIF-delayed", True)],
)
def test_compiled_single_steps_are_not_compiled_anew(name: str, dynamic: bool | None) -> None:
    """More steps than torch's recompile limit of 8: a memory that counted steps would make each one a new graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(make(name), backend=counter, fullgraph=True, dynamic=dynamic)
    x_seq = draw(12, 3, CHANNELS)
    assert torch.equal(torch.stack([compiled(x) for x in x_seq]), one_by_one(make(name), x_seq))
    assert counter.frame_count == 2


@pytest.fixture
def forget_distutils() -> Iterator[None]:
    """torch's inductor imports distutils; where that is loaded, looking for pip warns in a later test."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "distutils"]:
        del sys.modules[name]


@traced
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler; no g++ was found")
@pytest.mark.usefixtures("forget_distutils")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    node, eager = make("BinaryIF-per-channel", step_mode="m"), make("BinaryIF-per-channel", step_mode="m")
    compiled = torch.compile(node, fullgraph=True)
    x = x_for("m").requires_grad_()
    out, expected = compiled(x), eager(x)
    assert torch.equal(out, expected)
    torch.testing.assert_close(node.v, eager.v)
    for one, other in zip(gradients([out], [x], node), gradients([expected], [x], eager), strict=True):
        torch.testing.assert_close(one, other)


@traced
@pytest.mark.parametrize(
    ("name", "step_mode", "strict"),
    [(name, step_mode, False) for name in SOME for step_mode in "sm"] + [("BinaryIF-per-channel", "s", True)],
)
def test_exports_and_leaves_the_module_unharmed(name: str, step_mode: str, strict: bool) -> None:
    """The program holds the state of the moment: every call of it gives what the module's next call gives."""
    node, x = make(name, step_mode=step_mode).eval(), x_for(step_mode)
    for live in (False, True):
        if live:
            with torch.no_grad():
                node(x)
        before = copy.deepcopy(node)
        program = torch.export.export(node, (x,), strict=strict).module()
        assert type(node.v) is type(before.v)
        assert torch.equal(torch.as_tensor(node.v), torch.as_tensor(before.v))
        out = program(x)
        assert torch.equal(program(x), out)
        assert torch.equal(node(x), out)
        assert torch.equal(before(x), out)
        assert torch.equal(node.v, before.v)
        node.reset()


@traced
def test_exports_with_a_dynamic_batch() -> None:
    node = make("BinaryIF-per-channel", step_mode="m").eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(node, (x_for("m"),), dynamic_shapes={"x": {1: batch}}).module()
    x_seq = draw(4, 9, CHANNELS)
    assert torch.equal(program(x_seq), node(x_seq))


# What SpikingJelly 2 adds


@needs_2
@pytest.mark.parametrize("chunks", [1, 2])
@every_neuron
def test_checkpoint_module_gives_the_same_gradients(name: str, chunks: int) -> None:
    from spikingjelly.activation_based import memopt

    x_seq, net = draw(4, 3, 5).requires_grad_(), network(name)
    plain = copy.deepcopy(net)
    wrapped = memopt.checkpoint_module(net, chunks=chunks)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    results = []
    for function, made in ((wrapped, net), (plain, plain)):
        out = function(x_seq)
        found = torch.autograd.grad((out * draw(*out.shape, seed=1)).sum(), [x_seq, *made.parameters()])
        results.append((out, made[1].v, made[3].v, *found))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(results[0][0], results[1][0])


@needs_2
@both_step_modes
@every_neuron
def test_functional_forward_with_explicit_states(name: str, step_mode: str) -> None:
    node, x = make(name, step_mode=step_mode), x_for(step_mode)
    start = node.v
    v = draw(3, CHANNELS, seed=1).requires_grad_()
    others = tuple(base.extract_memories(node))[1:]
    (spikes,), (last, *_) = base.to_functional_forward(node)((x,), (v, *others))
    assert node.v == start  # the module's own state is untouched
    expected = make(name, step_mode=step_mode)
    expected.v = v
    assert torch.equal(spikes, expected(x))
    assert torch.equal(last, expected.v)
    (gradient,) = torch.autograd.grad(last.sum() + spikes.sum(), v)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@needs_2
@every_neuron
def test_functional_forward_of_a_network(name: str) -> None:
    net, x_seq = network(name), draw(4, 3, 5)
    (spikes,), states = base.to_functional_forward(net)((x_seq,), tuple(base.extract_memories(net)))
    assert torch.equal(spikes, net(x_seq))
    for one, other in zip(states, base.extract_memories(net), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


# Nothing to do


@pytest.mark.parametrize("training", [True, False])
@every_neuron
def test_empty_batch_and_no_steps(name: str, training: bool) -> None:
    for step_mode, shape in (("m", (4, 0, CHANNELS)), ("m", (0, 2, CHANNELS)), ("s", (0, CHANNELS))):
        node = make(name, step_mode=step_mode, store_v_seq=True).train(training)
        start, x = node.v, torch.zeros(shape, requires_grad=training)
        with torch.set_grad_enabled(training):
            spikes = node(x)
        assert spikes.shape == shape
        assert node.v.shape == (shape[1:] if step_mode == "m" else shape)
        assert bool((node.v == start).all())  # with no steps there are elements, and they are as they started
        assert node.v_seq.shape == (shape if step_mode == "m" else (1, *shape))
        if training:
            (spikes.sum() + node.v.sum()).backward()
            assert x.grad.shape == shape
            assert all(p.grad is None or not p.grad.any() for p in node.parameters())
        node.detach()
        node.reset()


def test_no_steps_leave_the_first_input_to_the_next_call() -> None:
    node = ATMN(step_mode="m")
    node(torch.ones(0, 2))
    assert node(torch.ones(2, 2)).tolist() == [[1, 1], [0, 0]]


# Thresholds per channel


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((3, 6), -1), ((3, 5, 6), -1), ((3, 6, 4, 5), 1), ((3, 6, 4, 5), -3), ((6, 4), 0), ((3, 6, 4), -2)],
)
@pytest.mark.parametrize(
    "build",
    [
        partial(ATMN, tau=1.3, inject="every", learn_threshold=False),
        partial(TILIF, D=3, beta=0.8),
        partial(BinaryIF, beta=0.9),
        partial(BinaryIF, beta=0.9, reset_delay=True),
        partial(BinaryIF, v_reset=0.1),
    ],
    ids=["ATMN", "TILIF", "BinaryIF", "BinaryIF-delayed", "BinaryIF-hard"],
)
def test_channels_are_neurons_of_their_own(
    build: Callable[..., DynamicsNode], shape: tuple[int, ...], channel_dim: int
) -> None:
    node = build(num_channels=CHANNELS, channel_dim=channel_dim, step_mode="m")
    node.v_threshold = torch.linspace(0.3, 2.0, CHANNELS)
    x_seq = draw(5, *shape)
    spikes, v = node(x_seq), node.v
    axis = channel_dim + (len(shape) if channel_dim < 0 else 0)
    for channel, threshold in enumerate(node.v_threshold.tolist()):
        alone = build(v_threshold=threshold, step_mode="m")
        assert torch.equal(spikes.select(1 + axis, channel), alone(x_seq.select(1 + axis, channel)))
        assert torch.equal(v.select(axis, channel), alone.v)
    single = build(num_channels=CHANNELS, channel_dim=channel_dim)
    single.v_threshold = node.v_threshold
    assert torch.equal(one_by_one(single, x_seq), spikes)


# Gradients


def as_function(node: DynamicsNode) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(x_seq, first membrane, *parameters) -> (spikes, last membrane)."""
    names = [name for name, _ in node.named_parameters()]

    def run(x_seq: torch.Tensor, v: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        node.reset()
        node.v = v
        spikes = torch.func.functional_call(node, dict(zip(names, parameters, strict=True)), (x_seq,))
        return spikes, node.v

    return run


@pytest.mark.parametrize("smooth", [surrogate.Sigmoid(spiking=False), surrogate.ATan(spiking=False)], ids=str)
@pytest.mark.parametrize("num_channels", [None, 2])
@pytest.mark.parametrize(
    "build",
    [
        partial(ATMN, tau=1.6),
        partial(ATMN, tau=0.7, inject="every"),
        partial(BinaryIF, learn_threshold=True),
        partial(BinaryIF, beta=0.7, learn_threshold=True),
        partial(BinaryIF, beta=0.7, reset_delay=True, learn_threshold=True),
        partial(BinaryIF, v_reset=0.0, learn_threshold=True),
        partial(BinaryIF, beta=0.8, v_reset=-0.3, learn_threshold=True),
    ],
    ids=["ATMN", "ATMN-every", "soft", "leaky", "delayed", "hard", "hard-leaky"],
)
def test_gradcheck_of_a_smooth_primitive(
    build: Callable[..., DynamicsNode], num_channels: int | None, smooth: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    node = build(surrogate_function=smooth, num_channels=num_channels, v_threshold=0.8, step_mode="m").double()
    x_seq = draw(3, 2, 2, dtype=torch.float64).requires_grad_()
    v = draw(2, 2, dtype=torch.float64, seed=1).requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in node.parameters()]
    assert torch.autograd.gradcheck(as_function(node), (x_seq, v, *parameters))


def tilif_gradient(
    node: TILIF, xs: list[float], v: float, V: float, weights: list[float], at_last_v: float
) -> tuple[list[float], float, float]:
    """Back through time in plain numbers for sum_t weights_t s_t + at_last_v v_T: (dL/dx, dL/dv_0, dL/da)."""
    kept = []
    for x in xs:
        h = node.beta * v + x
        y = torch.tensor(h / V, dtype=torch.float64)
        s = float(y.sign() * (y.abs() + 0.5).floor().clamp(max=node.D))
        slope = node.alpha * (abs(h / V) <= node.D)
        if node.sgc == "gradient":
            slope = (1 - node.sgc_weight) * slope + node.sgc_weight * float(1 - (y / node.D).tanh() ** 2)
        kept.append((h, s, slope))
        v = h - s * V
    at_v, at_V, at_x = at_last_v, 0.0, []
    for (h, s, slope), weight in zip(reversed(kept), reversed(weights), strict=True):
        at_s = weight if node.detach_reset else weight - V * at_v
        at_V += -s * at_v - at_s * slope * h / V**2
        at_h = at_v + at_s * slope / V
        at_x.append(at_h)
        at_v = node.beta * at_h
    return at_x[::-1], at_v, at_V * V


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("sgc", [None, "gradient"])
@pytest.mark.parametrize(("beta", "D", "alpha"), [(1.0, 4, 1.0), (0.7, 2, 0.5), (0.9, 1, 1.5)])
def test_tilif_gradient_against_a_slow_loop(
    beta: float, D: int, alpha: float, sgc: str | None, detach_reset: bool
) -> None:
    arguments = {"beta": beta, "D": D, "alpha": alpha, "sgc": sgc, "detach_reset": detach_reset, "step_mode": "m"}
    node = TILIF(num_channels=CHANNELS, learn_threshold=True, **arguments).double()
    node.v_threshold = torch.linspace(0.4, 1.6, CHANNELS, dtype=torch.float64)
    x_seq = draw(5, 4, CHANNELS, dtype=torch.float64).requires_grad_()
    v = draw(4, CHANNELS, dtype=torch.float64, seed=1).requires_grad_()
    weights = draw(5, 4, CHANNELS, dtype=torch.float64, seed=2)
    at_last_v = draw(4, CHANNELS, dtype=torch.float64, seed=3)
    node.v = v
    ((node(x_seq) * weights).sum() + (node.v * at_last_v).sum()).backward()
    expected = [torch.zeros_like(leaf) for leaf in (x_seq, v, node.a)]
    for n in range(4):
        for c, V in enumerate(node.v_threshold.tolist()):
            at = (slice(None), n, c)
            at_x, at_v, at_a = tilif_gradient(
                node, x_seq[at].tolist(), v.detach()[n, c].item(), V, weights[at].tolist(), at_last_v[n, c].item()
            )
            expected[0][at] = torch.tensor(at_x, dtype=torch.float64)
            expected[1][n, c] = at_v
            expected[2][c] += at_a
    for leaf, gradient in zip((x_seq, v, node.a), expected, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(leaf.grad, gradient)


@both_step_modes
@every_neuron
def test_gradients_reach_the_input_the_first_membrane_and_the_parameters(name: str, step_mode: str) -> None:
    node, x = make(name, step_mode=step_mode), x_for(step_mode).requires_grad_()
    v = draw(3, CHANNELS, seed=1).requires_grad_()
    node.v = v
    found = torch.autograd.grad((node(x) * draw(*x.shape, seed=2)).sum(), [x, v, *node.parameters()])
    first = found[0][0] if step_mode == "m" else found[0]
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in (first, *found[1:]))
    if step_mode == "m":
        takes_later_input = not name.startswith("ATMN") or "every" in name
        assert bool(found[0][1:].any()) == takes_later_input


# In SpikingJelly's networks and tools


@pytest.mark.parametrize(
    "build",
    [ATMN, partial(TILIF, learn_threshold=True), partial(BinaryIF, learn_threshold=True)],
    ids=["ATMN", "TILIF", "BinaryIF"],
)
def test_convolutional_network(build: Callable[..., DynamicsNode]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        build(num_channels=4, channel_dim=1),
        layer.Conv2d(4, 3, 3, padding=1, bias=False),
        layer.BatchNorm2d(3),
        build(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(27, 5),
    )
    functional.set_step_mode(net, "m")
    x_seq, target = draw(4, 2, 2, 6, 6), torch.tensor([1, 3])
    nn.functional.cross_entropy(net(x_seq).mean(0), target).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    net.eval()
    functional.reset_net(net)
    together = net(x_seq)
    assert together.shape == (4, 2, 5)
    functional.reset_net(net)
    container = net[0]
    functional.set_step_mode(net[1:], "s")
    one_at_a_time = torch.stack([net[1:](frame) for frame in container(x_seq)])
    torch.testing.assert_close(one_at_a_time, together)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SpikingJelly's monitors. Their module imports TensorBoard, for another class than those used here."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    return importlib.import_module("spikingjelly.activation_based.monitor")


@every_neuron
def test_monitors(name: str, monitor: ModuleType) -> None:
    net, x_seq = network(name), draw(4, 3, 5)
    for node in (net[1], net[3]):
        node.store_v_seq = True
    spikes = monitor.OutputMonitor(net, instance=DynamicsNode)
    membranes = monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=DynamicsNode)
    last = monitor.AttributeMonitor("v", pre_forward=False, net=net, instance=DynamicsNode)
    out = net(x_seq)
    assert spikes.monitored_layers == membranes.monitored_layers == last.monitored_layers == ["1", "3"]
    assert torch.equal(spikes["3"][0], out)
    assert membranes["1"][0].shape == (4, 3, CHANNELS)
    assert torch.equal(membranes["3"][0], net[3].v_seq)
    assert torch.equal(last["3"][0], net[3].v_seq[-1])
    for used in (spikes, membranes, last):
        used.remove_hooks()
    net(x_seq)
    assert len(spikes.records) == 2


@every_neuron
def test_it_is_a_base_node(name: str) -> None:
    """What op_counter, precision and others of SpikingJelly test for; never a node whose own steps they would run."""
    node = make(name)
    assert isinstance(node, BaseNode)
    assert not isinstance(node, (neuron.IFNode, neuron.LIFNode))
    assert isinstance(node, base.MemoryModule)
    assert "v" in dict(node.named_memories())


@needs_2
@every_neuron
def test_op_counter_counts_the_state(name: str) -> None:
    from spikingjelly.activation_based import op_counter

    net, x_seq = network(name), draw(4, 3, 5)
    counter = op_counter.NeuromorphicMemoryAccessCounter()
    with op_counter.ModuleCounterMode([counter], model=net):
        net(x_seq)
    counts = counter.get_counts()
    assert counts["Global"]["neuron_state_read_bytes"] == 2 * 4 * (4 * 3 * CHANNELS), counts  # nodes, steps, bytes of v


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            ATMN(num_channels=3),
            "tau=1, T=4, frame_weight=1, inject=first, num_channels=3, detach_reset=False, step_mode=s, backend=auto",
        ),
        (
            TILIF(channel_dim=1, num_channels=2, step_mode="m"),
            "D=4, beta=1, alpha=1, sgc=None, num_channels=2, channel_dim=1, detach_reset=False, step_mode=m, "
            "backend=auto",
        ),
        (
            BinaryIF(beta=0.5, v_threshold=0.5, reset_delay=True, backend="torch"),
            "beta=0.5, v_reset=None, reset_delay=True, v_threshold=0.5, detach_reset=False, step_mode=s, backend=torch",
        ),
    ],
)
def test_repr(node: DynamicsNode, text: str) -> None:
    assert node.extra_repr() == text
    assert repr(node).startswith(type(node).__name__ + "(")
    assert text in repr(node)
