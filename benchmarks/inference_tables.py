"""The tables of docs/inference.md, and of quality against rate in docs/mar.md, from benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_tables import machine, markdown, read

Row = dict[str, Any]
SPEED = "tokens_per_second"
DENSE = ("torch.mv", "F.linear", "our dense loop", "dense loop (VNNI)")


def spike_linear() -> str:
    """One token: every form against the dense contenders and the floor."""
    result = read("spike_linear.json")
    densities = sorted({row["density"] for row in result["rows"] if "density" in row}, reverse=True)
    gathers = [f"gather, {share:.0%}" for share in densities]
    columns = ("matrix", "weights", "floor, us", "torch.mv", "our dense loop", *gathers)
    lines = []
    for rows in groups(result["rows"]):
        times = {row["contender"]: 1e6 * row["seconds"] for row in rows if row["contender"] != "gather"}
        dense = {name: times[name] for name in DENSE if name in times}
        line = [f"{rows[0]['outputs']} x {rows[0]['inputs']}", rows[0]["form"], f"{times['floor']:.0f}"]
        line += [shown(times, "torch.mv"), shown(times, "our dense loop", "dense loop (VNNI)")]
        for density in densities:
            seconds = next(row["seconds"] for row in rows if row.get("tokens") == 1 and row.get("density") == density)
            ratio = f" ({min(dense.values()) / (1e6 * seconds):.1f}x)" if dense else ""
            line.append(f"{1e6 * seconds:.0f}{ratio}")
        lines.append(line)
    return (
        f"{markdown(columns, lines)}\n\nMicroseconds, medians; in brackets the speed-up over the quickest dense "
        "contender of the row, F.linear among them (* VNNI, 2-bit weights by output). "
        f"{result['threads']} threads, weights of {result['copies_bytes'] / 2**30:.0f} GiB in turn. {machine(result)}."
    )


def spike_linear_tokens() -> str:
    """Several tokens: the union of their channels is read."""
    result = read("spike_linear.json")
    columns = ("matrix", "weights", "density of a token", *(f"{tokens} tokens" for tokens in (1, 2, 4)))
    lines = []
    for rows in groups(result["rows"]):
        if rows[0]["form"] not in ("float32", "bfloat16", "ternary"):
            continue
        for density in (0.2, 0.1):
            found = {row["tokens"]: row for row in rows if row.get("density") == density}
            line = [f"{rows[0]['outputs']} x {rows[0]['inputs']}", rows[0]["form"], f"{density:.0%}"]
            line += [f"{1e6 * row['seconds']:.0f} ({row['union']:.0%} read)" for _, row in sorted(found.items())]
            lines.append(line)
    return markdown(columns, lines)


def decoding() -> str:
    """The Llamba of a billion parameters in every form."""
    result = read("decoding.json")
    columns = ("type", "form", "weights read", "tokens per second", "over dense", "over our loop", "head", "peak, GB")
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = {row["form"]: row for row in result["rows"] if row["dtype"] == dtype}
        dense, loop = (rows[name]["tokens_per_second"] for name in ("dense Llamba", "dense Llamba, our loop"))
        for name, row in rows.items():
            speed = row["tokens_per_second"]
            share = f"{row['read_share']:.1%}" if "read_share" in row else "all"
            head = f"{row['head_seconds'] / row['seconds_per_token']:.0%}"
            line = [dtype, name, share, f"{speed:.2f}", f"{speed / dense:.2f}", f"{speed / loop:.2f}", head]
            lines.append([*line, f"{row['peak_bytes'] / 1e9:.1f}"])
    shape = result["shape"]
    return (
        f"{markdown(columns, lines)}\n\n{shape['n_layer']} layers of width {shape['d_model']}, MLP "
        f"{shape['intermediate_size']}, vocabulary {shape['vocab_size']:,}, tied; batch 1, {shape['tokens']} tokens, "
        "medians. Weights read: of the blocks' projections, measured while decoding. Head: the output embeddings' "
        f"share of a token's time. {machine(result)}."
    )


def student_decoding() -> str:
    """The small trained student."""
    result = read("student_decoding.json")
    lines = [
        [row["form"], f"{row['tokens_per_second']:.0f}", f"{1e3 * row['prefill_s']:.1f}"] for row in result["rows"]
    ]
    texts = [
        f"{same['same_texts']} of {same['prompts']} greedy texts of {same['new_tokens']} tokens are the same, and "
        f"{same['logits_within_1e-5']:.1%} of {same['logits_compared']:,} rows of logits within 1e-5 of the "
        "undeployed student's over the whole context "
        f"(its own from the cache: {same['undeployed_from_the_cache_within_1e-5']:.1%})"
        for same in result["same"]
    ]
    table = markdown(("form", "tokens per second", "prompt of 16 tokens, ms"), lines)
    return f"{table}\n\nDeployed and undeployed, a student each: {'; '.join(texts)}. {machine(result)}."


def mar_pareto() -> str:
    """Quality against rate, as examples/mar/pareto.py wrote it, and the default student."""
    result, default = read("mar_pareto.json"), read("mar_stories260k.json")
    neuron, keys = default["config"]["spiking"]["neuron"], ("ce", "kl_to_teacher", "sum_of_rates", "union_rate")
    steps = default["training"]["student"]["steps"]
    rows = [row | row.pop("row") for row in result["Quality against rate"]]
    rows.append(neuron | default["student"] | default["firing"] | {"steps": steps, "target": None})
    rows.sort(key=lambda row: (row["steps"], -row["T"], row["tau"], -(row["target"] or 1)))
    lines = []
    for row in rows:
        cells = [str(row["T"]), f"{row['tau']:g}", f"{row['steps']:,}", f"{row['target']:g}" if row["target"] else ""]
        cells += [f"{row[key]:.3f}" for key in keys]
        cells += [f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("read_rate", 3), (SPEED, 0))]
        lines.append(cells)
    columns = ["T", "tau", "steps", "target", "CE", "KL to teacher", "sum of rates", "union rate", "weights read"]
    shown = len(columns) + any(SPEED in row for row in rows)
    start, config = result["reference"]["stage1"]["ce"], result["config"]
    return (
        f"{markdown((*columns, 'tokens/s')[:shown], [cells[:shown] for cells in lines])}\n\n"
        f"From the same stage 1 (CE {start:.3f}), {config['optimisation']['batch_size']} x 128 tokens a step, seed "
        f"{config['seed']}; figures on all held-out text. {machine(result)}; the student of {steps:,} steps without a "
        f"target is the default one above, {machine(default)}."
    )


def groups(rows: list[Row]) -> list[list[Row]]:
    """The rows of each matrix and form."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["outputs"], row["inputs"], row["form"]), []).append(row)
    return list(found.values())


def shown(times: dict[str, float], name: str, other: str = "") -> str:
    """A time, of the other contender with a star where there is no first one."""
    if name in times:
        return f"{times[name]:.0f}"
    return f"{times[other]:.0f}*" if other in times else ""


TABLES: dict[str, Callable[[], str]] = {
    "mar_pareto": mar_pareto,
    "spike_linear": spike_linear,
    "spike_linear_tokens": spike_linear_tokens,
    "decoding": decoding,
    "student_decoding": student_decoding,
}
