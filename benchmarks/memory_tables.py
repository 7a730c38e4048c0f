"""The tables of training memory in docs/kernels.md, from benchmarks/results/training_memory.json. See tables.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_tables import machine, markdown, read

Row = dict[str, Any]


def training_memory() -> str:
    """What all projections keep, and the peak of a step, with spikes as bits and without."""
    result = read("training_memory.json")
    columns = (
        "model", "neurons", "type", "context", "spikes kept, MB", "as bits", "times fewer", "share of all that is kept",
        "peak of a step, MB", "as bits", "less", "resident peak, less", "time of a step",
    )  # fmt: skip
    first = result["rows"][0]
    lines = "; ".join(f"{line['line']}: {line['measured']:g} (aim {line['aim']})" for line in result["must_show"])
    threads = result["versions"]["machine"]["torch_threads"]
    return (
        f"{markdown(columns, [line_of(row) for row in result['rows']])}\n\n"
        f"Random models of {first['layers']} layers, width {first['width']}, MLP of {4 * first['width']}, vocabulary "
        f"{first['vocabulary']}; {first['tokens']} tokens a step. {lines[0].upper()}{lines[1:]}. "
        f"{machine(result)}; {threads} thread{'s' if threads > 1 else ''}; "
        f"`{result['command']}`, {result['seconds']:.0f} s."
    )


def line_of(row: Row) -> list[str]:
    """One row: bytes in MB, and what the bits make of them."""
    dense, bits = row["dense"], row["bits"]
    spikes, fewer = dense["kept"]["spikes"], dense["kept"]["spikes"] / bits["kept"]["spikes"]
    return [
        row["model"], row["neuron"], row["dtype"], str(row["context"]),
        megabytes(spikes), megabytes(bits["kept"]["spikes"]), f"{fewer:.1f}",
        f"{spikes / sum(dense['kept'].values()):.1%}",
        megabytes(dense["peak"]), megabytes(bits["peak"]), less(dense["peak"], bits["peak"]),
        less(dense["resident_peak"], bits["resident_peak"]), f"{bits['seconds'] / dense['seconds'] - 1:+.0%}",
    ]  # fmt: skip


def training_memory_projections() -> str:
    """What each projection of the first layer keeps, ternary spikes in bfloat16."""
    rows = read("training_memory.json")["rows"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        row = next(row for row in rows if row["model"] == model and row["dtype"] == "bfloat16")
        for name, size in row["dense"]["kept_of_first_layer"].items():
            bits = row["bits"]["kept_of_first_layer"][name]
            lines.append([model, f"`{name.partition('.0.')[2]}`", f"{size:,}", f"{bits:,}", f"{size / bits:.1f}"])
    return markdown(("model", "projection", "bfloat16, bytes", "as bits", "times fewer"), lines)


def megabytes(size: int) -> str:
    """Bytes in MB."""
    return f"{size / 1e6:.1f}"


def less(before: int, after: int) -> str:
    """The share that is gone."""
    return f"{1 - after / before:.1%}"


TABLES: dict[str, Callable[[], str]] = {
    "training_memory": training_memory,
    "training_memory_projections": training_memory_projections,
}
