"""The tables of docs/robustness.md, from robustness.json, fuzzing.json and faults.json of results/. See tables.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_tables import RESULTS, machine, markdown, read


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


_FAULTS = {
    "kill": "SIGKILL",
    "shard": "a file cut off, or one byte of it changed",
    "disk": "the disk full",
    "nan": "a NaN loss: one, or from a step on",
    "rank": "SIGKILL or SIGSTOP of one of two processes",
}


def faults() -> str:
    """What became of runs that a fault has struck."""
    if not (RESULTS / "faults.json").exists():
        return "Not measured yet."
    result = read("faults.json")
    columns = (
        "fault", "injected", "where it struck", "exit status", "told", "s to the message, median", "longest",
        "s of the same command again, median", "came to the end", "lost", "wrong",
    )  # fmt: skip
    lines = [[_FAULTS[name], *_fault(found)] for name, found in result["summary"].items()]
    references = result["references"]
    shown = (("one", "seconds", "one process"), ("two", "ranks_seconds", "two processes"))
    whole = ", ".join(f"{references[name][key]:.0f} s in {what}" for name, key, what in shown if name in references)
    return (
        f"{markdown(columns, lines)}\n\n"
        f"An undisturbed run: {whole}, with other runs beside it. {_variants(result)}. SPIKELM_RANK_PATIENCE="
        f"{result['patience_s']:g}, SPIKELM_COLLECTIVE_TIMEOUT={result['collective_timeout_s']:g}. {machine(result)}; "
        f"`{result['command']}`, {result['seconds'] / 60:.0f} min."
    )


def _fault(found: dict[str, Any]) -> list[str]:
    """The cells of one fault."""
    waits = found["message_s"]
    exits = [f"{'none' if status == 'None' else status}: {count}" for status, count in found["exit_statuses"].items()]
    return [
        str(found["injected"]),
        ", ".join(f"{stage} {count}" for stage, count in found["stages"].items()),
        "" if found["told"] is None else ", ".join(exits),
        "" if found["told"] is None else str(found["told"]),
        *(f"{waits[key]:.{1 if waits[key] >= 1 else 2}f}" if waits else "" for key in ("median", "longest")),
        "" if found["again_s"] is None else f"{found['again_s']:.0f}",
        *(str(found[key]) for key in ("ended", "lost", "wrong")),
    ]


def _variants(result: dict[str, Any]) -> str:
    """How often each kind of a fault that has several."""
    several = [found["variants"] for found in result["summary"].values() if len(found["variants"]) > 1]
    return "; ".join(", ".join(f"{name} {count}" for name, count in variants.items()) for variants in several) or "-"


TABLES: dict[str, Callable[[], str]] = {
    "long_runs": long_runs,
    "warm_start": warm_start,
    "fuzzing": fuzzing,
    "faults": faults,
}
