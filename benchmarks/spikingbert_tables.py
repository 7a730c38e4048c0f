"""The tables of docs/spikingbert.md, from benchmarks/results. See tables.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from student_tables import FORMS, RESULTS, machine, markdown, read


def extreme_quantization_runs() -> list[Any]:
    """The results of examples/extreme_quantization/train.py, a seed each."""
    return [read(f"extreme_quantization_seed{seed}.json") for seed in (0, 1)]


def percent(values: list[float]) -> str:
    """Mean of shares in percent, and the standard deviation of several that differ."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def extreme_quantization() -> str:
    """Accuracy of teacher, baselines and students, rate network and spikes."""
    runs = extreme_quantization_runs()
    first = runs[0]
    steps = list(first["students"]["float"]["after"])
    lines = [
        [name, percent([run["baselines"][key] for run in runs]), *[""] * len(steps)]
        for name, key in (("majority", "majority"), ("bag of words, logistic regression", "bag_of_words"))
    ]
    lines.append(["teacher, BERT", percent([run["teacher"]["accuracy"] for run in runs]), *[""] * len(steps)])
    for form, title in FORMS.items():
        students = [run["students"][form] for run in runs]
        cells = [percent([student["after"][T]["accuracy"] for student in students]) for T in steps]
        rate = percent([student["rate_network_accuracy"] for student in students])
        lines.append([f"spiking student, {title}", rate, *cells])
    held_out, seconds = first["held_out"], [sum(run["wall_s"].values()) for run in runs]
    columns = ("%", "without spikes", *(f"T = {T}" for T in steps))
    return (
        f"{markdown(columns, lines)}\n\n"
        f"{held_out['sentences']:,} held-out sentences, {held_out['training_rows']:,} rows to train on; seeds 0 and 1, "
        f"mean ± standard deviation; training of teacher and students {seconds[0]:.0f} s and {seconds[1]:.0f} s. "
        f"{machine(first)}."
    )


def extreme_quantization_storage() -> str:
    """Bytes of the quantised matrices and of the whole checkpoint."""
    students = extreme_quantization_runs()[0]["students"]
    lines = []
    for form in ("ternary", "binary"):
        trained, packed = (students[form]["storage"][name] for name in ("trained", "packed"))
        ratios = [trained[part] / packed[part] for part in ("matrices", "file")]
        sizes = [f"{size[part]:,}" for part in ("matrices", "file") for size in (trained, packed)]
        lines.append([FORMS[form], *sizes[:2], f"{ratios[0]:.2f}", *sizes[2:], f"{ratios[1]:.2f}"])
    columns = ("weights", "matrices, float32", "packed, with scales", "ratio", "file, float32", "packed", "ratio")
    return markdown(columns, lines)


def extreme_quantization_energy() -> str:
    """T * rate of every population of the 1.58-bit student, and the estimate of energy."""
    run = extreme_quantization_runs()[0]
    energy = run["students"]["ternary"]["energy"]
    rates = {T: estimate["T_times_rate"] for T, estimate in energy.items()}
    populations = list(next(iter(rates.values())))
    lines = [[f"`{name}`", *(f"{rates[T][name]:.2f}" for T in rates)] for name in populations]
    for title, key in (("products alone, dense over spiking", "projections_benefit"), ("everything", "benefit")):
        lines.append([f"**{title}**", *(f"{estimate[key]:.2f}" for estimate in energy.values())])
    lines.append(["", *(estimate["verdict"] for estimate in energy.values())])
    table, first = run["students"]["ternary"]["energy"]["8"]["costs"], next(iter(energy.values()))
    return (
        f"{markdown(('T * rate of', *(f'T = {T}' for T in energy)), lines)}\n\n"
        f"Estimate, not measured on hardware: {table['mac']} pJ a MAC, {table['multiplication']} pJ a multiplication,"
        f" {table['accumulation']} pJ an accumulation ({table['name']}); per {first['per']}. A product pays below "
        f"T * rate = {first['break_even']:.1f}."
    )


def extreme_quantization_ablation() -> str:
    """Stages and readings, as examples/extreme_quantization/ablate.py wrote them."""
    result = read("extreme_quantization_ablation.json")
    seeds = ", ".join(map(str, result["config"]["seeds"]))
    return (
        f"Every row from the same float student, seed {seeds}. {machine(result)}.\n\n"
        + (RESULTS / "extreme_quantization_ablation.md").read_text(encoding="utf-8").strip()
    )


TABLES: dict[str, Callable[[], str]] = {
    "extreme_quantization": extreme_quantization,
    "extreme_quantization_storage": extreme_quantization_storage,
    "extreme_quantization_energy": extreme_quantization_energy,
    "extreme_quantization_ablation": extreme_quantization_ablation,
}
