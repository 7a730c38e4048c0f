"""What is time and what is a batch: the same network must count alike however its steps run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from spikelm.energy import report
from spikelm.energy.time_axis import entries_taken, keeps_first_axis
from spikelm.errors import SpikelmError

X = 3 * torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
X_SEQ = 3 * torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(1))


def network(mode: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(8, 16, bias=False), neuron.IFNode(), layer.Linear(16, 4, bias=False))
    functional.set_step_mode(net, mode)
    return net


class Around(nn.Module):
    """A network called by a function of it and the input."""

    def __init__(self, mode: str, run: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.run = network(mode), run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self.net, x)


def counted(model: nn.Module, x: Any, **options: Any) -> dict[str, Any]:
    phase: dict[str, Any] = report(model, x, **options).data["phases"]["forward"]
    return phase


def sums(phase: dict[str, Any]) -> list[tuple[float, ...]]:
    """Units, and MAC of one pass and executed of every product."""
    return [(phase["units"],)] + [(row["mac"], row["mac_executed"]) for row in phase["products"]]


ONE_PASS = [(128.0, 512.0), (64.0, 256.0)]  # of four time steps
ON_A_SEQUENCE: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], Any]]] = {
    "as it is": ("m", lambda net, x: net(x)),
    "reordered": ("m", lambda net, x: net(x.flip(2) * 2)),
    "by keyword": ("m", lambda net, x: net[2](net[1](x_seq=net[0](x)))),
    "folded": ("m", lambda net, x: net[2](net[1](fold(net, x)))),
    "for x in x_seq": ("s", lambda net, x: torch.stack([net(step) for step in x])),
    "x_seq[t]": ("s", lambda net, x: sum(net(x[step]) for step in range(4))),
    "x_seq[t : t + 1]": ("s", lambda net, x: sum(net(x[step : step + 1].squeeze(0)) for step in range(4))),
    "split": ("s", lambda net, x: sum(net(step[0]) for step in x.split(1))),
    "multi_step_forward": ("s", lambda net, x: functional.multi_step_forward(x, net)),
}


def fold(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A plain layer on [T * N, *]."""
    current = nn.functional.linear(x.flatten(0, 1), net[0].weight)
    return current.view(*x.shape[:2], -1)


@pytest.mark.parametrize("name", ON_A_SEQUENCE)
@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 4, 8)])
def test_a_sequence_is_counted_by_its_samples(name: str, shape: tuple[int, ...]) -> None:
    mode, run = ON_A_SEQUENCE[name]
    assert sums(counted(Around(mode, run), 3 * torch.rand(shape))) == [(shape[1],), *ONE_PASS]


ON_A_BATCH: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], Any]]] = {
    "repeat": ("m", lambda net, x: net(x.unsqueeze(0).repeat(4, 1, 1)).mean(0)),
    "repeat without a new axis": ("m", lambda net, x: net(x.repeat(4, 1).view(4, *x.shape))),
    "expand": ("m", lambda net, x: net(x.expand(4, *x.shape))),
    "stack": ("m", lambda net, x: net(torch.stack([x] * 4))),
    "cat": ("m", lambda net, x: net(torch.cat([x] * 4).view(4, *x.shape))),
    "noise": ("m", lambda net, x: net(x + torch.ones(4, *x.shape))),
    "loop": ("s", lambda net, x: sum(net(x) for _ in range(4))),
}


@pytest.mark.parametrize("name", ON_A_BATCH)
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_time_may_begin_within_the_network(name: str, samples: int) -> None:
    """Also where there are as many samples as time steps."""
    mode, run = ON_A_BATCH[name]
    assert sums(counted(Around(mode, run), 3 * torch.rand(samples, 8))) == [(samples,), *ONE_PASS]


def test_a_batch_before_time() -> None:
    """[N, T, C], turned within."""
    model = Around("m", lambda net, x: net(x.transpose(0, 1)))
    assert sums(counted(model, X_SEQ.transpose(0, 1))) == [(3,), *ONE_PASS]
    assert sums(counted(Around("m", lambda net, x: net(x.permute(1, 0, 2))), torch.rand(4, 4, 8)))[0] == (4,)


def test_both_step_modes_count_alike() -> None:
    one, other = (
        counted(Around("m", lambda net, x: net(x)), X_SEQ),
        counted(Around("s", lambda net, x: [net(step) for step in x]), X_SEQ),
    )
    assert one["neurons"] == other["neurons"]
    assert one["neurons"][0]["bytes"] == {"reuse_over_T": 8 * 16.0, "no_reuse": 4 * 8 * 16.0}
    for key in ("mac", "mac_executed", "accumulations", "frames", "levels", "sum_of_rates"):
        assert [row[key] for row in one["products"]] == [row[key] for row in other["products"]], key
    assert one["energy"]["model"]["bytes"]["reuse_over_T"] == other["energy"]["model"]["bytes"]["reuse_over_T"]


@pytest.mark.parametrize("mode", ["s", "m"])
def test_a_sequence_of_one_step(mode: str) -> None:
    phase = counted(network("m"), X_SEQ[:1]) if mode == "m" else counted(network("s"), X_SEQ[0])
    assert sums(phase) == [(3,), (128.0, 128.0), (64.0, 64.0)]


def test_steps_and_then_all_at_once() -> None:
    """The first layers run step by step, the last ones take the sequence that this makes."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = network("s"), network("m")
            self.between = nn.Linear(4, 8, bias=False)

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return self.back(torch.stack([self.between(self.front(x)) for x in x_seq]))

    phase = counted(Both(), X_SEQ)
    assert sums(phase) == [(3,), *ONE_PASS, (32.0, 128.0), *ONE_PASS]


# ---- what is called several times, and is no time


class Towers(nn.Module):
    """Two inputs through the same layers."""

    def __init__(self, reset: bool, steps: int = 1) -> None:
        super().__init__()
        self.net, self.reset, self.steps = network("s"), reset, steps

    def tower(self, x: torch.Tensor) -> torch.Tensor:
        found = sum(self.net(x) for _ in range(self.steps))
        if self.reset:
            functional.reset_net(self.net)
        return found

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.tower(a) - self.tower(b)


BOTH = {"a": X, "b": X.flip(0)}


def test_a_reset_ends_time() -> None:
    phase = counted(Towers(reset=True), BOTH)
    assert sums(phase) == [(3,), (256.0, 256.0), (128.0, 128.0)]
    assert phase["products"][1]["levels"] == 2 and phase["products"][1]["bits"] == 1


def test_every_run_from_rest_to_rest_is_a_pass() -> None:
    model = Towers(reset=True, steps=4)
    phase = counted(model, BOTH)
    assert sums(phase) == [(3,), (256.0, 1024.0), (128.0, 512.0)]
    alone = [counted(Around("s", lambda net, x: [net(x) for _ in range(4)]), x) for x in BOTH.values()]
    rates = [one["products"][1]["sum_of_rates"] for one in alone]
    found = phase["products"][1]["sum_of_rates"]
    assert found["mean"] == pytest.approx((rates[0]["mean"] + rates[1]["mean"]) / 2) and found["mean"] > 0
    assert found["p95"] == pytest.approx(max(rate["p95"] for rate in rates), rel=0.05), "spread over tokens of a pass"
    assert phase["products"][1]["frames"] == 4


def test_time_steps_say_what_calls_do_not() -> None:
    model = Towers(reset=False)
    assert sums(counted(model, BOTH)) == [(3,), (128.0, 256.0), (64.0, 128.0)], "read as two steps of one input"
    assert sums(counted(model, BOTH, time_steps=1)) == [(3,), (256.0, 256.0), (128.0, 128.0)]
    model = Towers(reset=False, steps=4)
    assert sums(counted(model, BOTH, time_steps=4)) == [(3,), (256.0, 1024.0), (128.0, 512.0)]
    with pytest.raises(SpikelmError, match="time_steps must be how many steps the neurons run, 8 here; got 3"):
        report(model, BOTH, time_steps=3)
    for mode in ("m", "s"):
        model = Around(mode, lambda net, x: net(x) if net[1].step_mode == "m" else [net(step) for step in x])
        assert sums(counted(model, X_SEQ, time_steps=4)) == [(3,), *ONE_PASS]
    stateless = Around("s", lambda net, x: sum(net[0](x) for _ in range(4)))
    assert sums(counted(stateless, X)) == [(3,), (512.0, 512.0)]
    assert sums(counted(stateless, X, time_steps=4)) == [(3,), (128.0, 512.0)]


def test_what_runs_once_beside_the_loop_is_counted_once() -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc, self.neuron = nn.Embedding(10, 8), nn.Linear(8, 4), neuron.IFNode()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids).tanh()
            return torch.stack([self.neuron(self.fc(x)) for _ in range(4)])

    phase = counted(Encoded(), {"input_ids": torch.arange(6).view(2, 3)})
    entries = {(row["scope"], row["group"]): row for row in phase["elementwise"]}
    assert phase["units"] == 6
    assert entries["embedding", "embedding"]["once"] == {"bytes": 32.0}
    assert entries["", "elementwise"]["once"] == entries["", "elementwise"]["executed"] == {"function": 8.0}
    assert entries["fc", "bias"]["once"] == {"accumulation": 4.0}
    assert entries["fc", "bias"]["executed"] == {"accumulation": 16.0}
    assert all(moved["embedding"] == 32.0 for moved in phase["energy"]["model"]["bytes"].values())


def test_a_layer_used_twice_before_the_loop_is_two_layers() -> None:
    model = Around("s", lambda net, x: [net[1](y) for y in [net[0](x) + net[0](2 * x)] for _ in range(4)])
    assert sums(counted(model, X)) == [(3,), (256.0, 256.0)]


def test_calls_beside_the_loop_are_told_from_those_in_it() -> None:
    """The same layer, the same function, of the same size: once before four steps, and in each; three times on a way
    back."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(x), 16)
        net[0](x).tanh()
        for step in range(4):
            current = net[0](x).tanh()
            found = net[1](current if step == 0 else current + found)
        return found

    phase = counted(Around("s", run), X)
    assert sums(phase) == [(3,), (256.0, 5 * 128.0)]
    (row,) = phase["elementwise"]
    assert row["once"] == {"function": 2 * 16.0, "accumulation": 16.0}
    assert row["executed"] == {"function": 5 * 16.0, "accumulation": 3 * 16.0}


# ---- following the axis


def test_the_first_axis_through_operators() -> None:
    x, square = torch.rand(4, 3, 8), torch.rand(4, 4)
    kept = [("view", x, [x, [12, 8]], x.view(12, 8)), ("sum", x, [x, [2]], x.sum(2)), ("relu", x, [x], x.relu())]
    kept += [("unsqueeze", x, [x, 1], x.unsqueeze(1)), ("mm", square, [square, square.T], square @ square.T)]
    lost = [("view", x, [x, [2, 48]], x.view(2, 48)), ("sum", x, [x, [0]], x.sum(0)), ("t", square, [square], square.T)]
    lost += [("max", x, [x], x.max()), ("index", square, [square, [torch.arange(4)]], square[torch.arange(4)])]
    lost += [("unsqueeze", square, [square, 0], square[None]), ("mm", square, [square.T, square], square.T @ square)]
    lost += [("transpose", square, [square, -1, -2], square.T), ("select", x, [x, 0, 1], x[1])]
    for expected, cases in ((True, kept), (False, lost)):
        for name, tensor, args, out in cases:
            assert keeps_first_axis(name, tensor, 4, args, out) is expected, name
    assert entries_taken("select", x, [x, 0, -1]) == range(3, 4)
    assert entries_taken("unbind", x, [x]) == range(4)
    assert not entries_taken("select", x, [x, 1, 0]) and not entries_taken("slice", x, [x, 0, 0, 2])


def test_copies_count_alike() -> None:
    model = Around("m", lambda net, x: net(x))
    report(model, X_SEQ)
    assert sums(counted(copy.deepcopy(model), X_SEQ)) == sums(counted(model, X_SEQ))
