"""Ablations: every row trained once and kept in a file of its own, and Markdown tables of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from spikelm.presets import to_dict
from spikelm.run import RunDirectory, versions


@dataclass(frozen=True)
class Row:
    """One student; a subclass adds what makes it. Rows of one name and several seeds become one line."""

    name: str
    seed: int

    @property
    def key(self) -> str:
        """Names what decides the result, so that a row of two tables is trained once."""
        settings = {name: value for name, value in to_dict(self).items() if name != "name"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


AnyRow = TypeVar("AnyRow", bound=Row)
Tables = dict[str, list[tuple[AnyRow, dict[str, Any]]]]


def run_rows(
    run: RunDirectory, plan: Mapping[str, Sequence[AnyRow]], train_row: Callable[[AnyRow], dict[str, Any]]
) -> Tables[AnyRow]:
    """The figures of every row of every table, from row-<key>.json where it is there, else from train_row(row).

    A row trains in training/<key>, which is removed once its figures are written.
    """
    done: dict[str, dict[str, Any]] = {}
    for row in tqdm([row for rows in plan.values() for row in rows], desc="rows"):
        if row.key in done:
            continue
        name = f"row-{row.key}.json"
        if not run.path(name).exists():
            run.write_json(name, {"row": to_dict(row), **train_row(row)})
            shutil.rmtree(run.path("training") / row.key, ignore_errors=True)
        done[row.key] = run.read_json(name)
    return {title: [(row, done[row.key]) for row in rows] for title, rows in plan.items()}


def write_tables(run: RunDirectory, tables: Tables[AnyRow], columns: Sequence[str], **more: Any) -> str:
    """Writes ablation.json (the rows by table, the versions and ``more``) and table.md; returns the latter's text."""
    rows = {title: [figures | {"row": to_dict(row)} for row, figures in found] for title, found in tables.items()}
    run.write_json("ablation.json", rows | more | {"versions": versions()})
    text = markdown(tables, columns)
    run.path("table.md").write_text(text, encoding="utf-8")
    return text


def markdown(tables: Tables[AnyRow], columns: Sequence[str]) -> str:
    """One line per name, seeds as mean +- standard deviation."""
    lines = []
    for title, results in tables.items():
        lines += [f"### {title}", "", "| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in dict.fromkeys(row.name for row, _ in results):
            figures = [figures for row, figures in results if row.name == name]
            lines.append(f"| {name} | " + " | ".join(spread([f[column] for f in figures]) for column in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.4f}"
