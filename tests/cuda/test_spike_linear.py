"""The CUDA kernels of projections of spikes, thread by thread on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from spikelm.cuda import module
from spikelm.cuda.module import Launch
from spikelm.cuda.spike_linear import plan, project
from tests.cuda.shim import FORWARD, REVERSE, SHUFFLED, Shim
from tests.spike_linear_cases import BF16, CASES, F16, Case, check, draw, name_of, run

# With several parts of the list, several warps of one, and rows that do not fill them.
PARTS = Case("ternary", "integer", 2, 600, (70, 3), rate=0.5)
NUMBERS = Case("int8", "expansion", 2, 600, (72, 8), dtype=BF16, thresholds=True)


@pytest.mark.parametrize("case", [*CASES, PARTS, NUMBERS], ids=name_of)
def test_equals_a_dense_product(case: Case, shim: Shim) -> None:
    assert check(case, project) == 0  # how many channels are active it does not know
    assert [ran["TOKENS"] for ran in shim.ran] == [str(case.tokens)]


@pytest.mark.parametrize("case", [PARTS, NUMBERS], ids=name_of)
def test_the_same_bits_in_any_order_of_threads(case: Case, shim: Shim) -> None:
    found = []
    for schedule in (FORWARD, REVERSE, SHUFFLED):
        shim.schedule = schedule
        results, _ = run(draw(case), project)
        found.append(torch.cat([y.flatten() for y in results.y]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("case", "bytes_of_a_load"),
    [
        (Case(stored=BF16, outputs=(64, 128)), 16),
        (Case(stored=BF16, outputs=(64, 4)), 8),
        (Case(stored=BF16, outputs=(64,), apart=2), 4),
        (Case(stored=F16, outputs=(5,)), 2),
        (Case("int8", outputs=(9,)), 1),
        (Case("ternary", outputs=(5,), tokens=4), 4),
        (Case("binary", outputs=(5,), tokens=2), 4),
        (Case("binary", outputs=(5,), tokens=3), 2),  # more sums would not fit into registers
    ],
    ids=lambda value: name_of(value) if isinstance(value, Case) else str(value),
)
def test_loads_are_as_wide_as_rows_allow(case: Case, bytes_of_a_load: int, shim: Shim) -> None:
    check(case, project)
    assert shim.ran[-1]["BYTES"] == str(bytes_of_a_load)


def test_rows_of_an_odd_address(shim: Shim) -> None:
    """A row's address, not its length alone, says how much is loaded at once."""
    inputs = draw(Case(stored=BF16, outputs=(64,)))
    (weights,) = inputs.weights
    shifted = torch.empty(weights.rows.numel() + 3, dtype=BF16)[3:].view_as(weights.rows).copy_(weights.rows)
    inputs = inputs._replace(weights=[replace(weights, rows=shifted)])
    run(inputs, project)[0].check(inputs)
    assert shim.ran[-1]["BYTES"] == "2"


@pytest.mark.parametrize("form", ["float", "ternary"])
def test_a_replayed_launch_counts_anew(form: str, shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a captured graph: the same launches and arguments over an x that changed."""
    inputs = draw(Case(form, channels=300, tokens=2, rate=0.1))
    launched: list[tuple[Any, ...]] = []

    def launch(definitions: str, launches: Sequence[Launch], arguments: bytes, *rest: Any) -> None:
        launched.append((definitions, launches, arguments, *rest))
        shim.launch(*launched[-1])

    scratch, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: scratch.append(empty(*size, **options)) or scratch[-1])
    monkeypatch.setattr(module, "launch", launch)
    results, _ = run(inputs, project)
    monkeypatch.undo()
    for rate in (0.9, 0.0, 1.0, 0.2):
        inputs.x.copy_(draw(Case(channels=300, tokens=2, rate=rate)).x)
        results.y[0].fill_(torch.nan)
        shim.launch(*launched[0])
        results.check(inputs)
    assert len(scratch) == 1


def test_no_outputs(shim: Shim) -> None:
    check(Case(outputs=(0,)), project)
    assert shim.ran == []
    check(Case(outputs=(3, 0, 2)), project)


def test_parts_fill_a_gpu_and_are_no_shorter_than_worthwhile() -> None:
    def parts(channels: int, outputs: tuple[int, ...]) -> int:
        found = plan("", "float", 1, channels, outputs, 16, 8)
        assert found.launches[1].blocks % found.parts == 0
        return found.parts

    assert parts(4096, (4096,)) == 16
    assert parts(11008, (4096,)) == 32
    assert parts(4096, (152064,)) == 1
    assert parts(255, (8,)) == 1
    assert parts(4096, (11008, 11008)) == 5


MUTANTS = {  # (the case, what reads so, what it becomes)
    "a part too short": (PARTS, "end = count * (mine + 1) / parts", "end = count * (mine + 1) / parts - 1"),
    "parts left out": (PARTS, "part < call.threads; ++part", "part < 1; ++part"),
    "warps that start anew": (PARTS, "before < warp; ++before) place", "before < 0; ++before) place"),
    "values of another channel": (PARTS, "scratch.channels[mine] = (int)channel", "scratch.channels[mine] = (int)mine"),
    "only what the first token has": (PARTS, "active = active || value != 0", "active = token ? active : value != 0"),
    "the place of a code": (PARTS, "i / BYTES * CODE_BITS", "i / BYTES"),
    "the second projection": (NUMBERS, "return {i, tile};", "return {0, tile};"),
    "the threshold": (NUMBERS, "call.thresholds > 1 ? channel : 0", "0"),
    "a barrier": (
        PARTS,
        "    if (lane == 0) counts[warp] = count;\n    __syncthreads();\n",
        "    counts[warp] = count;\n",
    ),
}


@pytest.mark.parametrize(("case", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_kernel_is_found(case: Case, old: str, new: str, mutated: Callable[[str, str, str], Shim]) -> None:
    shim = mutated("spike_linear.cuh", old, new)
    with pytest.raises(AssertionError, match="differ"):  # noqa: PT012  in one of the orders
        for schedule in (REVERSE, FORWARD):
            shim.schedule = schedule
            check(case, project)
