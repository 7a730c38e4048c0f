"""Runs every property test with the nightly number of examples and counts them, by test file.

python benchmarks/fuzzing.py --output benchmarks/results/fuzzing.json
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HYPOTHESIS_PROFILE"] = "nightly"  # read by tests/conftest.py

ROOT = Path(__file__).resolve().parents[1]
STATEFUL = "test_neuron_life.py"
COUNTS = re.compile(r"(\d+) passing, (\d+) failing, and (\d+) invalid")
NAMES = ("passing", "failing", "invalid")


class Counter:
    """A plugin of pytest that runs property tests alone and adds up what hypothesis says of each."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leaves the others out."""
        items[:] = [item for item in items if _is_property(item)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """Collects the statistics of tests that run a state machine, which hypothesis' own plugin leaves out."""
        from hypothesis.statistics import collector, describe_statistics

        said: list[str] = []
        start = time.perf_counter()
        with collector.with_value(lambda statistics: said.append(describe_statistics(statistics))):
            yield
        text = "\n".join(said) + getattr(item, "hypothesis_statistics", "")
        file = self.files.setdefault(
            item.nodeid.partition("::")[0], {"tests": 0, "seconds": 0.0} | dict.fromkeys(NAMES, 0)
        )
        file["tests"] += 1
        file["seconds"] += time.perf_counter() - start
        for found in COUNTS.findall(text):
            for name, count in zip(NAMES, found, strict=True):
                file[name] += int(count)


def _is_property(item: Any) -> bool:
    function = getattr(item, "obj", None)
    function = getattr(function, "__func__", function)
    return getattr(function, "is_hypothesis_test", False) or item.path.name == STATEFUL


def main() -> int:
    """The exit status of pytest; the file is written also where a test fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzzing.json")
    parser.add_argument("tests", nargs="*", help="files (all that name hypothesis)")
    given = parser.parse_args()
    every = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "hypothesis" in path.read_text())
    tests = given.tests or [str(path.relative_to(ROOT)) for path in every]
    os.chdir(ROOT)
    counter, start = Counter(), time.perf_counter()
    status = pytest.main(["-q", "-o", "timeout=3600", "--tb=short", *tests], plugins=[counter])
    from spikelm.files import write_json
    from spikelm.run import versions

    examples = sum(file["passing"] + file["failing"] for file in counter.files.values())
    record = {"command": shlex.join(["python", "benchmarks/fuzzing.py", *sys.argv[1:]]), "versions": versions()}
    record |= {"seconds": time.perf_counter() - start, "exit_status": int(status), "examples": examples}
    write_json(given.output, record | {"files": counter.files})
    print(f"{examples} examples")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
