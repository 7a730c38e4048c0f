"""Banks of neurons: which leak, and what they keep is an activation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from spikelm.energy import report
from spikelm.energy.populations import Population, leaks, restarts_of
from spikelm.neurons import ATMN, BinaryIF

X = 3 * torch.rand(3, 8, generator=torch.Generator().manual_seed(0))


class ReadsState(nn.Module):
    """Four steps, and then a readout of what the neurons keep."""

    def __init__(self, bank: Any, read: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.bank, self.outer = nn.Linear(8, 16, bias=False), bank, nn.Linear(16, 4, bias=False)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            self.bank(self.inner(x))
        return self.outer(self.read(self.bank))


def snntorch_leaky(**options: Any) -> nn.Module:
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    leaky: nn.Module = snntorch.Leaky(beta=0.9, **options)
    return leaky


BANKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.Tensor]]] = {
    "spikingjelly": (neuron.IFNode, lambda bank: bank.v),
    "ours": (BinaryIF, lambda bank: bank.v),
    "stored sequence": (lambda: neuron.LIFNode(store_v_seq=True), lambda bank: bank.v_seq[-1]),
    "snntorch": (lambda: snntorch_leaky(init_hidden=True), lambda bank: bank.mem),
}


@pytest.mark.parametrize("name", BANKS)
def test_a_readout_of_membranes_is_counted(name: str) -> None:
    make, read = BANKS[name]
    inner, outer = report(ReadsState(make(), read), X).data["phases"]["forward"]["products"]
    assert (inner["mac"], inner["mac_executed"]) == (128.0, 512.0)
    assert outer["scope"] == "outer" and not outer["spiking"]
    assert outer["mac"] == outer["mac_executed"] == outer["mac_dense"] == 64.0


def test_stored_membranes_have_a_time_axis() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = neuron.LIFNode(step_mode="m", store_v_seq=True)
            self.outer = nn.Linear(8, 4, bias=False)

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            self.bank(x_seq)
            return self.outer(self.bank.v_seq)

    (row,) = report(Sequence(), torch.rand(5, 3, 8)).data["phases"]["forward"]["products"]
    assert (row["mac"], row["mac_executed"]) == (32.0, 5 * 32.0)


def test_which_neurons_leak() -> None:
    leaking = [neuron.LIFNode(), neuron.ParametricLIFNode(), neuron.QIFNode(), neuron.EIFNode(), BinaryIF(beta=0.9)]
    whole = [neuron.IFNode(), neuron.IFNode(v_reset=None), BinaryIF(), ATMN(tau=1.0)]
    assert all(leaks(bank) for bank in leaking) and not any(leaks(bank) for bank in whole)
    phase = report(neuron.ParametricLIFNode(), X).data["phases"]["forward"]
    assert phase["neurons"][0]["multiplications"] == phase["neurons"][0]["updates"] == 8.0


def test_snntorch_leaks_by_beta() -> None:
    assert leaks(snntorch_leaky())
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    assert not leaks(snntorch.Leaky(beta=1.0))


def test_runs_from_rest_to_rest() -> None:
    bank = Population()
    bank.rested()  # a reset before the first call
    for steps in (3, 3, 2):
        bank.stepped(steps)
    for _ in range(2):
        bank.rested()
    bank.stepped(8)
    assert bank.runs == [[3, 8], [1, 8]] and bank.calls == 4
    assert restarts_of([bank]) == 2 and restarts_of([]) == 1
