"""The tables of the students' pages and of docs/digits.md, from benchmarks/results. See tables.py."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines])


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


def objectives() -> str:
    """Stage 2 with each objective, as examples/mar/ablate.py wrote it."""
    return ablation_of("mar_objectives").replace(
        "from stage 1, also the teacher.", "from stage 1; the Llama is the teacher."
    )


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


# ---- docs/spikingmamba.md


def spikingmamba() -> str:
    """Teacher, conversion and student on the real teacher."""
    result = read("spikingmamba.json")
    record, firing = result["training"]["student"], result["firing"]
    rows = [
        ("teacher, Mamba-2", result["teacher"], None),
        ("neurons put in and calibrated", record["at_conversion"], None),
        (f"student, {record['steps']} steps", result["student"], firing),
    ]
    lines = [
        [
            name,
            f"{figures['ce']:.4f}",
            f"{figures['ce'] / result['teacher']['ce'] - 1:+.2%}",
            *(f"{figures[key]:.4f}" for key in ("bits_per_byte", "kl_to_teacher", "reverse_kl")),
            *([f"{rates['sum_of_rates']:.3f}", f"{rates['union_rate']:.3f}"] if rates else ["", ""]),
        ]
        for name, figures, rates in rows
    ]
    columns = ("model", "CE", "to the teacher's", "bits per byte", "KL", "reverse KL", "mean \\|s\\|", "s != 0")
    held_out = record["held_out_terms_without_sgc"]
    return (
        f"{markdown(columns, lines)}\n\n"
        f"Training {record['wall_s']:.0f} s; SGC {result['config']['neuron']['sgc']}, weight {record['sgc_weight']:g} "
        f"at the end; held-out loss without SGC {held_out['loss']:.4f} (KL {held_out['kl']:.4f}, hidden states "
        f"{held_out['hidden']:.4f}). {machine(result)}."
    )


def spikingmamba_sites() -> str:
    """Mean |s| per bank of neurons."""
    result = read("spikingmamba.json")
    lines = [
        [f"`{name}`", f"{site['sum_of_rates']:.3f}", f"{site['union_rate']:.3f}", f"{site['saturation']:.2%}"]
        for name, site in result["firing"]["sites"].items()
    ]
    return markdown(("neurons before", "mean \\|s\\|", "s != 0", "\\|x\\| > D V"), lines)


def spikingmamba_energy() -> str:
    """The estimate of spikelm.energy, term by term."""
    energy = read("spikingmamba.json")["energy"]
    table, whole = energy["costs"], energy["whole"]
    low, high = (whole["benefit_with_data"][end] for end in ("low", "high"))
    lines = []
    for name, term in energy["terms"].items():
        spikes = "as the dense model" if term["accumulations"] is None else f"{term['accumulations']:,.0f}"
        lines.append([name, f"{term['mac']:,.0f}", spikes])
    columns = (f"per token in {energy['of']}", "MAC of the dense model", "accumulations of the student")
    return markdown(columns, lines) + (
        f"\n\nEstimate, not measured on hardware: {table['mac']} pJ a MAC, {table['accumulation']} pJ an accumulation "
        f"({table['name']}). Dense over spiking: **{energy['projections']['benefit']:.2f}** on the projections alone "
        f"(the paper's accounting; it reports 4.76), **{whole['benefit']:.2f}** with everything that runs, and "
        f"{low:.2f} to {high:.2f} with moving data."
    )


def spikingmamba_dpo() -> str:
    """The distilled student before and after DPO."""
    result = read("spikingmamba_dpo.json")
    config, pairs = result["config"], result["pairs"]
    lines = []
    for name, model, when in (("distilled", "student", "before"), ("after DPO", "tuned", "after")):
        preference, figures = result["preferences"][when], result[model]
        cells = [preference["accuracy"], preference["standard_error"], preference["margin"]]
        cells += [figures["ce"], figures["kl_to_teacher"]]
        lines.append([name, *(f"{cell:.4f}" for cell in cells)])
    columns = ("model", "reward accuracy", "standard error", "reward margin", "CE", "KL to teacher")
    optimisation = config["optimisation"]
    return (
        f"{markdown(columns, lines)}\n\n"
        f"{pairs['train']} pairs, {pairs['held_out']} held out; {optimisation['steps']} steps of "
        f"{optimisation['batch_size']} pairs, beta {config['beta']:g}, learning rate "
        f"{optimisation['learning_rate']:g}, {result['wall_s']['tuned']:.0f} s. CE on held-out text changes by "
        f"{result['ce_above_student']:+.2%}. A tie counts one half. {machine(result)}."
    )


def spikingmamba_ablation() -> str:
    """Neuron x SGC x D, as examples/spikingmamba/ablate.py wrote it."""
    result = read("spikingmamba_ablation.json")
    config, teacher = result["config"], result["reference"]["teacher"]
    return (
        f"Every row: {config['optimisation']['steps']} steps of {config['optimisation']['batch_size']} x 128 tokens "
        f"from the same teacher, seeds {', '.join(map(str, config['seeds']))}. Figures on the first "
        f"{config['evaluation_contexts']} held-out contexts, where the teacher has CE {teacher['ce']:.4f}. "
        f"{machine(result)}.\n\n" + (RESULTS / "spikingmamba_ablation.md").read_text(encoding="utf-8").strip()
    )


# ---- docs/bispikclm.md


def bispikclm() -> str:
    """Teacher, spiking student, the same without spikes, and n-grams of the same text."""
    result = read("bispikclm.json")
    steps = result["training"]["student"]["steps"]
    rows = [
        ("teacher, Llama", result["teacher"], result["parameters"]["teacher"]),
        (f"BiSpikCLM, {steps} steps", result["student"], result["parameters"]["student"]),
        (f"the same without spikes (OPT), {steps} steps", result["dense"], result["parameters"]["dense"]),
    ]
    keys = ("ce", "perplexity", "bits_per_byte", "kl_to_teacher", "reverse_kl")
    lines = [[name, f"{size:,}", *(f"{figures[key]:.3f}" for key in keys)] for name, figures, size in rows]
    for name in ("bigram", "unigram"):
        cross_entropy = result["ngrams"][name]
        lines.append([name, "", f"{cross_entropy:.3f}", f"{math.exp(cross_entropy):.3f}", "", "", ""])
    columns = ("model", "parameters", "CE", "perplexity", "bits per byte", "KL to teacher", "reverse KL")
    config, seconds = result["config"], result["wall_s"]
    student, optimisation = config["student"], config["optimisation"]
    precision = "bfloat16" if optimisation["bf16"] else "float32"
    return (
        f"{markdown(columns, lines)}\n\n"
        f"T = {student['T']}, width {student['hidden_size']}, {student['num_hidden_layers']} layers, "
        f"{student['num_attention_heads']} heads; {optimisation['batch_size']} x {config['context_length']} tokens a "
        f"step, matrix products in {precision}; training: student {seconds['student']:.0f} s, without spikes "
        f"{seconds['dense']:.0f} s. {machine(result)}."
    )


def bispikclm_rates() -> str:
    """Spikes per neuron and step of every population, by layer; of the maps per pair, which is their density."""
    sites = read("bispikclm.json")["firing"]["sites"]
    names = list(dict.fromkeys(name.split(".", 3)[3] for name in sites if ".layers." in name))
    layers = sorted({int(name.split(".")[2]) for name in sites if ".layers." in name})
    lines = [
        [f"`{name}`", *(f"{sites[f'model.layers.{layer}.{name}']['firing_rate']:.3f}" for layer in layers)]
        for name in names
    ]
    rate = sites["model.input_neuron"]["firing_rate"]
    columns = ("population", *(f"layer {layer}" for layer in layers))
    return f"{markdown(columns, lines)}\n\nThe embedding's spikes, `input_neuron`: {rate:.3f}."


def bispikclm_ablation() -> str:
    """SpAD's terms, T and the readings of the block, as examples/bispikclm/ablate.py wrote them."""
    result = read("bispikclm_ablation.json")
    config, reference = result["config"], result["reference"]
    optimisation = config["optimisation"]
    return (
        f"Every row: {optimisation['steps']} steps of {optimisation['batch_size']} x 128 tokens from random weights, "
        f"seeds {', '.join(map(str, config['seeds']))}. Figures on the first {config['evaluation_contexts']} held-out "
        f"contexts, where the teacher has CE {reference['teacher']['ce']:.4f} and the bigram model "
        f"{reference['ngrams']['bigram']:.4f}. {machine(result)}.\n\n"
        + (RESULTS / "bispikclm_ablation.md").read_text(encoding="utf-8").strip()
    )


# ---- docs/spikingbert.md

FORMS = {"float": "float", "ternary": "1.58 bit", "binary": "1 bit"}


def mar_weights() -> str:
    """Quantised projections in MAR's student, as examples/mar/ablate.py tables=[weights] wrote them."""
    result = read("mar_weights.json")
    (rows,) = (value for value in result.values() if isinstance(value, list))
    lines = []
    for name in dict.fromkeys(row["row"]["name"] for row in rows):
        found = [row for row in rows if row["row"]["name"] == name]
        cells = [mean_and_deviation([row[key] for row in found]) for key in ("ce", "kl_to_stage1", "sum_of_rates")]
        storage = found[0].get("storage")
        sizes = [f"{storage['packed'][part]:,}" if storage else "" for part in ("matrices", "file")]
        lines.append([name, *cells, *sizes])
    trained = next(row["storage"]["trained"] for row in rows if "storage" in row)
    lines[0][4:] = [f"{trained[part]:,}" for part in ("matrices", "file")]
    config, optimisation = result["config"], result["config"]["optimisation"]
    columns = ("weights", "CE", "KL to stage 1", "sum of rates", "bytes of the matrices", "bytes of the file")
    return (
        f"{markdown(columns, lines)}\n\n"
        f"Every row: {optimisation['steps']} steps of {optimisation['batch_size']} x 128 tokens from the same stage 1 "
        f"(CE {result['reference']['stage1']['ce']:.3f}), seeds {', '.join(map(str, config['seeds']))}; figures on the "
        f"first {config['evaluation_contexts']} held-out contexts. {machine(result)}."
    )


def mean_and_deviation(values: list[float]) -> str:
    """Mean, and the standard deviation of several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


TABLES: dict[str, Callable[[], str]] = {
    "mar_weights": mar_weights,
    "bispikclm": bispikclm,
    "bispikclm_rates": bispikclm_rates,
    "bispikclm_ablation": bispikclm_ablation,
    "mar": mar,
    "ablation": ablation,
    "codes": codes,
    "objectives": objectives,
    "stage1": stage1,
    "digits": digits,
    "spikingmamba": spikingmamba,
    "spikingmamba_sites": spikingmamba_sites,
    "spikingmamba_energy": spikingmamba_energy,
    "spikingmamba_dpo": spikingmamba_dpo,
    "spikingmamba_ablation": spikingmamba_ablation,
}
