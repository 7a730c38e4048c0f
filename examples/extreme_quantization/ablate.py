"""What the quantised students owe to each stage and to each choice of ours, from one and the same float student.

    python examples/extreme_quantization/ablate.py run=runs/sst2 output_dir=runs/sst2-ablation

run is the output_dir of a finished train.py, whose teacher, sentences and float student every row uses. Each row is
written when it is done, so the same command goes on after an interruption. output_dir gets table.md and ablation.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from settings import Config
from train import Task

from spikelm.ablation import Row, run_rows, write_tables
from spikelm.evaluate_classification import rate_accuracy, spiking_accuracy
from spikelm.experiment import finished_settings, weights_fingerprint
from spikelm.models.spikingbert import SpikingBertForSequenceClassification, from_bert, with_weights
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory

PRESETS = Path(__file__).parent / "ablation_presets"
TITLES = {"ternary": "1.58-bit students", "binary": "1-bit students"}
STAGES = ("internal", "prediction", "spiking")


@dataclass(frozen=True)
class Ablation:
    """Which rows, and after how many steps each is read."""

    run: str
    output_dir: str
    tables: list[Literal["ternary", "binary"]] = field(default_factory=lambda: ["ternary", "binary"])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    T: list[int] = field(default_factory=lambda: [8, 16, 64])


@dataclass(frozen=True)
class Quantised(Row):
    """One student: its weights, what it changes of the configuration, and the stages that it leaves out."""

    weights: str = "ternary"
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    training_T: int | None = None
    masters: str = "float student"


def tables(ablation: Ablation) -> dict[str, list[Quantised]]:
    """The rows of every table."""
    changes: dict[str, dict[str, Any]] = {"as the run": {}}
    changes |= {f"without the {stage} stage": {"left_out": [stage]} for stage in STAGES}
    changes |= {
        "spiking stage at T = 64": {"training_T": 64},
        "u(0) = 0, the paper's": {"settings": {"initial_membrane": 0.0}},
        "u(0) = 0, without the spiking stage": {"settings": {"initial_membrane": 0.0}, "left_out": ["spiking"]},
        "a scale per row": {"settings": {"per_row": True}},
        "masters from the teacher": {"masters": "teacher"},
    }
    return {
        TITLES[weights]: [
            Quantised(name, seed, weights=weights, **change)
            for name, change in changes.items()
            for seed in ablation.seeds
        ]
        for weights in ablation.tables
    }


def train_row(task: Task, float_student: Any, row: Quantised, T: list[int]) -> dict[str, Any]:
    """One student, from its masters to its held-out figures."""
    config = task.config
    stages = replace(
        config.quantised_stages,
        **{name: replace(getattr(config.quantised_stages, name), steps=0) for name in row.left_out},
    )
    settings = {"per_row": config.student.per_row, "T": row.training_T or config.student.training_T} | row.settings
    masters = float_student if row.masters == "float student" else from_bert(task.teacher, **config.student_config())
    student = with_weights(masters, row.weights, **settings)
    task.config = replace(config, seed=row.seed)
    try:
        task.train(student, row.key, stages)
    finally:
        task.config = config
    after = spiking_accuracy(student, task.held_out, T)
    figures: dict[str, Any] = {"rate network": rate_accuracy(student, task.held_out, mode="rate")}
    figures |= {f"T = {steps}": result["accuracy"] for steps, result in after.items()}
    rates = after[max(T)]["firing_rates"]
    return figures | {"mean rate": sum(rates.values()) / len(rates)}


def main() -> None:
    """Train every row that is not there yet, then write the tables."""
    ablation = config_from_command_line(Ablation, PRESETS, description=str(__doc__), default_preset="ablation")
    keep_freed_memory()
    config = finished_settings(Config, ablation.run, "float")
    source = Path(ablation.run) / "float"
    identity = to_dict(ablation) | {"float": weights_fingerprint(source), "run_config": to_dict(config)}
    with RunDirectory(ablation.output_dir, identity) as run:
        task = Task(config, run)
        float_student: Any = SpikingBertForSequenceClassification.from_pretrained(source)
        float_student.to(task.teacher.device)
        plan = tables(ablation)
        results = run_rows(run, plan, lambda row: train_row(task, float_student, row, ablation.T))
        columns = [name for name in next(iter(results.values()))[0][1] if name != "row"]
        print(write_tables(run, results, columns, config=to_dict(ablation)))


if __name__ == "__main__":
    command_line(main)
