"""benchmarks/processes.py: what it says of two trainings, and that docs/scaling.md says what was found."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def benchmarks(repository: Path) -> Iterator[Path]:
    """The directory, where modules are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield repository / "benchmarks"


@pytest.fixture(scope="module")
def processes(benchmarks: Path) -> ModuleType:
    """The script as a module."""
    return importlib.import_module("processes")


def test_differences_before_and_after_the_first_flip(processes: ModuleType) -> None:
    codes = torch.zeros(4, 5, dtype=torch.int8)
    other = codes.clone()
    other[2, :3] = 1
    found = processes.difference(([1.0, 2.0, 3.3, 4.0], other), ([1.0, 2.002, 3.0, 4.0], codes))
    assert found["largest"] == pytest.approx(0.1) and found["largest_at_step"] == 3
    assert found["largest_before_a_flip"] == pytest.approx(0.002 / 2.002)
    assert (found["first_flip_at_step"], found["flips"], found["codes"]) == (3, 3, 20)
    assert found["flips_by_step"] == [0, 0, 3, 0]
    same = processes.difference(([1.0, 2.0], codes), ([1.0, 2.0], codes))
    assert same["first_flip_at_step"] is None and same["largest"] == same["flips"] == 0


def test_rows_are_in_the_order_of_one_process(processes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STEPS", 3)
    rows = torch.arange(3 * 4 * 2).view(3, 4, 2)  # steps, rows of an update, tokens
    alone = [{"site": list(rows)}]
    accumulated = [{"site": [half for step in rows for half in step.split(2)]}]
    shared = [{"site": [step[:2] for step in rows]}, {"site": [step[2:] for step in rows]}]
    for parts in (alone, accumulated, shared):
        assert torch.equal(processes.by_step(parts, "site"), rows.flatten(1))


def test_the_table_is_that_of_the_result(repository: Path, benchmarks: Path) -> None:
    text = (repository / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "<!-- table: processes -->" in text
    assert importlib.import_module("tables").render(text) == text
