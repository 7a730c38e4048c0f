"""y = W s + b over active channels on the CPU: every form and number of tokens, and what goes to a dense product."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spikelm.cpu import module
from spikelm.errors import SpikelmError
from spikelm.ops import break_even, multistep, spike_linear
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.spike_linear import Encoder, SpikeWeights, dense_linear, project
from spikelm.ops.weight_quantization import FORMS, pack_codes, quantize
from tests.spike_linear_cases import BF16, F16, F32, PACKED, Case, close, draw, values_of

CHANNELS, OUTPUTS = 70, 133


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather is taken whatever the share of active channels."""
    if reason := module.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(spike_linear, "break_even", lambda weights, tokens: 1.0)


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of active channels, for every run of the kernel so far."""
    counts: list[int] = []
    run = spike_linear.cpu.project

    def counted(*arguments: Any) -> int:
        counts.append(run(*arguments))
        return counts[-1]

    monkeypatch.setattr(spike_linear.cpu, "project", counted)
    return counts


def weights_of(form: str, outputs: int = OUTPUTS, channels: int = CHANNELS, bias: bool = True) -> SpikeWeights:
    """Random weights of a form, the same at every call."""
    generator = torch.Generator().manual_seed(outputs)
    W, b = torch.randn(outputs, channels, generator=generator), torch.randn(outputs, generator=generator)
    if form == "float":
        return SpikeWeights.of(W, b if bias else None)
    codes, scale = quantize(W, form, per_row=True)
    return SpikeWeights(pack_codes(codes, form), form, outputs if form in PACKED else None, scale, b if bias else None)


def spikes_of(*shape: int, unit: float = 1.0) -> torch.Tensor:
    """Multiples of ``unit`` within 3 of them, of which about half are 0."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).round().clamp(-3, 3) * unit


@pytest.mark.parametrize("tokens", range(1, 6))
@pytest.mark.parametrize("form", FORMS)
def test_equals_float64(form: str, tokens: int, gathers: list[int]) -> None:
    spikes, weights = spikes_of(tokens, CHANNELS), weights_of(form)
    close(spike_linear.spike_linear(spikes, weights, backend="cpu"), weights, spikes.double())
    active = int((spikes != 0).any(0).sum())
    assert gathers == ([active] if tokens <= spike_linear.MOST_TOKENS else [])


@pytest.mark.parametrize("unit", [0.125, 0.3, 4.0])
@pytest.mark.parametrize("form", ["float", "ternary"])
def test_multiples_of_a_unit(form: str, unit: float) -> None:
    spikes, weights = spikes_of(2, CHANNELS, unit=unit), weights_of(form)
    close(spike_linear.spike_linear(spikes, weights, unit, backend="cpu"), weights, spikes.double())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("form", ["float", "binary"])
def test_16_bit(form: str, dtype: torch.dtype) -> None:
    spikes, weights = spikes_of(1, CHANNELS).to(dtype), weights_of(form)
    found = spike_linear.spike_linear(spikes, weights, backend="cpu")
    assert found.dtype == dtype
    close(found, weights, spikes.double())


@pytest.mark.parametrize("form", ["float", "int8"])
def test_dense_linear_takes_any_numbers(form: str, gathers: list[int]) -> None:
    x, weights = torch.randn(3, CHANNELS), weights_of(form)
    close(dense_linear(x, weights, backend="cpu"), weights, x.double())
    assert gathers == [CHANNELS]


@pytest.mark.parametrize("form", PACKED)
def test_dense_linear_unpacks_codes(form: str, gathers: list[int]) -> None:
    """Which no kernel multiplies by numbers that are no integers."""
    x, weights = torch.randn(3, CHANNELS), weights_of(form)
    close(dense_linear(x, weights), weights, x.double())
    assert gathers == []


@pytest.mark.parametrize("form", ["float", "ternary"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_several_projections_behind_neurons(form: str, tokens: int) -> None:
    inputs = draw(Case(form, "expansion", tokens, outputs=(130, 7, 1), thresholds=True))
    found = project(*inputs[:2], inputs.weights, backend="cpu")
    for y, weights in zip(found, inputs.weights, strict=True):
        close(y, weights, values_of(inputs))


def test_infinite_and_missing_numbers() -> None:
    """A NaN fires nothing; an infinity fires at the top level."""
    inputs = draw(Case("ternary", tokens=2, special=True))
    (y,) = project(*inputs[:2], inputs.weights, backend="cpu")
    assert y.isfinite().all()
    close(y, inputs.weights[0], values_of(inputs))
    assert dense_linear(inputs.x, weights_of("float", channels=65), backend="cpu")[0].isnan().all()


# ---- shapes


@pytest.mark.parametrize("shape", [(CHANNELS,), (1, CHANNELS), (2, 1, 2, CHANNELS)])
def test_any_outer_axes(shape: tuple[int, ...]) -> None:
    spikes, weights = spikes_of(*shape), weights_of("ternary")
    found = spike_linear.spike_linear(spikes, weights, backend="cpu")
    assert found.shape == (*shape[:-1], OUTPUTS)
    close(found.reshape(-1, OUTPUTS), weights, spikes.reshape(-1, CHANNELS).double())


def test_input_with_gaps_in_memory(gathers: list[int]) -> None:
    spikes, weights = spikes_of(CHANNELS, 2, 3)[:, :, 1].t(), weights_of("float")
    assert not spikes.is_contiguous()
    close(spike_linear.spike_linear(spikes, weights, backend="cpu"), weights, spikes.double())
    assert len(gathers) == 1


@pytest.mark.parametrize(("tokens", "channels", "outputs"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1), (3, 5, 1)])
def test_small_and_empty(tokens: int, channels: int, outputs: int) -> None:
    spikes = torch.ones(tokens, channels)
    found = spike_linear.spike_linear(spikes, SpikeWeights.of(torch.ones(outputs, channels)))
    assert torch.equal(found, torch.full((tokens, outputs), float(channels)))


def test_parts_of_a_larger_matrix() -> None:
    """Rows with a stride are read where they are."""
    wide = torch.randn(CHANNELS, OUTPUTS + 9)
    spikes, weights = spikes_of(1, CHANNELS), SpikeWeights(wide[:, 4:-5])
    assert weights.rows.data_ptr() == wide.data_ptr() + 16
    close(spike_linear.spike_linear(spikes, weights, backend="cpu"), weights, spikes.double())


def test_a_matrix_that_lies_transposed_is_not_copied() -> None:
    W = torch.randn(CHANNELS, OUTPUTS).t()
    assert SpikeWeights.of(W).rows.data_ptr() == W.data_ptr()
    assert SpikeWeights.of(W).matrix(F32).data_ptr() == W.data_ptr()


# ---- the dense product


class Seen(TorchDispatchMode):
    """Looks at every operation."""

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return function(*arguments, **(options or {}))


def test_watched_calls_are_dense_products(gathers: list[int]) -> None:
    """Autocast's among them, whose type is its own."""
    spikes, weights = spikes_of(1, CHANNELS), weights_of("float")
    with Seen():
        close(spike_linear.spike_linear(spikes, weights), weights, spikes.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert spike_linear.spike_linear(spikes, weights).dtype == BF16
    assert spike_linear.spike_linear(spikes.to("meta"), SpikeWeights(weights.rows.to("meta"))).is_meta
    assert gathers == []


def test_many_active_channels_are_a_dense_product(gathers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stops as soon as it has counted them; packed weights, which would have to be unpacked, never do."""
    monkeypatch.setattr(spike_linear, "break_even", lambda weights, tokens: 0.5)
    few, many = torch.zeros(1, CHANNELS), torch.zeros(1, CHANNELS)
    few[:, : CHANNELS // 2], many[:, : CHANNELS // 2 + 1] = 1, 1
    called, dense = [], spike_linear.dense
    monkeypatch.setattr(spike_linear, "dense", lambda *arguments: called.append(arguments) or dense(*arguments))
    for form, spikes, falls in (("float", few, False), ("float", many, True), ("ternary", many, False)):
        weights = weights_of(form)
        close(spike_linear.spike_linear(spikes, weights), weights, spikes.double())
        assert bool(called) == falls
        called.clear()
    assert gathers == [CHANNELS // 2, CHANNELS // 2 + 1, CHANNELS // 2 + 1]


def test_backend_torch(gathers: list[int]) -> None:
    spikes, weights = spikes_of(1, CHANNELS), weights_of("ternary")
    close(spike_linear.spike_linear(spikes, weights, backend="torch"), weights, spikes.double())
    with multistep.use_backend("torch"):
        spike_linear.spike_linear(spikes, weights)
    assert gathers == []


def test_no_gradient() -> None:
    spikes, weights = spikes_of(1, CHANNELS).requires_grad_(), weights_of("float")
    with pytest.raises(SpikelmError, match=r"no gradient; call it under torch\.no_grad"):
        spike_linear.spike_linear(spikes, weights)
    with torch.no_grad():
        assert not spike_linear.spike_linear(spikes, weights).requires_grad


# ---- wrong input

SPIKES, WEIGHTS = torch.ones(1, 3), SpikeWeights(torch.ones(3, 2))
CODES = torch.zeros(3, 16, dtype=torch.uint8)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (lambda: spike_linear.spike_linear(SPIKES.int(), WEIGHTS), r"x must be floating point .*torch.int32"),
    "channels": (lambda: spike_linear.spike_linear(torch.ones(1, 4), WEIGHTS), r"takes weights of 4 channels.* got 3"),
    "unit": (lambda: spike_linear.spike_linear(SPIKES, WEIGHTS, unit=0.0), r"unit must be > 0; got 0.0"),
    "backend": (lambda: spike_linear.spike_linear(SPIKES, WEIGHTS, backend="gpu"), r"backend must be one of .*'gpu'"),
    "device": (lambda: spike_linear.spike_linear(SPIKES, WEIGHTS, backend="cupy"), r"'cupy' takes tensors on a cuda"),
    "float64": (
        lambda: spike_linear.spike_linear(SPIKES.double(), WEIGHTS, backend="cpu"), r"no kernel for torch.float64",
    ),
    "float64 weights": (
        lambda: spike_linear.spike_linear(SPIKES, SpikeWeights(torch.ones(3, 2).double()), backend="cpu"),
        r"no kernel for weights of torch.float64",
    ),
    "bias": (
        lambda: dense_linear(SPIKES, SpikeWeights(WEIGHTS.rows, bias=torch.ones(1).expand(2)), backend="cpu"),
        r"no kernel for .* a bias with gaps in memory",
    ),
    "threshold": (
        lambda: project(SPIKES, Encoder(torch.ones(2), Dynamics("integer")), [WEIGHTS]),
        r"threshold must be \[\] or \[3\] on cpu; got \(2,\)",
    ),
    "steps": (
        lambda: project(SPIKES, Encoder(torch.ones(()), Dynamics("integer"), T=65), [WEIGHTS], backend="cpu"),
        r"no kernel for 65 steps",
    ),
    "several forms": (
        lambda: project(
            SPIKES, Encoder(torch.ones(()), Dynamics("integer")),
            [WEIGHTS, SpikeWeights(torch.ones(3, 2, dtype=torch.int8), "int8", scale=torch.ones(()))], backend="cpu",
        ),
        r"no kernel for projections of several forms",
    ),
    "no multiples": (
        lambda: project(
            SPIKES, Encoder(torch.ones(()), Dynamics("integer")),
            [SpikeWeights(CODES, "ternary", 2, torch.ones(()))], backend="cpu",
        ),
        r"no kernel for packed weights behind spikes that are no integer multiples",
    ),
    "form": (lambda: SpikeWeights(WEIGHTS.rows, "int4"), r"form must be one of float, binary, .*; got 'int4'"),
    "rows": (lambda: SpikeWeights(torch.ones(2, 3).t()), r"rows torch.float32 \(3, 2\) are no dense rows"),
    "type": (lambda: SpikeWeights(WEIGHTS.rows, "int8", scale=torch.ones(())), r"are no dense rows of the form 'int8'"),
    "outputs": (lambda: SpikeWeights(CODES, "ternary", scale=torch.ones(())), r"out_features belongs to packed rows"),
    "padding": (
        lambda: SpikeWeights(CODES, "ternary", 65, torch.ones(())), r"65 ternary outputs are packed in 32 bytes; got",
    ),
    "no scale": (lambda: SpikeWeights(CODES, "ternary", 2), r"scale belongs to every form but float"),
    "scale": (
        lambda: SpikeWeights(CODES, "ternary", 2, torch.ones(3)), r"scale of 2 outputs on cpu; got \(3,\) on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        call()


def test_auto_does_without_a_kernel() -> None:
    """Codes behind spikes that are no integer multiples: the dense product of the encoded sum, with a warning."""
    encoder = Encoder(torch.ones(()), Dynamics("integer", levels=4), gain=0.5)
    weights, x = weights_of("ternary"), 3 * torch.randn(2, CHANNELS)
    (found,) = project(x, encoder, [weights])
    close(found, weights, 0.5 * multistep.encode_sum(x, encoder.threshold, encoder.dynamics, 1, 1.0).double())


# ---- the break-even


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[torch.dtype, int]]:
    """What was measured so far, over an empty cache; every share is 0.25."""
    calls: list[tuple[torch.dtype, int]] = []
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(break_even, "_measure", lambda weights, tokens: calls.append((weights, tokens)) or 0.25)
    break_even._known.cache_clear()
    yield calls
    break_even._known.cache_clear()


def test_a_break_even_is_kept(measured: list[tuple[torch.dtype, int]], tmp_path: Path) -> None:
    for weights, tokens in ((F32, 1), (F32, 1), (F32, 2), (torch.int8, 1)):
        assert break_even.break_even(weights, tokens) == 0.25
    break_even._known.cache_clear()  # as in another process
    assert break_even.break_even(F32, 2) == 0.25
    assert measured == [(F32, 1), (F32, 2), (torch.int8, 1)]
    (kept,) = json.loads((tmp_path / "new" / "break_even.json").read_text()).values()
    assert list(kept.values()) == [0.25] * 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"MACHINE": 3}', '{"MACHINE": {"KEY": "many"}}', '{"MACHINE": {"KEY": NaN}}']
)
def test_a_damaged_file_is_measured_anew(content: str, measured: list[tuple[torch.dtype, int]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "break_even.json"
    break_even.break_even(F32, 1)
    ((machine, kept),) = json.loads(path.read_text()).items()
    (key,) = kept
    path.write_text(content.replace("MACHINE", machine).replace("KEY", json.dumps(key)[1:-1]))
    break_even._known.cache_clear()
    assert break_even.break_even(F32, 1) == 0.25
    assert measured == [(F32, 1)] * 2
    break_even._known.cache_clear()
    assert break_even.break_even(F32, 1) == 0.25
    assert measured == [(F32, 1)] * 2  # and is whole again


def test_a_cache_that_cannot_be_written(
    measured: list[tuple[torch.dtype, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "file"))
    assert break_even.break_even(F32, 1) == 0.25
    assert not list(tmp_path.glob("new"))


def test_a_share_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "_SHAPE", (128, 256))
    for weights in (F32, torch.int8):
        assert 0 <= break_even._measure(weights, 2) <= 1


@pytest.mark.filterwarnings("ignore:.*no kernel for packed weights")
def test_integers_that_codes_are_not_counted_for() -> None:
    """Firing up to 100,000 is no kernel's with packed weights, and the dense product's."""
    codes = torch.randint(-1, 2, (70, 30), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weights = SpikeWeights(pack_codes(codes, "ternary"), "ternary", 70, torch.ones(()))
    encoder = Encoder(torch.ones(()), Dynamics("integer", levels=100_000), unit=1.0)
    (y,) = project(1000 * torch.ones(1, 30), encoder, [weights])
    assert torch.equal(y[0], 1000 * codes.float().sum(1))


def test_a_fake_tensor_leaves_nothing_behind(gathers: list[int]) -> None:
    weights = SpikeWeights.of(torch.randn(20, 10))
    with FakeTensorMode(allow_non_fake_inputs=True):
        spike_linear.spike_linear(torch.ones(1, 10), weights, 0.0625)
    assert not gathers
    spike_linear.spike_linear(torch.full((1, 10), 0.0625), weights, 0.0625)
    assert gathers == [10]
