"""Writes the measured tables of README.md and docs/mar.md from benchmarks/results.

    python benchmarks/tables.py

A table stands between <!-- table: NAME --> and <!-- end -->; everything between is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "mar.md")


def read(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def mar() -> str:
    """Teacher, stage 1 and both students on the real teacher."""
    default, plain = read("mar_stories260k.json"), read("mar_stories260k_tau1.json")
    rows = [
        ("teacher, Llama", default["teacher"], None),
        ("stage 1, Mamba-2", default["stage1"], None),
        ("student, tau 0.5, weights 2^-t (default)", default["student"], default["firing"]),
        ("student, tau 1, counts (plain reading)", plain["student"], plain["firing"]),
    ]
    columns = ("model", "CE", "bits per byte", "KL to teacher", "reverse KL", "sum of rates", "union rate")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, figures, firing in rows:
        values = [figures[key] for key in ("ce", "bits_per_byte", "kl_to_teacher", "reverse_kl")]
        rates = [firing["sum_of_rates"], firing["union_rate"]] if firing else [None, None]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values + rates) + " |")
    seconds = default["wall_s"]
    total = ", ".join(f"{stage} {seconds[stage]:.0f} s" for stage in seconds)
    lines += ["", f"{machine(default)}; training: {total}."]
    return "\n".join(lines)


def machine(result: dict[str, Any]) -> str:
    """The machine and the versions a result was measured with."""
    versions = dict(result["versions"])
    hardware = versions.pop("machine", {})
    names = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "spikingjelly"))
    return f"{hardware.get('cpu', 'CPU')}, {hardware.get('cores', '?')} cores; {names}"


def ablation() -> str:
    """Tables 2 to 4 of the paper and T x tau, as examples/mar/ablate.py wrote them."""
    result = read("mar_ablation.json")
    steps = result["config"]["optimisation"]["steps"]
    start = result["reference"]["stage1"]
    return (
        f"Every row: {steps} steps of 16 x 128 tokens from stage 1 (CE {start['ce']:.4f}), which is also the teacher. "
        f"{machine(result)}.\n\n" + (RESULTS / "mar_ablation.md").read_text(encoding="utf-8").strip()
    )


TABLES: dict[str, Callable[[], str]] = {"mar": mar, "ablation": ablation}


def render(text: str) -> str:
    """The text with every marked table as the results give it."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the tables in place."""
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
