"""Every figure in README and docs is what the committed result files say."""

import importlib.util
from pathlib import Path

import pytest


def load_tables(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    specification = importlib.util.spec_from_file_location("tables", repository / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("README.md", "mar"),
        ("README.md", "systems"),
        ("docs/students.md", "papers"),
        ("docs/energy.md", "energy_report"),
        ("docs/evaluation.md", "evaluation"),
        ("docs/mar.md", "mar"),
        ("docs/spikingmamba.md", "spikingmamba"),
        ("docs/digits.md", "digits"),
        ("docs/benchmarks.md", "cpu"),
        ("docs/benchmarks.md", "h200"),
        ("docs/kernels.md", "training_memory"),
    ],
)
def test_the_tables_are_those_of_the_results(
    repository: Path, name: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    assert f"<!-- table: {table} -->" in text
    assert load_tables(repository, monkeypatch).render(text) == text
