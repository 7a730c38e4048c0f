"""The tables of docs/scaling.md, from benchmarks/results/scaling.json and processes.json. See tables.py."""

from __future__ import annotations

from collections.abc import Callable

from student_tables import machine, markdown, read

GIGABYTE = 1e9
# The student forward, backward (twice) and recomputed, the teacher forward: 2 FLOP a parameter and token each.
FLOP_PER_PARAMETER_AND_TOKEN = 2 * (1 + 2 + 1) + 2
PEAK_FLOP_PER_SECOND = 989e12  # of an H100 in bf16, dense, as NVIDIA states it
STEPS = {"llamba_1b_8gpu": 107_000, "mamba2_1b3_8gpu": 20_000}


def scaling_memory() -> str:
    """Bytes of a process, by what they are for."""
    result = read("scaling.json")
    names = ("parameters", "gradients", "optimizer", "teacher", "gathered", "buckets", "activations")
    lines = []
    for row in result["rows"]:
        cells = [f"{row[name] / GIGABYTE:.1f}" for name in names]
        host = f"{row['offloaded'] / GIGABYTE:.1f}" if row["offloaded"] else ""
        lines.append([row["preset"], row["place"], *cells, host, f"{row['peak'] / GIGABYTE:.1f}"])
    columns = ("preset", "models", *names[:4], "gathered", "DDP's buckets", "activations", "of it on the host", "peak")
    first, tiny = result["rows"][0], result["tiny"]
    return (
        f"{markdown(columns, lines)}\n\nGB of one of {result['processes']} processes, contexts of "
        f"{first['context_length']} tokens, bf16 autocast, checkpointed layers. The same count for a tiny model: "
        f"{tiny['estimated'] / 1e6:.1f} MB, measured {tiny['measured'] / 1e6:.1f} MB, ratio {tiny['ratio']:.3f} "
        f"({machine(result)}). `{result['command']}`."
    )


def scaling_time() -> str:
    """FLOP of a run and its hours, were a share of the GPUs' peak reached."""
    result = read("scaling.json")
    lines = []
    for name, count in result["parameters"].items():
        row = next(row for row in result["rows"] if row["preset"] == name)
        tokens = STEPS[name] * result["processes"] * row["batch_size"] * row["context_length"]
        flop = FLOP_PER_PARAMETER_AND_TOKEN * count["student"] * tokens
        hours = [f"{flop / (share * PEAK_FLOP_PER_SECOND * result['processes']) / 3600:.0f}" for share in (0.1, 0.3)]
        lines.append([name, f"{count['student'] / 1e9:.2f}", f"{tokens / 1e9:.1f}", f"{flop:.1e}", *hours])
    columns = ("preset", "student, 1e9 parameters", "1e9 tokens", "FLOP", "hours at 10 %", "hours at 30 %")
    return markdown(columns, lines)


def processes() -> str:
    """How far the loss of two processes is from that of one."""
    result = read("processes.json")
    found = {(row["dtype"], row["training"], row["against"]): row for row in result["rows"]}
    lines = []
    for dtype, training, against in found:
        if dtype != "float32":
            continue
        row = found[dtype, training, against]
        first = row["first_flip_at_step"]
        flip = "none" if first is None else f"{first}, in {row['flips_by_step'][first - 1]} values"
        wide = found["float64", training, against]
        before, largest = apart(row["largest_before_a_flip"]), apart(row["largest"])
        lines.append([training, against, before, flip, largest, apart(wide["largest"]), str(wide["flips"])])
    columns = ("training", "against", "before a flip", "first flip at step", "in all", "float64", "its flips")
    return (
        f"{markdown(columns, lines)}\n\nThe largest relative difference of the loss over {result['steps']} steps of "
        f"{result['batch']} contexts; the spikes of all banks are compared at every step, "
        f"{result['rows'][0]['codes'] // result['steps']} values. Losses are logged in float32. {machine(result)}. "
        f"`{result['command']}`."
    )


def apart(difference: float) -> str:
    """A relative difference."""
    return f"{difference:.1e}" if difference else "0"


TABLES: dict[str, Callable[[], str]] = {
    "scaling_memory": scaling_memory,
    "scaling_time": scaling_time,
    "processes": processes,
}
