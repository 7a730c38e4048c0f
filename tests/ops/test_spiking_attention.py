"""Spiking attention on bits: equal to matrix products of float spikes, on every backend; packing; wrong input."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from spikelm import errors
from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError, SpikelmWarning
from spikelm.ops import spiking_attention as operation
from spikelm.ops.multistep import use_backend
from spikelm.ops.spiking_attention import (
    pack_channels,
    pack_tokens,
    spiking_attention,
    unpack_channels,
    unpack_tokens,
)
from tests.attention_cases import Case, Spikes, check, dense, draw, name_of, run

HAS_COMPILER = cpu_module.unavailable() is None
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"))]
EVERY = pytest.mark.parametrize("backend", BACKENDS)

# Steps and channels are compiled in: few of them, each with several of the others.
CASES = [
    Case(T=1, B=2, L=1, H=1, d_h=1, rate=0.5),
    Case(T=2, L=31, d_h=31, threshold=0.7, beta=1.0),
    Case(T=3, B=2, L=31, num_keys=64, d_h=32, threshold=4.0, beta=0.5, rate=0.6),
    Case(T=4, L=33, num_keys=130, H=3, d_h=33, threshold=0.7),
    *(Case(L=L, num_keys=keys, rate=0.1) for L, keys in ((1, 1), (1, 16), (2, 47), (5, 200), (128, 128), (200, 200))),
    *(Case(rate=rate, threshold=4.0, beta=beta) for rate, beta in product((0.02, 0.3, 0.98), (1.0, 0.9, 0.5))),
    *(Case(L=40, threshold=threshold, rate=0.05) for threshold in (0.7, 1.0, 64.0, 65.0)),
    Case(dtype=torch.bfloat16, L=300, H=1, rate=0.9),
    Case(dtype=torch.float16, num_keys=35, H=1),
    Case(T=5, L=33, d_h=96, threshold=4.0, rate=0.3),
    Case(T=8, B=2, L=33, num_keys=40, H=1, d_h=80, threshold=4.0, rate=0.4),
]


@EVERY
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_products_of_matrices(case: Case, backend: str) -> None:
    check(case, backend)


@EVERY
def test_every_entry_of_the_map(backend: str) -> None:
    """Values that are one-hot over the tokens show the map itself."""
    case = Case(L=31, num_keys=64, threshold=4.0, rate=0.3)
    spikes = draw(case)._replace(values=torch.eye(64).view(1, 1, 64, 1, 64).expand(4, 1, 64, 2, 64))
    out, _ = run(case, spikes, backend)
    _, entries = dense(case, spikes)
    assert torch.equal(out, entries.transpose(2, 3))
    assert 0.1 < entries.mean() < 0.9


@EVERY
def test_padding_needs_no_mask(backend: str) -> None:
    """A sequence behind 13 silent tokens gives what it gives alone, and masking the map again changes nothing."""
    case, alone = Case(B=2, L=50, threshold=0.7), Case(B=2, L=37, threshold=0.7)
    spikes = draw(case)
    real = torch.arange(50) >= 13
    queries, keys, values = spikes.queries, *(tensor * real.view(-1, 1, 1) for tensor in spikes[1:])
    out, fired = run(case, Spikes(queries, keys, values), backend)
    expected, _ = dense(case, Spikes(queries, keys, values), real * torch.ones(50, 50).tril())
    assert torch.equal(out, expected)
    found = run(alone, Spikes(queries[:, :, 13:], keys[:, :, 13:], values[:, :, 13:]), backend)
    assert torch.equal(out[:, :, 13:], found[0])
    assert torch.equal(fired[:, :, 13:], found[1])
    assert not out[:, :, :13].any()


@EVERY
def test_steps_of_a_cache_give_the_whole(backend: str) -> None:
    """Tokens one by one into a cache, whose words of values take them by OR."""
    case = Case(L=70, threshold=4.0, rate=0.3)
    spikes = draw(case)
    whole, whole_fired = run(case, spikes, backend)
    keys = torch.zeros(4, 1, 2, 2, 80, dtype=torch.int32)
    values = torch.zeros(4, 1, 2, 3, 64, dtype=torch.int32)
    begin = 0
    for chunk in (33, 1, 1, 29, 6):
        queries, new_keys, new_values = (tensor[:, :, begin : begin + chunk] for tensor in spikes)
        keys[..., begin : begin + chunk] = pack_channels(new_keys)
        packed = pack_tokens(new_values, begin % 32)
        values[:, :, :, begin // 32 : begin // 32 + packed.shape[3]] |= packed
        begin += chunk
        out, fired = spiking_attention(
            pack_channels(queries), keys, values, num_keys=begin, threshold=4.0, beta=0.9, backend=backend
        )
        assert torch.equal(out, whole[:, :, begin - chunk : begin])
        assert torch.equal(fired, whole_fired[:, :, begin - chunk : begin])


def test_the_reference_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(L=33, num_keys=50)
    monkeypatch.setattr(operation, "_MAP_ELEMENTS", 7 * 4 * 2 * 50)  # seven queries
    check(case, "torch")


def test_autocast_rounds_nothing() -> None:
    case = Case(L=400, H=1, rate=0.98)  # sums that bfloat16 does not hold
    spikes = draw(case)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = run(case, spikes, "torch")
    assert torch.equal(out, dense(case, spikes)[0])


@EVERY
@pytest.mark.parametrize("sizes", [(0, 1, 3), (2, 0, 3), (2, 1, 0)])
def test_nothing_in_nothing_out(sizes: tuple[int, int, int], backend: str) -> None:
    T, B, L = sizes
    spikes = torch.ones(T, B, L, 2, 33)
    packed = pack_channels(spikes), pack_channels(spikes), pack_tokens(spikes)
    out, fired = spiking_attention(*packed, num_keys=L, threshold=1.0, beta=0.9, backend=backend)
    assert out.shape == (T, B, L, 2, 33)
    assert fired.shape == (T, B, L, 2)
    assert [tensor.shape for tensor in packed[1:]] == [(T, B, 2, 2, L), (T, B, 2, -(-L // 32), 33)]


@EVERY
def test_rows_that_are_not_dense_are_copied(backend: str) -> None:
    case = Case(L=20)
    spikes, expected = draw(case), run(case, draw(case), backend)
    packed = [pack_channels(spikes.queries), pack_channels(spikes.keys), pack_tokens(spikes.values)]
    apart = [torch.stack((tensor, ~tensor), dim=-1)[..., 0] for tensor in packed]
    found = spiking_attention(*apart, num_keys=20, threshold=1.0, beta=0.9, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_a_compiled_function_has_it_as_one_node() -> None:
    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = pack_channels(queries), pack_channels(keys), pack_tokens(values)
        out, fired = spiking_attention(*packed, num_keys=keys.shape[2], threshold=1.0, beta=0.9)
        return out + 1, fired

    case = Case(L=5, num_keys=40)
    compiled = torch.compile(attend, backend="eager", fullgraph=True, dynamic=False)
    out, _ = compiled(*draw(case))
    assert torch.equal(out, dense(case, draw(case))[0] + 1)


# ---- packing

PACKED_AS = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int64,
]


@EVERY
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 80])
def test_bits_are_where_they_should_be(channels: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(channels)
    for dtype, tokens in zip(PACKED_AS, (1, 31, 32, 33, 64, 65, 5, 70), strict=True):
        spikes = (torch.rand(2, 2, tokens, 3, channels, generator=generator) < 0.4).to(dtype)
        with use_backend(backend):
            of_channels, of_tokens = pack_channels(spikes), pack_tokens(spikes, 5)
        assert of_channels.shape == (2, 2, 3, -(-channels // 32), tokens)
        assert of_tokens.shape == (2, 2, 3, -(-(tokens + 5) // 32), channels)
        for c in range(channels):
            bit = of_channels[..., c // 32, :] >> c % 32 & 1
            assert torch.equal(bit.transpose(2, 3), spikes[..., c].int())
        for j in range(tokens):
            bit = of_tokens[:, :, :, (5 + j) // 32] >> (5 + j) % 32 & 1
            assert torch.equal(bit, spikes[:, :, j].int())
        assert torch.equal(unpack_channels(of_channels, channels), spikes.bool())
        assert torch.equal(unpack_tokens(of_tokens, tokens, 5), spikes.bool())
        everything = (
            unpack_channels(of_channels, 32 * of_channels.shape[3]).sum() + unpack_tokens(of_tokens, tokens + 5).sum()
        )
        assert everything == 2 * spikes.bool().sum()  # unused bits are 0


@EVERY
def test_packing_reads_through_strides(backend: str) -> None:
    spikes = (torch.rand(2, 3, 40, 66) < 0.4).float()
    views = {
        "heads": spikes.view(2, 3, 40, 2, 33),
        "batch first": spikes.view(3, 2, 40, 66).transpose(0, 1).view(2, 3, 40, 2, 33),
        "sliced": spikes.view(2, 3, 40, 2, 33)[:, 1:, 3:, :, 2:20],
        "one more axis": torch.stack((spikes, 1 - spikes), dim=-1)[..., 0].view(2, 3, 40, 2, 33),
        "reversed": spikes.view(2, 3, 40, 2, 33).permute(4, 3, 2, 1, 0),
        "expanded": spikes.view(2, 3, 40, 2, 33)[:, :1].expand(2, 4, 40, 2, 33),
    }
    with use_backend(backend):
        for name, view in views.items():
            assert torch.equal(unpack_channels(pack_channels(view), view.shape[-1]), view.bool()), name
            assert torch.equal(unpack_tokens(pack_tokens(view, 31), view.shape[2], 31), view.bool()), name


@EVERY
def test_whatever_is_not_zero_is_a_spike(backend: str) -> None:
    values = [-0.0, 0.0, 1.0, -1.0, 1e-40, float("nan"), float("inf"), -1e-40]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        spikes = torch.tensor(values, dtype=dtype).view(1, 1, 1, 1, -1)
        with use_backend(backend):
            assert torch.equal(unpack_channels(pack_channels(spikes), 8), spikes != 0)
            assert torch.equal(unpack_tokens(pack_tokens(spikes), 1), spikes != 0)
    with use_backend(backend):
        assert int(pack_channels(torch.tensor([-128, 0, 127]).to(torch.int8).view(1, 1, 1, 1, 3))) == 0b101


# ---- wrong input


@EVERY
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 1, 2, 2, 3)}, "queries must be int32 words of five axes on cpu; got torch.float32"),
        ({"keys": torch.zeros(2, 2, 2, 5, dtype=torch.int32)}, r"keys must be int32 words .* of shape \(2, 2, 2, 5\)"),
        ({"values": torch.zeros(2, 1, 2, 1, 33, dtype=torch.int64)}, "values must be int32 words .*; got torch.int64"),
        (
            {"keys": torch.zeros(2, 1, 3, 2, 5, dtype=torch.int32)},
            r"must agree in T, B, H and W; got .*\(2, 1, 3, 2, 5\)",
        ),
        ({"values": torch.zeros(2, 2, 2, 1, 33, dtype=torch.int32)}, "must agree in T, B, H and W"),
        ({"values": torch.zeros(2, 1, 2, 1, 65, dtype=torch.int32)}, "of d_h = 65 channels have W = .*; got 2"),
        ({"values": torch.zeros(2, 1, 2, 1, 0, dtype=torch.int32)}, "of d_h = 0 channels"),
        ({"values": torch.zeros(2, 1, 2, 0, 33, dtype=torch.int32)}, r"within 3\.\.0, for L = 3 queries; got 5"),
        ({"num_keys": 2}, r"num_keys must be an integer within 3\.\.5, for L = 3 queries; got 2"),
        ({"num_keys": 6}, r"within 3\.\.5, .* got 6"),
        ({"num_keys": 4.0}, "num_keys must be an integer .* got 4.0"),
        ({"threshold": 0.0}, r"threshold must be within \[1.175e-38, 3.403e\+38\]; got 0.0"),
        ({"threshold": -1.0}, "got -1.0"),
        ({"threshold": 1e-45}, "got 1e-45"),
        ({"threshold": float("inf")}, "got inf"),
        ({"threshold": 1e39}, "got 1e.39"),
        ({"threshold": float("nan")}, "got nan"),
        ({"beta": 0.0}, r"beta must be within \(0, 1\]; got 0.0"),
        ({"beta": 1.1}, "got 1.1"),
        ({"beta": float("nan")}, "got nan"),
        ({"dtype": torch.float64}, "dtype must be torch.float32, torch.float16 or torch.bfloat16; got torch.float64"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, cpu, cupy; got 'cuda'"),
    ],
)
def test_wrong_input(backend: str, change: dict[str, object], message: str) -> None:
    arguments = {
        "queries": torch.zeros(2, 1, 2, 2, 3, dtype=torch.int32),
        "keys": torch.zeros(2, 1, 2, 2, 5, dtype=torch.int32),
        "values": torch.zeros(2, 1, 2, 1, 33, dtype=torch.int32),
    }
    arguments |= {"num_keys": 5, "threshold": 1.0, "beta": 0.9, "backend": backend}
    spiking_attention(**arguments)
    with pytest.raises(SpikelmError, match=message):
        spiking_attention(**(arguments | change))


def test_wrong_spikes() -> None:
    for pack in (pack_channels, pack_tokens):
        with pytest.raises(
            SpikelmError, match=r"spikes must be \[T, B, tokens, H, d_h\] with d_h >= 1; got shape \(2, 3\)"
        ):
            pack(torch.ones(2, 3))
        with pytest.raises(SpikelmError, match=r"with d_h >= 1; got shape \(1, 1, 1, 1, 0\)"):
            pack(torch.ones(1, 1, 1, 1, 0))
        with pytest.raises(SpikelmError, match=r"spikes must be real and dense .*; got torch.complex64"):
            pack(torch.ones(1, 1, 1, 1, 2, dtype=torch.complex64))
        with pytest.raises(SpikelmError, match=r"got torch.float32, torch.sparse_coo"):
            pack(torch.ones(1, 1, 1, 1, 2).to_sparse())
    for first in (-1, 32):
        with pytest.raises(SpikelmError, match=rf"first must be an integer within 0\.\.31; got {first}"):
            pack_tokens(torch.ones(1, 1, 1, 1, 2), first)


# ---- which backend runs


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_the_context_decides_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    kernel, definition = operation.cpu.attend, operation._reference
    monkeypatch.setattr(operation.cpu, "attend", lambda *args: (ran.append("cpu"), kernel(*args)))
    monkeypatch.setattr(operation, "_reference", lambda *args: (ran.append("torch"), definition(*args)))
    for context, named, expected in (
        ("auto", "auto", "cpu"),
        ("torch", "auto", "torch"),
        ("torch", "cpu", "cpu"),
        ("cpu", "torch", "torch"),
    ):
        with use_backend(context):
            check(Case(), named)
        assert ran.pop() == expected
    assert not ran


def test_a_named_backend_for_another_device() -> None:
    with pytest.raises(SpikelmError, match="backend 'cupy' takes tensors on a cuda device; got one on cpu"):
        check(Case(), "cupy")


def test_without_a_compiler_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(errors, "_SAID", set())
    for name in ("_LOADED", "_FAILED"):
        monkeypatch.setattr(cpu_module, name, {})
    monkeypatch.setattr(cpu_module, "compiler", lambda: None)
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path))
    operation._refused.cache_clear()
    with pytest.warns(SpikelmWarning, match="no C[+][+] compiler was found.*; the reference is used"):
        check(Case())
    check(replace(Case(), L=5))  # a second warning would be an error
    with pytest.raises(SpikelmError, match="backend 'cpu': no C[+][+] compiler was found"):
        check(Case(), "cpu")
    operation._refused.cache_clear()


def test_tensors_without_data_have_results_without_data() -> None:
    packed = [torch.zeros(2, 1, 2, 1, 3, dtype=torch.int32, device="meta")] * 3
    out, fired = spiking_attention(*packed[:2], packed[2], num_keys=3, threshold=1.0, beta=0.9)
    assert (out.shape, fired.shape, out.device.type) == ((2, 1, 3, 2, 3), (2, 1, 3, 2), "meta")
