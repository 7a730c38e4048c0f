"""The tables of docs/robustness.md, from benchmarks/results/robustness.json and fuzzing.json. See tables.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_tables import machine, markdown, read


def long_runs() -> str:
    """What long runs have added to memory."""
    result = read("robustness.json")
    columns = ("run", "length", "time, s", "resident, kB", "allocated, kB", "Python's blocks", "flat")
    lines = [
        [
            run["name"], f"{run['steps']:,} {run['unit']}", f"{run['seconds']:.0f}",
            f"{run['added']['resident_bytes'] / 1e3:+.0f}", f"{run['added']['allocated_bytes'] / 1e3:+.1f}",
            f"{run['added']['python_blocks']:+,}", "yes" if run["flat"] else "no",
        ]
        for run in result["runs"]
    ]  # fmt: skip
    return f"{markdown(columns, lines)}\n\n{machine(result)}; `{result['command']}`, {result['seconds']:.0f} s."


def warm_start() -> str:
    """What the check of a kernel costs at its first use in a process."""
    found = read("robustness.json")["warm_start"]
    columns = ("library, kB", "the directory is private, us", "the digest is right, us", "all of finding a kernel, us")
    row = [f"{found['library_bytes'] / 1e3:.0f}"]
    row += [f"{found[name]:.0f}" for name in ("directory_us", "digest_us", "find_and_check_us")]
    return markdown(columns, [row])


def fuzzing() -> str:
    """How many examples the property tests have run, by file."""
    result = read("fuzzing.json")
    lines = [[f"`{name}`", *_counts(file)] for name, file in result["files"].items()]
    every: dict[str, Any] = {key: sum(file[key] for file in result["files"].values()) for key in _COLUMNS.values()}
    table = markdown(("file", *_COLUMNS), [*lines, ["all", *_counts(every)]])
    return f"{table}\n\n{machine(result)}; `{result['command']}`, {result['seconds']:.0f} s."


_COLUMNS = {
    "tests": "tests",
    "passing": "passing",
    "failing": "failing",
    "thrown away": "invalid",
    "time, s": "seconds",
}


def _counts(file: dict[str, Any]) -> list[str]:
    return [f"{file[key]:,.0f}" for key in _COLUMNS.values()]


TABLES: dict[str, Callable[[], str]] = {"long_runs": long_runs, "warm_start": warm_start, "fuzzing": fuzzing}
