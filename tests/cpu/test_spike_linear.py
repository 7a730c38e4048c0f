"""The CPU kernels of projections of spikes: every width of vectors, any number of threads, and lines that matter."""

from collections.abc import Callable

import pytest
import torch

from spikelm.cpu import module, spike_linear
from spikelm.errors import SpikelmError
from tests.kernel_cases import NIGHTLY
from tests.kernel_checks import changed
from tests.spike_linear_cases import BF16, CASES, Case, check, draw, name_of, run, values_of

# A form each, with the types and sizes that differ most.
FORMS = [
    Case("float", "expansion", 2, 37, (1000, 3), stored=BF16, dtype=BF16, thresholds=True),
    Case("int8", "none", 4, 37, (133,)),
    Case("ternary", "counts", 1, 300, (1000, 129), thresholds=True),
    Case("binary", "integer", 3, 300, (1000, 129), thresholds=True),
]


@pytest.mark.parametrize("case", CASES if NIGHTLY else [*CASES[:-6:3], *CASES[-6:]], ids=name_of)
def test_equals_a_dense_product(case: Case) -> None:
    """Every output, and how many channels are active."""
    assert check(case, spike_linear.project) == int((values_of(draw(case)) != 0).any(0).sum())


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64", *(["x86-64-v4"] if NIGHTLY else [])])
def test_vectors(target: str, build_for: Callable[[str], None]) -> None:
    """AVX2, SSE2 and, nightly, every form and AVX-512 as any processor has it."""
    build_for(target)
    for case in FORMS if NIGHTLY else FORMS[target == "x86-64" :: 2]:
        check(case, spike_linear.project)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", FORMS, ids=name_of)
def test_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits: every output has its sum in one thread."""
    source = module.source
    monkeypatch.setattr(
        module, "source", lambda *key: changed(source(*key), "WORTH_THREADS = 1 << 17", "WORTH_THREADS = 1")
    )
    monkeypatch.setattr(module, "_LOADED", {})
    inputs, found = draw(case), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results, _ = run(inputs, spike_linear.project)
        results.check(inputs)
        found.append(results.y)
    for others in found[1:]:
        assert all(torch.equal(y, other) for y, other in zip(found[0], others, strict=True))


def test_with_too_many_active_channels_nothing_is_computed() -> None:
    inputs = draw(FORMS[2])
    active = int((values_of(inputs) != 0).any(0).sum())
    results, found = run(inputs, spike_linear.project, active - 1)
    assert found == active
    assert all(y.isnan().all() for y in results.y)
    results, found = run(inputs, spike_linear.project, active)
    assert found == active
    results.check(inputs)


def test_a_kernel_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "functions", lambda *_: {"project": lambda _: 1})
    with pytest.raises(SpikelmError, match=r"backend 'cpu': no memory for a projection of \(1, 300\)"):
        run(draw(FORMS[2]), spike_linear.project)


MUTANTS = {  # (the case, what reads so, what it becomes)
    "lanes that are no channels": (FORMS[2], "load(values[token], some)", "load(values[token], All{})"),
    "counts that overflow": (
        Case("ternary", "binary", channels=1000, rate=1.0), "CODE_BITS == 1 ? 255 : 127", "CODE_BITS == 1 ? 510 : 254",
    ),
} | (
    {
        "the rest of the rows": (FORMS[0], "k < active.count; ++k) add_rows", "k < 0; ++k) add_rows"),
        "a second chain": (FORMS[1], "even[token] + odd[token]", "even[token]"),
        "negative values": (FORMS[3], "int v = -LARGEST; v <= LARGEST", "int v = 0; v <= LARGEST"),
        "the sum of the values": (FORMS[2], "sum = sum - constant<R>(total);", ""),
        "an output's scale": (FORMS[2], "load(p.scale + j, count) : one", "one : one"),
    }
    if NIGHTLY
    else {}
)  # fmt: skip


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("case", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_changed_line_is_noticed(case: Case, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = module.source
    monkeypatch.setattr(module, "source", lambda *key: changed(source(*key), old, new))
    with pytest.raises(AssertionError, match="differ"):
        check(case, spike_linear.project)
