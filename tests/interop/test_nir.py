"""What NIR can say arrives as it is; everything else is refused."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch.export_nir import export_to_nir as snntorch_export_to_nir
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from spikelm import neurons
from spikelm.errors import SpikelmError
from spikelm.interop import snntorch as adapters
from spikelm.interop.nir import to_spikingjelly
from spikelm.neurons import ATMN, TILIF, BinaryIF

needs_nir_exchange = pytest.mark.skipif(
    importlib.util.find_spec("spikingjelly.activation_based.nir_exchange") is None,
    reason="this SpikingJelly has no nir_exchange (2.0 has)",
)


def export_to_nir(net: nn.Module, example: torch.Tensor) -> Any:
    from spikingjelly.activation_based import nir_exchange

    return nir_exchange.export_to_nir(net, example, dt=1e-3)


def network(first: nn.Module, second: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(layer.Linear(6, 5), first, nn.Sequential(layer.Linear(5, 4, bias=False), second))


def binary_network() -> nn.Sequential:
    """IF and LIF, the second nested."""
    return network(BinaryIF(v_threshold=0.7, v_reset=0.0), BinaryIF(beta=0.75, v_threshold=0.5, v_reset=0.0))


def random_input(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# to_spikingjelly


def test_replaces_the_neurons_of_a_copy() -> None:
    net = binary_network()
    net[1].detach_reset = True
    functional.set_step_mode(net, "m")
    net.eval()
    converted = to_spikingjelly(net)
    assert (type(net[1]), type(net[2][1])) == (BinaryIF, BinaryIF)
    assert type(converted[1]) is neuron.IFNode
    assert (converted[1].v_threshold, converted[1].v_reset, converted[1].detach_reset) == (0.7, 0.0, True)
    assert type(converted[2][1]) is neuron.LIFNode
    assert (converted[2][1].tau, converted[2][1].decay_input, converted[2][1].v_threshold) == (4.0, False, 0.5)
    assert all(module.step_mode == "m" and not module.training for module in (converted[1], converted[2][1]))
    assert torch.equal(converted[0].weight, net[0].weight)
    assert converted[0].weight is not net[0].weight


@given(st.floats(0.01, 0.99) | st.just(1.0), st.floats(0.1, 3.0), st.integers(0, 2**31))
def test_the_copy_computes_the_same(beta: float, threshold: float, seed: int) -> None:
    ours = BinaryIF(beta=beta, v_threshold=threshold, v_reset=0.0, step_mode="m", store_v_seq=True).double()
    theirs = to_spikingjelly(ours)
    x_seq = 2 * torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ours(x_seq), theirs(x_seq))
    torch.testing.assert_close(ours.v_seq, theirs.v_seq)


def test_if_may_reset_to_any_value() -> None:
    ours = BinaryIF(v_reset=-0.3, step_mode="m")
    theirs, x_seq = to_spikingjelly(ours), random_input(8, 64)
    assert torch.equal(ours(x_seq), theirs(x_seq))
    assert torch.equal(ours.v, theirs.v)


def test_a_shared_neuron_stays_shared_and_a_net_in_use_is_copied_at_rest() -> None:
    shared = BinaryIF(v_reset=0.0)
    net = nn.Sequential(layer.Linear(3, 3), shared, layer.Linear(3, 3), shared)
    net(torch.randn(2, 3))
    assert not shared.v.is_leaf, "the membrane belongs to a graph, which deepcopy cannot copy"
    converted = to_spikingjelly(net)
    assert converted[1] is converted[3]
    assert converted[1].v == 0.0


def test_without_spikelm_neurons_it_is_a_plain_copy() -> None:
    net = nn.Sequential(layer.Linear(2, 2), neuron.IFNode())
    converted = to_spikingjelly(net)
    assert type(converted[1]) is neuron.IFNode
    assert converted[1] is not net[1]


class OwnNeuron(BinaryIF):
    """Somebody's neuron, with other equations perhaps."""


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (ATMN, "NIR cannot say .*ATMN with ternary spikes"),
    (TILIF, "NIR cannot say .*TILIF with integer spikes"),
    (BinaryIF, "NIR cannot say .*BinaryIF with a soft reset"),
    (lambda: BinaryIF(beta=0.9, reset_delay=True), "a soft reset"),
    (lambda: BinaryIF(v_reset=0.0, num_channels=4), "a per-channel or learned threshold"),
    (lambda: BinaryIF(v_reset=0.0, learn_threshold=True), "a per-channel or learned threshold"),
    (lambda: BinaryIF(beta=1.5, v_reset=0.0, allow_growth=True), "beta=1.5: NIR's neurons leak or hold"),
    (lambda: BinaryIF(beta=0.9, v_reset=-0.1), "beta=0.9 and v_reset=-0.1: LIFNode leaks towards v_reset"),
    (lambda: BinaryIF(beta=1e-20, v_reset=0.0), "beta=1e-20: LIFNode's tau"),
    (lambda: BinaryIF(v_reset=0.0, surrogate_function=surrogate.ATan(spiking=False)), "a smooth primitive"),
    (lambda: OwnNeuron(v_reset=0.0), "OwnNeuron with equations of its own"),
    (adapters.ATMN, "NIR cannot say .*ATMN with ternary spikes"),
    (lambda: adapters.BinaryIF(reset_mechanism="zero"), "NIR cannot say .*BinaryIF with equations of its own"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_refuses_what_nir_cannot_say(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(SpikelmError, match=reason) as error:
        to_spikingjelly(network(BinaryIF(v_reset=0.0), build()))
    assert str(error.value).startswith("2.1: ")
    assert "\n" not in str(error.value)
    with pytest.raises(SpikelmError, match="the network: NIR cannot say"):
        to_spikingjelly(build())


# SpikingJelly's exporter


@needs_nir_exchange
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_exported_graph_holds_the_parameters(step_mode: str) -> None:
    net, dt = binary_network(), 1e-3
    functional.set_step_mode(net, step_mode)
    graph = export_to_nir(to_spikingjelly(net), random_input(*[3, 2, 6][step_mode == "s" :]))
    (integrate,) = (node for node in graph.nodes.values() if isinstance(node, nir.IF))
    (leaky,) = (node for node in graph.nodes.values() if isinstance(node, nir.LIF))
    np.testing.assert_allclose(integrate.v_threshold, np.full(5, 0.7))
    np.testing.assert_allclose(integrate.v_reset, np.zeros(5))
    np.testing.assert_allclose(integrate.r, np.full(5, 1 / dt))
    np.testing.assert_allclose(leaky.v_threshold, np.full(4, 0.5))
    np.testing.assert_allclose(leaky.v_reset, np.zeros(4))
    np.testing.assert_allclose(leaky.v_leak, np.zeros(4))
    # Euler's step of tau dv/dt = -v + r I over dt: v + dt / tau (r I - v) = beta v + I
    np.testing.assert_allclose(1 - dt / leaky.tau, np.full(4, 0.75))
    np.testing.assert_allclose(leaky.r * dt / leaky.tau, np.ones(4))


@needs_nir_exchange
def test_export_and_import_give_the_same_spikes() -> None:
    from spikingjelly.activation_based import nir_exchange

    net, x_seq = binary_network(), random_input(10, 3, 6)
    imported = nir_exchange.import_from_nir(export_to_nir(to_spikingjelly(net), x_seq[0]), dt=1e-3)
    state, count = None, 0
    for x in x_seq:
        spikes, state = imported(x, state)
        assert torch.equal(spikes, net(x))
        count += int(spikes.sum())
    assert count >= 10


@needs_nir_exchange
@pytest.mark.parametrize("build", [ATMN, TILIF, BinaryIF, lambda: BinaryIF(v_reset=0.0)])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spikingjellys_exporter_refuses_a_spikelm_neuron(build: Callable[[], nn.Module], step_mode: str) -> None:
    net = network(neuron.IFNode(), build())
    functional.set_step_mode(net, step_mode)
    x = random_input(*[3, 2, 6][step_mode == "s" :])
    with pytest.raises(SpikelmError, match="interop.nir.to_spikingjelly"):
        export_to_nir(net, x)
    with pytest.raises(SpikelmError, match="interop.nir.to_spikingjelly"):
        export_to_nir(net[2][1], net[0](x))
    assert isinstance(net[2][1], neurons.DynamicsNode)


# snnTorch's exporter


def snntorch_network(build: Callable[..., nn.Module]) -> nn.Sequential:
    """With one beta and threshold a neuron, because nir 1.0.8 refuses the scalars that snnTorch 1.0.0 writes."""
    return nn.Sequential(
        nn.Linear(3, 4),
        snn.Leaky(torch.full((4,), 0.9), torch.ones(4), init_hidden=True),
        nn.Linear(4, 2),
        build(torch.full((2,), 0.9), torch.ones(2), init_hidden=True, output=True),
    )


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph is being deprecated:DeprecationWarning")
@pytest.mark.parametrize("build", [adapters.ATMN, adapters.TILIF, adapters.BinaryIF])
def test_snntorchs_exporter_refuses_the_adapters_alone(build: Callable[..., nn.Module]) -> None:
    sample = torch.randn(1, 3)
    with pytest.raises(SpikelmError, match=f"NIR has no primitive for {build.__name__} of spikelm.interop.snntorch"):
        snntorch_export_to_nir(snntorch_network(build), sample, ignore_dims=[0])
    graph = snntorch_export_to_nir(snntorch_network(snn.Leaky), sample, ignore_dims=[0])
    assert sum(isinstance(node, nir.LIF) for node in graph.nodes.values()) == 2


def test_the_guard_holds_for_an_exporter_imported_earlier(repository: Path) -> None:
    code = """
import torch
from snntorch.export_nir import export_to_nir
from spikelm.interop.snntorch import BinaryIF
try:
    export_to_nir(torch.nn.Sequential(torch.nn.Linear(3, 2), BinaryIF(torch.ones(2), torch.ones(2))), torch.ones(1, 3))
except ValueError as error:
    print(type(error).__name__)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert result.stdout == "SpikelmError\n"


def test_the_adapters_import_where_nir_does_not(repository: Path) -> None:
    code = """
import sys
sys.modules["nir"] = None
from spikelm.interop.snntorch import BinaryIF
print(BinaryIF(beta=0.5).beta.item())
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert result.stdout == "0.5\n"
