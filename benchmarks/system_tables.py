"""The table of all four systems, and what their papers report, from benchmarks/results. See tables.py."""

from __future__ import annotations

from typing import Any

from student_tables import RESULTS, machine, markdown, read

BLIMP = {
    "principle_A_case_1": "principle A",
    "irregular_past_participle_verbs": "participles",
    "anaphor_gender_agreement": "gender",
}
CAUSAL = (
    "model", "CE", "bits per byte", "KL to the Llama", *(f"BLiMP, {name}" for name in BLIMP.values()),
    "rate", "energy, nJ a token", "tokens/s", "MB", "training, min",
)  # fmt: skip
CLASSIFIER = ("model", "accuracy, %", "rate", "energy, nJ a token", "tokens/s", "MB", "training, min")


def systems() -> str:
    """Language models, then classifiers, each beside what it competes with."""
    if not (RESULTS / "systems.json").exists():
        return "Not measured yet."
    result = read("systems.json")
    settings, models, classifiers = (result[key] for key in ("settings", "language_models", "classifiers"))
    phase, costs = models[0]["energy"]["phase"], models[0]["energy"]["costs"]
    return "\n\n".join(
        (
            markdown(CAUSAL, [_language_model(row) for row in models]),
            "CE in nats a token, held-out TinyStories; BLiMP: share of pairs. Rate: sum over T of mean \\|s\\|, mean "
            "over banks; of BiSpikCLM spikes a neuron and step. Energy: an **estimate, not measured on hardware** "
            f"({costs}), of a token in {phase} behind {settings['context_length'] // 2} others, batch 1: arithmetic "
            "and on-chip data with weights reused over T, to all weights from DRAM at every step. Tokens/s: measured, "
            "batch 1, through generate, students in the form of `deploy`. MB: the weights as saved.",
            markdown(CLASSIFIER, [_classifier(row) for row in classifiers]),
            f"SST-2, the held-out sentences of spikingbert.md, T = {settings['bert_steps']}; rate: spikes a neuron and "
            "step; energy and tokens/s: a sentence at a time. "
            f"{machine(result)}, {result['versions']['machine']['torch_threads']} threads.",
        )
    )


def papers() -> str:
    """What the papers report, as they do."""
    columns = ("paper", "student", "measure", "value", "teacher", "confidence")
    return markdown(columns, [[row[column] for column in columns] for row in read("papers.json")["rows"]])


TABLES = {"systems": systems, "papers": papers}


def _language_model(row: dict[str, Any]) -> list[str]:
    text = row["text"]
    figures = [text["ce"], text["bits_per_byte"], text["kl_to_teacher"], *(row["blimp"][name] for name in BLIMP)]
    return [row["name"], *(f"{value:.3f}" for value in figures), *_cost(row)]


def _classifier(row: dict[str, Any]) -> list[str]:
    return [row["name"], f"{100 * row['accuracy']:.1f}", *_cost(row)]


def _cost(row: dict[str, Any]) -> list[str]:
    rates = row.get("rates") or {}
    rate = rates.get("sum_of_rates", rates.get("firing_rate"))
    ends = row["energy"]["energy"]["model"]["total_pj"]
    trained = row["training_s"]
    return [
        "" if rate is None else f"{rate:.3f}",
        " to ".join(f"{ends[end] / 1e3:,.0f}" for end in ("low", "high")),
        f"{row['speed']['tokens_per_second']:,.0f}",
        f"{row['checkpoint_bytes'] / 1e6:.2f}",
        "" if trained is None else f"{trained / 60:.1f}",
    ]
