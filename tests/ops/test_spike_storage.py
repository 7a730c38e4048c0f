"""Spikes kept as bits for the backward: exact round trips, equal gradients, fewer bytes."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from spikelm.ops import spike_storage
from spikelm.ops.spike_storage import SpikeCode, linear, restore, store

CODES = [SpikeCode(1, signed=False), SpikeCode(1), SpikeCode(4), SpikeCode(7), SpikeCode(15, 0.125), SpikeCode(127)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def spikes_of(code: SpikeCode, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    low = -code.largest if code.signed else 0
    values = torch.randint(low, code.largest + 1, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype) * code.unit


@given(
    code=st.sampled_from(CODES),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 99),
)
def test_round_trip(code: SpikeCode, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    spikes = spikes_of(code, shape, dtype, seed)
    stored = store(spikes, code)
    again = restore(stored)
    assert torch.equal(again, spikes) and again.dtype == dtype
    assert stored.data.nbytes == -(-spikes.numel() * code.bits // 8)


@pytest.mark.parametrize(("largest", "bits"), [(1, 2), (2, 4), (7, 4), (8, 8), (127, 8), (128, None)])
def test_bits(largest: int, bits: int | None) -> None:
    assert SpikeCode(largest).bits == bits
    assert SpikeCode(1, signed=False).bits == 1


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_gradients_are_bit_equal(code: SpikeCode, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spikes = spikes_of(code, (3, 5, 37), dtype).requires_grad_()
    weight, bias = (torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in ((11, 37), (11,)))
    ours, plain = linear(spikes, weight, bias, code), F.linear(spikes, weight, bias)
    assert torch.equal(ours, plain)
    gradient = torch.randn(ours.shape, generator=generator).to(dtype)
    inputs = (spikes, weight, bias)
    for a, b in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (ours, plain)), strict=True):
        assert torch.equal(a, b)


def kept(function: object) -> int:
    """Bytes that the calls of store() in function() left behind, each counted once."""
    sizes: list[int] = []

    def counting(spikes: torch.Tensor, code: SpikeCode) -> object:
        stored = store(spikes, code)
        sizes.append(stored.data.nbytes)
        return stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spike_storage, "store", counting)
        function()  # type: ignore[operator]
    return sum(sizes)


def test_projections_of_one_tensor_share_what_is_stored() -> None:
    spikes = spikes_of(SpikeCode(1), (64, 32), torch.bfloat16).requires_grad_()
    weights = [torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    assert kept(lambda: [linear(spikes, weight, None, SpikeCode(1)) for weight in weights]) == spikes.nbytes // 8


@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_bits_stay_behind_a_forward(autocast: bool) -> None:
    """Nothing that the graph holds may keep the dense spikes alive."""
    x = torch.randn(16, 32, requires_grad=True)
    spikes, weight = x * 1, torch.randn(8, 32, requires_grad=True)
    with torch.no_grad():
        spikes.sign_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(spikes, weight, None, SpikeCode(1))
    dense = [weakref.ref(spikes), weakref.ref(spikes.__dict__.get("_cast", spikes))]
    del spikes
    assert [tensor() for tensor in dense] == [None, None]
    y.sum().backward()
    assert torch.equal(weight.grad, x.detach().sign().sum(0).expand(8, 32).to(y.dtype))


def test_autocast() -> None:
    """Stored in bfloat16's place, and the gradients are those of a plain product under autocast."""
    spikes = spikes_of(SpikeCode(4), (16, 32), torch.float32).requires_grad_()
    weight = torch.randn(8, 32, requires_grad=True)
    gradients = []
    for product in (lambda: linear(spikes, weight, None, SpikeCode(4)), lambda: F.linear(spikes, weight)):
        with torch.autocast("cpu", torch.bfloat16):
            y = product()
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.float().square().sum(), (spikes, weight)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_where_nothing_is_stored() -> None:
    code = SpikeCode(1)
    spikes = spikes_of(code, (4, 32), torch.float32)
    weight = torch.randn(8, 32, requires_grad=True)
    assert kept(lambda: linear(spikes, weight, None, code)) == 32
    with torch.no_grad():
        assert kept(lambda: linear(spikes, weight, None, code)) == 0
    assert kept(lambda: linear(spikes, weight.detach(), None, code)) == 0
    assert kept(lambda: linear(spikes, weight, None, SpikeCode(200))) == 0
    assert kept(lambda: linear(spikes, weight, None, None)) == 0
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert kept(lambda: linear(spikes, weight, None, code)) == 0
    other = spikes.clone().requires_grad_()
    run = lambda x: linear(x, weight, None, code)  # noqa: E731
    assert kept(lambda: checkpoint(run, other, use_reentrant=False).sum().backward()) == 0


def test_function_transforms_and_second_derivatives() -> None:
    code = SpikeCode(1)
    spikes, weight = spikes_of(code, (4, 32), torch.float64), torch.randn(8, 32, dtype=torch.float64)
    expected = torch.func.grad(lambda w: F.linear(spikes, w).square().sum())(weight)
    torch.testing.assert_close(
        torch.func.grad(lambda w: linear(spikes, w, None, code).square().sum())(weight), expected
    )
    assert torch.autograd.gradgradcheck(lambda w: linear(spikes, w, None, code) ** 2, weight[:2].requires_grad_())


def test_compiles_in_one_graph() -> None:
    code, weight = SpikeCode(1), torch.randn(8, 32, requires_grad=True)
    compiled = torch.compile(lambda s: linear(s, weight, None, code), backend="aot_eager", fullgraph=True)
    spikes = spikes_of(code, (4, 32), torch.float32)
    compiled(spikes).sum().backward()
    torch.testing.assert_close(weight.grad, spikes.sum(0).expand(8, 32))
