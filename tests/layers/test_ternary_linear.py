"""TernaryLinear: W s + b by accumulation alone, exact where its docstring says so."""

import copy
import math
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikelm.energy import OperationCounter
from spikelm.errors import SpikelmError
from spikelm.layers import SpikingLinear, TernaryLinear, ternary_linear
from spikelm.neurons import ATMN, TILIF, BinaryIF

NEURONS = {
    "TILIF": lambda channels: TILIF(D=4, num_channels=channels),
    "ternary": lambda channels: TILIF(D=1, num_channels=channels),
    "ATMN": lambda channels: ATMN(T=4, num_channels=channels),
    "leaking ATMN": lambda channels: ATMN(T=3, tau=0.5, num_channels=channels),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, within: int = 4) -> torch.Tensor:
    return torch.randint(-within, within + 1, shape, generator=torch.Generator().manual_seed(1))


def layer(weight: torch.Tensor, bias: torch.Tensor | None = None, **arguments: object) -> TernaryLinear:
    """The ternary form over given parameters, behind a TILIF of D = 4."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    neuron = TILIF(D=4, num_channels=weight.shape[1])
    return TernaryLinear.from_spiking(SpikingLinear.from_linear(linear, neuron), **arguments)


def is_exact(weight: torch.Tensor, spikes: torch.Tensor, bits: int = 24) -> bool:
    """The docstring's condition for float64, over every row of weight."""
    magnitude = weight.double().abs()
    high = torch.frexp(magnitude.amax(1)).exponent  # amax < 2**high
    low = torch.frexp(magnitude.masked_fill(magnitude == 0, math.inf).amin(1)).exponent - 1
    most = math.log2(max(1, int(spikes.abs().sum(-1).max())))
    return bool(((high - low) + most + bits - 1 <= 53).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("at_once", [ternary_linear.ELEMENTS_AT_ONCE, 7])
def test_integer_weights_are_exact(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary_linear, "ELEMENTS_AT_ONCE", at_once)
    limits = torch.iinfo(dtype)
    low, high = max(limits.min, -(2**40)), min(limits.max, 2**40)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(low, high, (17, 33), generator=generator).to(dtype)
    bias = torch.randint(max(low, 0), 100, (17,), generator=generator).to(dtype)
    ternary, spikes = layer(weight, bias), integers(3, 5, 33)
    y = ternary.accumulate(spikes)
    assert y.dtype == torch.int64
    assert torch.equal(y, spikes @ weight.long().T + bias.long())
    x = spikes.float()  # whole numbers are their own code
    assert torch.equal(ternary(x), y)


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("inputs", [64, 1024])
def test_float64_sums_of_float32_weights_are_exact(scale: float, inputs: int) -> None:
    weight, bias, spikes = scale * random(32, inputs), scale * random(32, seed=2), integers(6, inputs)
    weight = torch.where(weight.abs() < scale * 2**-12, 0.0, weight)  # about one in 5000, see the docstring
    assert is_exact(weight, spikes)
    y = layer(weight, bias, accumulate_dtype=torch.float64).accumulate(spikes)
    assert y.dtype == torch.float64
    without_bias = layer(weight, accumulate_dtype=torch.float64).accumulate(spikes)
    assert torch.equal(without_bias, F.linear(spikes.double(), weight.double()))
    assert torch.equal(y, F.linear(spikes.double(), weight.double()) + bias.double())
    backwards = layer(weight.flip(1), accumulate_dtype=torch.float64).accumulate(spikes.flip(1))
    assert torch.equal(backwards, without_bias)  # in any order


def test_a_weight_beyond_the_stated_range_is_rounded() -> None:
    weight, spikes = torch.tensor([[1.0, 2.0**-53, 2.0**-53]]), torch.ones(1, 3, dtype=torch.int64)
    assert not is_exact(weight, spikes)
    assert layer(weight, accumulate_dtype=torch.float64).accumulate(spikes).item() == 1.0
    assert layer(weight.flip(1), accumulate_dtype=torch.float64).accumulate(spikes).item() > 1.0


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_spiking_projection(neuron: str, dtype: torch.dtype) -> None:
    spiking = SpikingLinear.from_linear(nn.Linear(48, 20).to(dtype), NEURONS[neuron](48)).eval()
    x = 2 * random(3, 7, 48).to(dtype)
    ternary = TernaryLinear.from_spiking(copy.deepcopy(spiking))
    with torch.no_grad():
        expected, y = spiking(x), ternary(x)
        code = spiking.neuron.encode_sum(x)
    assert code.unique().numel() >= 3
    assert torch.equal(ternary.encode(x), code.int())
    torch.testing.assert_close(y, expected)
    assert y.dtype == dtype
    assert torch.equal(ternary.weight, spiking.weight)
    assert list(ternary.state_dict()) == list(spiking.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    weight, spikes = random(16, 300).to(dtype), integers(4, 300)
    ternary = layer(weight)
    y = ternary.accumulate(spikes)
    assert y.dtype == torch.float32
    exact = F.linear(spikes.double(), weight.double())
    assert (y - exact).abs().max() < 1e-6 * exact.abs().max()
    assert is_exact(weight, spikes, bits=8 if dtype == torch.bfloat16 else 11)
    assert torch.equal(layer(weight, accumulate_dtype=torch.float64).accumulate(spikes), exact)
    assert ternary(spikes.to(dtype)).dtype == dtype


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float64])
@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 0, 10), (1, 1, 10)])
def test_shapes(shape: tuple[int, ...], accumulate_dtype: torch.dtype | None) -> None:
    weight = random(3, 10)
    for spikes in (integers(*shape), torch.zeros(shape, dtype=torch.int64)):
        y = layer(weight, accumulate_dtype=accumulate_dtype).accumulate(spikes)
        assert y.shape == (*shape[:-1], 3)
        torch.testing.assert_close(y, F.linear(spikes.to(y.dtype), weight.to(y.dtype)))


@pytest.mark.parametrize("weight", [random(5, 6), random(5, 6).bfloat16(), torch.arange(30).view(5, 6)])
def test_silent_tokens_give_the_bias(weight: torch.Tensor) -> None:
    bias = torch.arange(5).to(weight.dtype)
    spikes = integers(4, 6)
    spikes[[0, 2]] = 0
    y = layer(weight, bias).accumulate(spikes)
    assert torch.equal(y[[0, 2]], bias.to(y.dtype).expand(2, 5))
    assert not torch.equal(y[1], bias.to(y.dtype))
    assert torch.equal(layer(weight, bias).accumulate(torch.zeros_like(spikes)), bias.to(y.dtype).expand(4, 5))


@pytest.mark.parametrize("at_once", [1, 50, ternary_linear.ELEMENTS_AT_ONCE])
def test_the_result_does_not_depend_on_the_passes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ternary, spikes = layer(random(8, 12), random(8)), integers(9, 12)
    expected = ternary.accumulate(spikes)
    monkeypatch.setattr(ternary_linear, "ELEMENTS_AT_ONCE", at_once)
    assert torch.equal(ternary.accumulate(spikes), expected)


def test_the_layout_of_the_weight_changes_nothing() -> None:
    ternary, spikes = layer(random(8, 12)), integers(9, 12)
    assert ternary.weight.t().is_contiguous()
    expected = ternary.accumulate(spikes)
    other = copy.deepcopy(ternary)
    assert other.weight.t().is_contiguous()
    other.weight = nn.Parameter(ternary.weight.contiguous(), requires_grad=False)  # as a loader may assign it
    assert torch.equal(other.accumulate(spikes), expected)
    ternary.load_state_dict(other.state_dict())
    assert ternary.weight.t().is_contiguous()


def test_the_smallest_and_largest_integers() -> None:
    weight = torch.arange(1, 3).view(1, 2)
    assert layer(weight).accumulate(torch.tensor([[-128, 127]], dtype=torch.int8)).item() == 126
    assert layer(weight).accumulate(torch.tensor([[0, 255]], dtype=torch.uint8)).item() == 510


@pytest.mark.parametrize(("neuron", "top"), [("TILIF", 4), ("ternary", 1), ("ATMN", 4), ("leaking ATMN", 3)])
def test_special_values(neuron: str, top: int) -> None:
    spiking = SpikingLinear.from_linear(nn.Linear(4, 2), NEURONS[neuron](4))
    ternary = TernaryLinear.from_spiking(spiking)
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    assert ternary.encode(x).tolist() == [0, top, -top, 0]
    assert bool(ternary(x).isfinite().all())


@pytest.mark.parametrize(
    ("weight", "operator"),
    [
        (random(20, 12), "aten::_embedding_bag_forward_only"),
        (random(20, 12).bfloat16(), "aten::_embedding_bag_forward_only"),
        (torch.ones(20, 12, dtype=torch.int8), "aten::index_add_"),
    ],
)
def test_it_only_accumulates(weight: torch.Tensor, operator: str) -> None:
    ternary, spikes = layer(weight, torch.ones(20).to(weight.dtype)), integers(9, 12)
    with OperationCounter() as counter:
        ternary.accumulate(spikes)
    for kind in ("multiplication", "function", "neuron", "unknown"):
        assert counter.operators(kind) == {}, kind
    assert counter.numbers["", operator, "accumulation"] == 20 * int(spikes.abs().sum())


def test_projections_of_a_bank_encode_once() -> None:
    neuron, x = ATMN(num_channels=6), random(2, 6)
    gate = SpikingLinear.from_linear(nn.Linear(6, 8), neuron)
    up = SpikingLinear.from_linear(nn.Linear(6, 8), neuron, shares_with=gate)
    first = TernaryLinear.from_spiking(gate)
    second = TernaryLinear.from_spiking(up, shares_with=first)
    with torch.no_grad():
        expected = gate(x), up(x)
    with mock.patch.object(ATMN, "encode_sum", autospec=True, side_effect=ATMN.encode_sum) as encode_sum:
        y = first(x), second(x)
    assert encode_sum.call_count == 1
    torch.testing.assert_close(y, expected)
    assert "neuron.a" not in second.state_dict()
    assert "shares a neuron bank" in repr(second)
    block = nn.ModuleList([first, second])
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other[1].neuron is other[0].neuron is not neuron
        assert torch.equal(other[1](x), y[1])


def test_no_gradient() -> None:
    ternary = layer(random(4, 6))
    x = random(2, 6).requires_grad_()
    with pytest.raises(SpikelmError, match=r"no gradient; call it under torch.no_grad\(\)"):
        ternary(x)
    with torch.no_grad():
        y = ternary(x)
    with torch.inference_mode():
        assert torch.equal(ternary(x), y)
    assert torch.equal(ternary(x.detach()), y)
    ternary.weight.requires_grad_()
    with pytest.raises(SpikelmError, match="no gradient"):
        ternary(x.detach())


def test_what_it_refuses() -> None:
    ternary = layer(random(4, 6))
    with pytest.raises(SpikelmError, match=r"takes integers; got torch.float32"):
        ternary.accumulate(torch.ones(2, 6))
    with pytest.raises(SpikelmError, match=r"takes integers; got torch.bool"):
        ternary.accumulate(torch.ones(2, 6, dtype=torch.bool))
    for shape in ((2, 5), ()):
        with pytest.raises(SpikelmError, match=r"takes spikes \[\*, 6\]; got shape"):
            ternary.accumulate(torch.ones(shape, dtype=torch.int64))
    ternary.spiking = False
    with pytest.raises(SpikelmError, match="no dense form"):
        ternary(torch.ones(2, 6))


@pytest.mark.parametrize(
    ("weight", "chosen", "message"),
    [
        (random(4, 6), torch.bfloat16, "None or torch.float32 or torch.float64 for weights of torch.float32"),
        (random(4, 6).double(), torch.float32, "None or torch.float64 for weights of torch.float64; got torch.float32"),
        (torch.ones(4, 6, dtype=torch.int8), torch.int32, "None or torch.int64 for weights of torch.int8"),
        (torch.ones(4, 6, dtype=torch.bool), None, "weights must be one of .*; got torch.bool"),
    ],
)
def test_accumulation_types_that_would_round(weight: torch.Tensor, chosen: torch.dtype, message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        layer(weight, accumulate_dtype=chosen)


def test_a_model_cast_afterwards_is_refused_where_its_weights_would_be_rounded() -> None:
    ternary = layer(random(4, 6), accumulate_dtype=torch.float32).double()
    with pytest.raises(SpikelmError, match="accumulate_dtype must be None or torch.float64"):
        ternary(random(2, 6).double())


def test_neurons_that_it_refuses() -> None:
    for neuron, message in (
        (ATMN(num_channels=6, frame_weight=0.5), "ATMN of frame_weight 1; got 0.5, by which every frame would have to"),
        (BinaryIF(num_channels=6), "takes an ATMN or a TILIF; got a BinaryIF"),
    ):
        with pytest.raises(SpikelmError, match=message):
            TernaryLinear.from_spiking(SpikingLinear.from_linear(nn.Linear(6, 4), neuron))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_papers_micro_steps_give_the_same_sums(dtype: torch.dtype) -> None:
    """v[1] = |x| / V + 1/2, D micro-steps of a binary neuron with the sign beside it, thresholds other than 1."""
    neuron = TILIF(D=4, num_channels=32)
    generator = torch.Generator().manual_seed(0)
    neuron.v_threshold = V = 0.3 + torch.rand(32, generator=generator)
    linear = torch.nn.Linear(32, 16, bias=False).double()
    layer = TernaryLinear.from_spiking(SpikingLinear.from_linear(linear, neuron))
    x = torch.randn(400, 32, generator=generator).to(dtype)
    v, total = x.float().abs() / V + 0.5, torch.zeros(400, 16, dtype=torch.float64)
    for _ in range(4):
        spikes = (v >= 1).float()
        v = v - spikes
        total += (x.float().sign() * spikes).double() @ linear.weight.t()
    with torch.no_grad():
        found = layer.accumulate(layer.encode(x))
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-12)
    assert found.abs().max() > 1
