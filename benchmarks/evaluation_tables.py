"""The tables of docs/evaluation.md, from results of `spikelm eval`. See tables.py."""

from __future__ import annotations

from collections.abc import Callable

from student_tables import machine, markdown, read

# Tasks by column.
TASKS = {
    "principle A": "principle_A_case_1",
    "past participles": "irregular_past_participle_verbs",
    "anaphor gender": "anaphor_gender_agreement",
    "ARC-easy": "arc_easy",
}


def evaluation() -> str:
    """Teacher and students: text, accuracies and their standard errors."""
    result = read("evaluation.json")
    columns = ("model", "perplexity", "bits per byte", "KL to teacher", *TASKS)
    lines = []
    for name, figures in result["models"].items():
        text, tasks = figures["text"], figures["tasks"]["tasks"]
        cells = [f"{text[key]:.3f}" for key in ("perplexity", "bits_per_byte", "kl_to_teacher")]
        cells += [accuracy(tasks[task]) for task in TASKS.values()]
        lines.append([f"`{name}`", *cells])
    examples = {task: found["examples"] for task, found in tasks.items()}
    counts = ", ".join(f"{examples[task]:,}" for task in TASKS.values())
    version = figures["tasks"]["lm_eval"]
    settings = f"Examples: {counts}. {machine(result)}, lm-eval {version}."
    return f"{markdown(columns, lines)}\n\n{settings}"


def evaluation_pairs() -> str:
    """The teacher's minimal pairs: how a sentence is written, how many are taken, which score decides."""
    written, all_pairs = read("evaluation_pairs.json"), read("evaluation.json")
    lines = []
    for title, result in (("first 40, no blank before a sentence", written), ("all 1,000, as lm-eval", all_pairs)):
        tasks = result["models"]["stories260k"]["tasks"]["tasks"]
        for metric in ("acc", "acc_norm"):
            cells = [f"{tasks[TASKS[name]]['metrics'][metric]:.3f}" for name in list(TASKS)[:3]]
            lines.append([title, metric, *cells])
    return markdown(("pairs", "score", *list(TASKS)[:3]), lines)


def accuracy(found: dict[str, dict[str, float]]) -> str:
    """acc, with its standard error."""
    return f"{found['metrics']['acc']:.3f} ± {found['stderr']['acc']:.3f}"


TABLES: dict[str, Callable[[], str]] = {"evaluation": evaluation, "evaluation_pairs": evaluation_pairs}
