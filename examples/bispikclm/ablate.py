"""SpAD without each of its terms, T, and the readings of the block, each trained from the same random weights.

    python examples/bispikclm/ablate.py run=runs/bispikclm output_dir=runs/bispikclm-ablation

run is the output_dir of a finished train.py, whose teacher, data and student every row uses. Each row is written when
it is done, so the same command goes on after an interruption. output_dir gets table.md and ablation.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from settings import Config
from train import check, distil

from spikelm.ablation import Row, run_rows, write_tables
from spikelm.evaluate import evaluate, population_statistics
from spikelm.experiment import Experiment, Optimisation, finished_settings, weights_fingerprint
from spikelm.ngrams import ngram_cross_entropies
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory

PRESETS = Path(__file__).parent / "ablation_presets"
TITLES = {"terms": "SpAD's terms", "T": "Time steps", "design": "Readings of the paper"}
COLUMNS = ("ce", "kl_to_teacher", "reverse_kl", "firing_rate", "mean_map_density")
TERMS = {"EA": "embedding", "SAA": "attention", "SFA": "feature", "STA": "soft", "HTA": "hard"}


@dataclass(frozen=True)
class Ablation:
    """Which rows, and how long each trains."""

    run: str
    output_dir: str
    tables: list[Literal["terms", "T", "design"]] = field(default_factory=lambda: ["terms", "T", "design"])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    T: list[int] = field(default_factory=lambda: [2, 4])
    optimisation: Optimisation = Optimisation(
        steps=1200, batch_size=8, learning_rate=3e-3, warmup_fraction=0.1, max_grad_norm=0.7, bf16=True
    )
    evaluation_contexts: int = 96


@dataclass(frozen=True)
class Trained(Row):
    """One student: what it changes of the run's ``student`` and ``alignment``."""

    student: dict[str, Any] = field(default_factory=dict)
    alignment: dict[str, Any] = field(default_factory=dict)


def tables(ablation: Ablation) -> dict[str, list[Trained]]:
    """The rows of every table."""
    terms: dict[str, dict[str, dict[str, Any]]] = {"all five": {}}
    terms |= {f"without {short}": {"alignment": {f"{name}_weight": 0.0}} for short, name in TERMS.items()}
    terms["STA and HTA alone"] = {
        "alignment": {f"{name}_weight": 0.0 for name in ("embedding", "attention", "feature")}
    }
    steps: dict[str, dict[str, dict[str, Any]]] = {f"T = {T}": {"student": {"T": T}} for T in ablation.T}
    design: dict[str, dict[str, dict[str, Any]]] = {
        "as the run": {},
        "binary residual": {"student": {"residual": "binary"}},
        "binary residual, learned thresholds": {"student": {"residual": "binary", "learn_threshold": True}},
        "learned thresholds": {"student": {"learn_threshold": True}},
        "map threshold as everywhere, 1": {"student": {"map_threshold": None}},
        "surrogate of alpha 2": {"student": {"surrogate_alpha": 2.0}},
        "positions of 0.02": {"student": {"initializer_position": 0.02}},
        "SAA's weight 0.1": {"alignment": {"attention_weight": 0.1}},
        "teacher's maps not scaled by row": {"alignment": {"row_max": False}},
        "v_threshold 0.7": {"student": {"v_threshold": 0.7}},
    }
    plan = {"terms": terms, "T": steps, "design": design}
    return {
        TITLES[table]: [Trained(name, seed, **what) for name, what in plan[table].items() for seed in ablation.seeds]
        for table in ablation.tables
    }


def config_of(config: Config, row: Trained, ablation: Ablation) -> Config:
    """The configuration of a row."""
    return replace(
        config,
        seed=row.seed,
        student=replace(config.student, **row.student),
        alignment=replace(config.alignment, **row.alignment),
        optimisation=ablation.optimisation,
    )


def train_row(experiment: Experiment, config: Config, row: Trained, contexts: int) -> dict[str, Any]:
    """One student, from random weights to its held-out figures."""
    student, _ = distil(replace(experiment, settings=config), config, row.key)
    figures = evaluate(student, experiment.held_out, teacher=experiment.teacher, max_contexts=contexts)
    firing = population_statistics(student, experiment.held_out, max_contexts=contexts)
    densities = firing["map_density"]
    figures |= {"firing_rate": firing["firing_rate"], "mean_map_density": sum(densities) / len(densities)}
    return {column: figures[column] for column in COLUMNS} | {"map_density": densities}


def main() -> None:
    """Train every row that is not there yet, then write the tables."""
    ablation = config_from_command_line(Ablation, PRESETS, description=str(__doc__), default_preset="ablation")
    keep_freed_memory()
    config = finished_settings(Config, ablation.run, "student")
    plan = tables(ablation)
    for row in (row for rows in plan.values() for row in rows):
        check(config_of(config, row, ablation))  # refuses a bad T now, not rows later
    identity = to_dict(ablation) | {"teacher": weights_fingerprint(config.teacher), "run_config": to_dict(config)}
    with RunDirectory(ablation.output_dir, identity) as run:
        experiment = Experiment.open(config, run, config.teacher)
        contexts = ablation.evaluation_contexts
        results = run_rows(
            run, plan, lambda row: train_row(experiment, config_of(config, row, ablation), row, contexts)
        )
        reference = {"teacher": evaluate(experiment.teacher, experiment.held_out, max_contexts=contexts)}
        if not config.streaming:
            held_out, vocabulary = islice(experiment.held_out, contexts), experiment.teacher.config.vocab_size
            reference["ngrams"] = ngram_cross_entropies(experiment.train_data, held_out, vocabulary)
        print(write_tables(run, results, COLUMNS, reference=reference, config=to_dict(ablation)))


if __name__ == "__main__":
    command_line(main)
