"""benchmarks/robustness.py, shortened: what it calls flat keeps nothing, and what keeps something is not flat."""

import gc
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(repository: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module("robustness")
        sys.modules.pop("robustness", None)
    gc.unfreeze()


@pytest.mark.parametrize(("name", "steps"), [("neuron_steps", 200), ("neuron_lives", 300), ("llamba_tokens", 1000)])
def test_memory_stays_as_it_is(name: str, steps: int, script: ModuleType) -> None:
    result = script.run(name, "steps", steps, getattr(script, name))
    assert result["flat"], result["added"]


def test_a_leak_is_seen(script: ModuleType) -> None:
    result = script.run("control", "steps", 2000, script.control)
    assert not result["flat"]
    assert result["added"]["allocated_bytes"] > 100 * 1000


def test_the_result_in_the_repository_is_whole(script: ModuleType, repository: Path) -> None:
    """As long as it is said to be, and every run but the control flat."""
    result = json.loads((repository / "benchmarks" / "results" / "robustness.json").read_text())
    assert [(run["name"], run["steps"]) for run in result["runs"]] == [
        (name, steps) for name, _, steps, _ in script.RUNS
    ]
    assert [run["flat"] for run in result["runs"]] == [True] * (len(script.RUNS) - 1) + [False]
