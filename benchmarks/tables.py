"""Writes the measured tables of README.md and docs/ from benchmarks/results, and the pictures of docs/benchmarks.md.

    python benchmarks/tables.py

A table stands between <!-- table: NAME --> and <!-- end -->; everything between is replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import energy_tables
import evaluation_tables
import inference_tables
import memory_tables
import robustness_tables
import scaling_tables
import spikingbert_tables
import student_tables
import system_tables
from student_tables import RESULTS, ROOT, machine, markdown, read

IMAGES = ROOT / "docs" / "images"
PAGES = (
    "mar.md",
    "spikingmamba.md",
    "bispikclm.md",
    "spikingbert.md",
    "weights.md",
    "digits.md",
    "benchmarks.md",
    "kernels.md",
    "inference.md",
    "energy.md",
    "evaluation.md",
    "students.md",
    "scaling.md",
    "robustness.md",
)
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES))
# Results of benchmarks/compare.py: the device, and where it is to be run.
COMPARISONS = {"cpu": ("cpu", "a quiet machine"), "h200": ("cuda", "a machine with an NVIDIA H200")}


# ---- docs/benchmarks.md: the results of compare.py

OURS = ("spikelm", "spikelm op", "spikelm op, int8")
COMPARED_WITH = {"SpikingJelly": "spikelm", "snnTorch": "spikelm", "torch.compile": "spikelm op"}
Rows = list[dict[str, Any]]


def neurons() -> str:
    """Every neuron against its peers at the size of compare.py's main group."""
    if not (RESULTS / "cpu.json").exists():
        return "Not measured yet."
    result = read("cpu.json")
    return groups(only(result["rows"], "neurons"), ("neuron", "direction")) + "\n\n" + setting(result)


def mar_profile() -> str:
    """What a training step of MAR's stage 2 takes on each backend."""
    profile = read("mar_profile.json")
    lines = []
    for name, title in (("torch", "reference"), ("auto", "kernels")):
        run = profile["results"][name]
        times = (run["neurons_forward_s"], run["neurons_backward_s"], run["step_s"])
        lines.append([title, *(number(1e3 * seconds) for seconds in times)])
    apart, control = profile["relative_difference_of_losses"], profile["relative_difference_with_one_thread"]
    table = markdown(("backend", "neurons, forward, ms", "neurons, backward, ms", "whole step, ms"), lines)
    differences = [f"median {each['median']:.2%}, largest {each['largest']:.2%}" for each in (apart, control)]
    return (
        f"{table}\n\nLosses over {profile['steps']} steps from the same seed, relative difference from the reference: "
        f"{differences[0]}; of the reference on one thread instead of two: {differences[1]}.\n\n{machine(profile)}"
    )


def comparison(name: str) -> str:
    """The tables and the picture of one result of compare.py; how to make it, where there is none."""
    if not (RESULTS / f"{name}.json").exists():
        device, where = COMPARISONS[name]
        command = f"python benchmarks/compare.py --device {device} --output benchmarks/results/{name}.json"
        return f"Not measured yet. On {where}:\n\n    {command}\n    python benchmarks/tables.py"
    return comparison_of(read(f"{name}.json"), f"images/roofline_{name}.png")


def comparison_of(result: dict[str, Any], picture: str) -> str:
    """The tables of a result of compare.py, which ``picture`` shows."""
    rows, shape = result["rows"], f"N = {result['N']}, T = {result['T']}"
    parts = {
        "": setting(result),
        "What the kernels must show": must_show(result["must_show"]),
        f"{shape}, float32: ns per element-step": groups(only(rows, "neurons"), ("neuron", "direction"))
        + compilation(result["compile"])
        + f"\n\n![Time against bytes]({picture})",
        f"{shape}, other types: ns per element-step": groups(only(rows, "types"), ("neuron", "dtype", "direction")),
        "Other shapes, float32: ns per element-step": shapes(only(rows, "shapes")),
        f"Small calls, N = {result['dispatch_N']}, T = {result['T']}: us per call": groups(
            only(rows, "dispatch"), ("neuron", "direction"), "us"
        ),
        f"ATMN's weighted sum of T frames, N = {result['N']}: us per call": sums(only(rows, "sums")),
        "Memory of forward + backward": memory(result),
    }
    return "\n\n".join(f"### {title}\n\n{text}" if title else text for title, text in parts.items() if text)


def only(rows: Rows, section: str) -> Rows:
    """The rows of one section."""
    return [row for row in rows if row["section"] == section]


def by(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Rows with the same values under ``keys``, in order of appearance."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def number(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def setting(result: dict[str, Any]) -> str:
    """The machine, and how fast it copies."""
    packages = ("python", "torch", "spikingjelly", "snntorch", "triton", "cupy-cuda12x", "cupy-cuda13x")
    present = tuple(package for package in packages if result["versions"][package])
    hardware = result["versions"]["machine"]
    first = next(row for row in result["rows"] if row["contender"] == "copy")
    return (
        f"{hardware['gpu'] + '; ' if result['device'] == 'cuda' else ''}{machine(result, present)}, "
        f"{hardware['torch_threads']} threads, {result['versions']['compiler']}; commit {result['commit']}; "
        f"`{result['command']}`, {result['seconds']:.0f} s. A copy of {first['T']} x {first['N']} float32 moves "
        f"{8 / first['ns_per_element_step']:.1f} GB/s, read and written."
    )


def must_show(lines: Rows) -> str:
    """Aims and figures."""
    met = {True: "yes", False: "**no**", None: "not judged"}
    return markdown(
        ("what, the worst of those it is about", "aim", "measured", "met"),
        [[line["line"], line["aim"], number(line["measured"]), met[line["met"]]] for line in lines],
    )


def groups(rows: Rows, keys: tuple[str, ...], unit: str = "ns_per_element_step") -> str:
    """A line for each group that was measured together: ours (in byte floors), the others (times slower than ours)."""
    present = {row["contender"] for row in rows}
    names = [name for name in (*OURS, *COMPARED_WITH, "copy") if name in present]
    lines = []
    for labels, group in by(rows, *keys).items():
        members = {row["contender"]: row for row in group}
        lines.append([*labels, *(cell(name, members, unit) for name in names)])
    return markdown((*("" if key == "direction" else key for key in keys), *names), lines)


def compilation(compiled: Rows) -> str:
    """How long torch.compile took."""
    if not compiled:
        return ""
    seconds = sorted(row["seconds"] for row in compiled)
    return f"\n\ntorch.compile took {seconds[0]:.1f} to {seconds[-1]:.1f} s for each of the {len(seconds)} graphs."


def cell(name: str, members: dict[str, dict[str, Any]], unit: str) -> str:
    """One contender's figure, and in brackets what it is to be compared with."""
    row = members.get(name)
    if row is None:
        return ""
    text = number(row[unit])
    if name in OURS:
        return f"{text} ({row['to_floor']:.2f})" if unit == "ns_per_element_step" else text
    if name in COMPARED_WITH:
        faster = members[COMPARED_WITH[name]]["times_faster"].get(name)
        return f"{text} (not equal)" if faster is None else f"{text} ({faster:.1f}x)"
    return text


def shapes(rows: Rows) -> str:
    """Our module, and in brackets how many times slower SpikingJelly's is, over N and T."""
    steps = list(by(rows, "T"))
    lines = []
    for (kind, direction, N), group in by(rows, "neuron", "direction", "N").items():
        ours = {row["T"]: row for row in group if row["contender"] == OURS[0]}
        cells = [
            f"{number(ours[T]['ns_per_element_step'])} ({number(ours[T]['times_faster'].get('SpikingJelly'))}x)"
            if T in ours
            else ""
            for (T,) in steps
        ]
        lines.append([kind, direction, f"2^{N.bit_length() - 1}", *cells])
    return markdown(("neuron", "", "N", *(f"T = {T}" for (T,) in steps)), lines)


def sums(rows: Rows) -> str:
    """Our module over T."""
    named = [row for row in rows if "frame_weight" in row]
    steps = list(by(named, "T"))
    lines = []
    for (dtype, weight), group in by(named, "dtype", "frame_weight").items():
        times = {row["T"]: row["us"] for row in group}
        copy = next(row["us"] for row in rows if (row["dtype"], row["contender"]) == (dtype, "copy"))
        types = "bfloat16 to int8" if dtype == "bfloat16" else dtype
        lines.append([types, f"{weight:g}", *(number(times.get(T)) for (T,) in steps), number(copy)])
    return markdown(("type", "frame weight", *(f"T = {T}" for (T,) in steps), "copy of x"), lines)


def memory(result: dict[str, Any]) -> str:
    """Bytes saved, and the peak of a process."""
    saved = {(row["neuron"], row["contender"], row["dtype"]): row["per_element_step"] for row in result["saved"]}
    peaks = {(row["neuron"], row["contender"]): row for row in result["memory"]}
    lines = []
    for kind, who, dtype in saved:
        if who == OURS[1] or dtype != "float32":
            continue
        peak = peaks.get((kind, who))
        bytes_saved = [number(saved.get((kind, who, dtype))) for dtype in ("float32", "bfloat16")]
        cells = [number(peak[key] / 1e6) if peak else "" for key in ("peak", "besides_inputs")]
        lines.append([kind, who, *bytes_saved, *cells])
    where = f"T = {result['memory_T']}, N = {result['memory'][0]['N']}" if result["memory"] else ""
    return markdown(
        (
            "neuron", "", "saved, bytes per element-step of float32", "of bfloat16",
            f"peak at {where}, float32, MB", "of these besides x and the spikes' gradient",
        ),
        lines,
    )  # fmt: skip


def roofline(result: dict[str, Any], path: Path) -> Path:
    """Draws time against the bytes that a call has to move: contenders as points, a copy and a read as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["rows"] if row["section"] in ("neurons", "types")]
    first = {name: next(row for row in rows if row["contender"] == name) for name in ("copy", "read")}
    limits = (2.0, 24.0)
    for name, moved, style in (("copy", 8, "-"), ("read", 4, ":")):
        slope = first[name]["ns_per_element_step"] / moved
        axes.plot(
            limits, [slope * limit for limit in limits], style, color="grey", label=f"{name}: {1 / slope:.1f} GB/s"
        )
    for (name,), points in by([row for row in rows if "to_floor" in row], "contender").items():
        axes.plot(
            [row["bytes_per_element_step"] for row in points], [row["ns_per_element_step"] for row in points], "o",
            label=name, alpha=0.6, markersize=5,
        )  # fmt: skip
    ticks = sorted({row["bytes_per_element_step"] for row in rows if "to_floor" in row})
    axes.set(
        xscale="log", yscale="log", xlim=limits, xlabel="bytes per element-step that any implementation moves",
        ylabel="ns per element-step", title=f"All neurons, N = {result['N']}, T = {result['T']}",
    )  # fmt: skip
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def attention() -> str:
    """Spiking attention on bits against matrix products, as benchmarks/attention.py measured it."""
    result = read("attention.json")
    peers = list(result["rows"][0]["times_faster"])
    lines = []
    for (phase, keys, threads), rows in by(result["rows"], "phase", "num_keys", "threads").items():
        for row in rows:
            times = [f"{row.get('times_faster', {}).get(peer, math.nan):.1f}".replace("nan", "") for peer in peers]
            floor = f"{row['to_floor']:.1f}" if "to_floor" in row else ""
            what = f"{phase}, {keys} keys, {threads} thread{'s' if threads > 1 else ''}"
            lines.append([what, row["contender"], f"{row['us'] / 1000:.3f}", *times, floor])
    columns = ("", "contender", "ms", *(f"against {peer.replace('matrix ', '')}" for peer in peers), "in floors")
    row, where = result["rows"][0], machine(result, ("python", "torch"))
    return (
        f"{markdown(columns, lines)}\n\n"
        f"T = {row['T']}, {row['H']} heads of {row['d_h']}, batch {row['B']}, random spikes at a rate of "
        f"{result['firing_rate']:g}; the floor reads the bits and writes the result. {where}."
    )


TABLES: dict[str, Callable[[], str]] = {
    **student_tables.TABLES,
    **spikingbert_tables.TABLES,
    **memory_tables.TABLES,
    **scaling_tables.TABLES,
    **inference_tables.TABLES,
    **energy_tables.TABLES,
    **evaluation_tables.TABLES,
    **system_tables.TABLES,
    **robustness_tables.TABLES,
    "attention": attention,
    "neurons": neurons,
    "mar_profile": mar_profile,
    "cpu": lambda: comparison("cpu"),
    "h200": lambda: comparison("h200"),
}


def render(text: str) -> str:
    """The text with every marked table as the results give it."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the tables in place, and the pictures of the comparisons."""
    for name in COMPARISONS:
        if (RESULTS / f"{name}.json").exists():
            roofline(read(f"{name}.json"), IMAGES / f"roofline_{name}.png")
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
