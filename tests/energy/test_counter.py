"""OperationCounter: which operators multiply, how often, in which module; and that it does not guess."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikelm.energy import OperationCounter
from spikelm.errors import SpikelmError
from spikelm.layers import SpikingLinear
from spikelm.neurons import ATMN, TILIF

x, y = torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 0.5
INDICES, OFFSETS, TABLE = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([0, 3]), torch.rand(3, 4)

COUNTS: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "mm": (lambda: x @ y.T, {"multiplication": 3 * 4 * 3}),
    "mv": (lambda: x @ y[0], {"multiplication": 3 * 4}),
    "dot": (lambda: x[0] @ y[0], {"multiplication": 4}),
    "bmm": (lambda: x.expand(5, 3, 4) @ y.T.expand(5, 4, 3), {"multiplication": 5 * 36}),
    "addmm": (lambda: F.linear(x, TABLE, torch.ones(3)), {"multiplication": 36}),
    "einsum": (lambda: torch.einsum("ij,kj->ik", x, y), {"multiplication": 36}),
    "mul": (lambda: x * y[:1], {"multiplication": 12}),
    "in place": (lambda: x.clone().mul_(2), {"multiplication": 12}),
    "integers": (lambda: INDICES * 2, {"multiplication": 5}),
    "div": (lambda: x / 3, {"multiplication": 12}),
    "pow": (lambda: x**2, {"multiplication": 12}),
    "addcmul": (lambda: torch.addcmul(x, x, y), {"multiplication": 12}),
    "depthwise": (
        lambda: F.conv1d(torch.ones(2, 4, 9), torch.ones(4, 1, 3), groups=4),
        {"multiplication": 2 * 4 * 7 * 3},
    ),
    "convolution": (lambda: F.conv1d(torch.ones(2, 4, 9), torch.ones(5, 4, 3)), {"multiplication": 2 * 5 * 7 * 12}),
    "transposed": (
        lambda: F.conv_transpose1d(torch.ones(2, 4, 9), torch.ones(4, 5, 3)),
        {"multiplication": 2 * 4 * 9 * 15},
    ),
    "add": (lambda: x + y, {"accumulation": 12}),
    "scaled add": (lambda: torch.add(x, y, alpha=2), {"multiplication": 12}),
    "sub": (lambda: 1 - x, {"accumulation": 12}),
    "sum": (lambda: x.sum(0), {"accumulation": 12}),
    "cumsum": (lambda: x.cumsum(0), {"accumulation": 12}),
    "mean": (lambda: x.mean(0), {"accumulation": 12, "multiplication": 4}),
    "index_add": (lambda: TABLE.index_add(0, INDICES, torch.ones(5, 4)), {"accumulation": 20}),
    "scaled index_add": (lambda: TABLE.index_add(0, INDICES, torch.ones(5, 4), alpha=2), {"multiplication": 20}),
    "index_put": (lambda: TABLE.index_put((INDICES,), torch.ones(5, 4), accumulate=True), {"accumulation": 12}),
    "layer norm": (lambda: F.layer_norm(x, (4,)), {"multiplication": 36, "accumulation": 36}),
    "average pool": (lambda: F.avg_pool2d(x[None, None], (3, 2)), {"accumulation": 12, "multiplication": 2}),
    "shifts and masks": (lambda: (INDICES >> 1 & 3 | INDICES << 2) ^ INDICES.clone().__ior__(1), {}),
    "bag": (lambda: F.embedding_bag(INDICES, TABLE, OFFSETS, mode="sum"), {"accumulation": 20}),
    "mean bag": (
        lambda: F.embedding_bag(INDICES, TABLE, OFFSETS, mode="mean"),
        {"accumulation": 20, "multiplication": 8},
    ),
    "largest of a bag": (lambda: F.embedding_bag(INDICES, TABLE, OFFSETS, mode="max"), {}),
    "weighted bag": (
        lambda: F.embedding_bag(INDICES, TABLE, OFFSETS, mode="sum", per_sample_weights=torch.ones(5)),
        {"accumulation": 20, "multiplication": 20},
    ),
    "exp": (lambda: x.exp(), {"function": 12}),
    "silu": (lambda: F.silu(x), {"function": 12}),
    "softmax": (lambda: x.softmax(-1), {"function": 12}),
    "comparison": (lambda: torch.where(x > y, x, y).clamp(0, 1).round().sign(), {}),
    "movement": (lambda: torch.cat([x.T.reshape(2, 6), x.view(2, 6)])[1:].contiguous(), {}),
    "selection": (lambda: TABLE.index_select(0, INDICES)[(INDICES > 0).nonzero()], {}),
}


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", COUNTS)
def test_kinds_and_numbers(name: str, context: Callable[[], object]) -> None:
    run, expected = COUNTS[name]
    with context(), OperationCounter() as counter:
        run()
    kinds = ("multiplication", "accumulation", "function", "neuron", "unknown")
    assert {kind: n for kind in kinds if (n := counter.number(kind))} == expected


def test_what_is_not_known_is_listed() -> None:
    library, matrix = torch.library.Library("spikelm_counter_test", "DEF"), torch.eye(3)
    try:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: x + x + x, "CPU")
        with OperationCounter() as counter:
            torch.ops.spikelm_counter_test.triple(x)
            torch.linalg.cholesky_ex(matrix)
            torch.linalg.qr(matrix)
    finally:
        library._destroy()
    assert counter.operators("unknown") == {
        "spikelm_counter_test::triple": 1,
        "aten::linalg_cholesky_ex": 1,
        "aten::linalg_qr": 1,
    }
    assert counter.number("multiplication") == 0


class Net(nn.Module):
    """Two dense layers, and a spiking one behind a bank that a fourth shares."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.SiLU(), nn.Linear(8, 4, bias=False))
        self.gate = SpikingLinear.from_linear(nn.Linear(4, 6), ATMN(num_channels=4))
        self.up = SpikingLinear.from_linear(nn.Linear(4, 6), self.gate.neuron, shares_with=self.gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.block(x)
        return self.gate(hidden) * self.up(hidden.clone())


@torch.no_grad()
def test_scopes_are_modules() -> None:
    net = Net()
    with OperationCounter(net) as counter:
        net(x)
    assert counter.number("multiplication", "block.0") == 3 * 32
    assert counter.number("multiplication", "block") == 3 * 64
    assert counter.number("multiplication", "block", below=False) == 0
    assert counter.operators("function", "block") == {"aten::silu": 1}
    assert (
        counter.operators("multiplication", "gate") == counter.operators("multiplication", "up") == {"aten::addmm": 1}
    )
    assert counter.number("multiplication") == 3 * (64 + 48) + 18
    assert counter.operators("multiplication", "", below=True) == {"aten::mm": 2, "aten::addmm": 2, "aten::mul": 1}
    assert counter.operators("neuron", "gate.neuron") == {"spikelm::encode_sum": 2}  # the owner's, for both
    assert counter.operators("neuron", "gate", below=False) == {}
    assert counter.number("neuron") == 24


def test_the_reference_of_a_neuron_is_counted_in_its_scope() -> None:
    layer = SpikingLinear.from_linear(nn.Linear(4, 6), TILIF(num_channels=4, backend="torch"))
    with torch.no_grad(), OperationCounter(layer) as counter:
        layer(x)
    assert counter.operators("multiplication", "neuron")["aten::div"] == 1
    assert counter.operators("multiplication", "neuron").keys().isdisjoint({"aten::addmm"})
    outside = counter.number("multiplication") - counter.number("multiplication", "neuron")
    assert outside == 3 * 24
    assert counter.operators("unknown") == {}


def test_it_leaves_no_trace_even_after_an_error() -> None:
    net = Net()
    counter = OperationCounter(net)
    for data in (x, torch.ones(3, 5)):
        try:
            with counter:
                net(data)
        except RuntimeError as error:
            assert "shapes cannot be multiplied" in str(error)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert not {"encode", "encode_sum"} & net.gate.neuron.__dict__.keys()
    first = counter.number("multiplication", "block")
    with counter:  # goes on counting
        net(x)
    assert counter.number("multiplication", "block") == 2 * first
    with counter:
        x * y
    assert counter.operators("multiplication", "", below=False) == {"aten::mul": 4 - 1}


def test_an_error_within_a_module_leaves_its_scope() -> None:
    net = Net()
    with OperationCounter(net) as counter:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(torch.ones(3, 5))
        with pytest.raises(SpikelmError, match="has 4 channels"):
            net.gate(torch.ones(3, 5))
        x * y
    assert counter.operators("multiplication", "", below=False) == {"aten::mul": 1}


def test_what_it_refuses() -> None:
    with pytest.raises(SpikelmError, match=r"model must be an nn.Module or None; got a str"):
        OperationCounter("model")
    counter = OperationCounter(Net())
    with pytest.raises(SpikelmError, match="kind must be one of multiplication, .*; got 'mac'"):
        counter.number("mac")
    with pytest.raises(SpikelmError, match="scope must name a module of the counter's model, or be ''; got 'blocks'"):
        counter.operators("neuron", "blocks")
