"""Writes the measured tables of README.md and docs/ from benchmarks/results.

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
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "mar.md", ROOT / "docs" / "digits.md")


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


def stage1() -> str:
    """How far each of MOHAWK's steps brings the Mamba-2 model."""
    result = read("mar_stories260k.json")
    lines = ["| after | steps | CE | KL to teacher |", "|---|---|---|---|"]
    for name in ("orientation", "alignment", "stage1"):
        figures, steps = result[name], result["training"][name]["steps"]
        lines.append(f"| {name} | {steps} | {figures['ce']:.3f} | {figures['kl_to_teacher']:.3f} |")
    converted = result["training"]["student"]["at_conversion"]
    lines.append(f"| neurons put in and calibrated | 0 | {converted['ce']:.3f} | {converted['kl_to_teacher']:.3f} |")
    student = result["student"]
    steps = result["training"]["student"]["steps"]
    lines.append(f"| stage 2 | {steps} | {student['ce']:.3f} | {student['kl_to_teacher']:.3f} |")
    return "\n".join(lines)


def machine(
    result: dict[str, Any], packages: tuple[str, ...] = ("python", "torch", "transformers", "spikingjelly")
) -> str:
    """The machine and the versions a result was measured with."""
    versions = dict(result["versions"])
    hardware = versions.pop("machine", {})
    names = ", ".join(f"{name} {versions[name]}" for name in packages)
    return f"{hardware.get('cpu', 'CPU')}, {hardware.get('cores', '?')} cores; {names}"


def ablation() -> str:
    """Tables 2 to 4 of the paper, as examples/mar/ablate.py wrote them."""
    return ablation_of("mar_ablation")


def codes() -> str:
    """T x (tau, frame weight), as examples/mar/ablate.py wrote it."""
    return ablation_of("mar_codes")


def ablation_of(name: str) -> str:
    """The rows of one run of ablate.py, and what they start from."""
    result = read(f"{name}.json")
    config, start = result["config"], result["reference"]["stage1"]
    return (
        f"Every row: {config['optimisation']['steps']} steps of 16 x 128 tokens from stage 1, also the teacher. "
        f"Figures on the first {config['evaluation_contexts']} held-out contexts, where stage 1 has CE "
        f"{start['ce']:.4f} and KL to the Llama {start['kl_to_teacher']:.4f}. {machine(result)}.\n\n"
        + (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
    )


def digits() -> str:
    """Every neuron in two networks of other people's making, against the network's own."""
    result = read("digits.json")
    columns = ("network", "neuron", "test accuracy, %", "points", "mean of \\|s\\|", "share of s != 0")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, network in result["networks"].items():
        for neuron, row in network["neurons"].items():
            arguments = ", ".join(f"{name}={value!r}" for name, value in row["arguments"].items())
            accuracy = f"{100 * row['mean']:.2f} +- {100 * row['standard_deviation']:.2f}"
            points = "" if neuron == network["baseline"] else f"{row['points_from_baseline']:+.2f}"
            layers = row["firing"].values()
            firing = [", ".join(f"{layer[key]:.3f}" for layer in layers) for key in ("rate", "nonzero")]
            cells = (name, f"`{neuron}({arguments})`", accuracy, points, *firing)
            lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| linear classifier | | {100 * result['linear_classifier']:.2f} | | | |")
    packages = ("python", "torch", "spikingjelly", "snntorch", "scikit-learn")
    lines += [
        "",
        f"Mean and standard deviation of {len(result['seeds'])} seeds, {network['config']['steps']} steps. "
        f"{machine(network, packages)}.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "mar": mar,
    "ablation": ablation,
    "codes": codes,
    "stage1": stage1,
    "digits": digits,
}


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
