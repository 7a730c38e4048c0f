"""The paper's ablations on a small teacher: Tables 2, 3 and 4 of MAR, and T x (tau, frame weight).

    python examples/mar/ablate.py run=runs/tiny output_dir=runs/ablation

run is the output_dir of a finished train.py, whose stage-1 model is the frozen teacher and the start of every row. Each
row is written when it is done, so the same command goes on after an interruption. output_dir gets table.md,
ablation.json and pareto.png.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm
from train import Config, Experiment, Optimisation, prepare, spiking_student
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from spikelm import plot
from spikelm.convert import NEURONS, Recipe
from spikelm.distill import SBDS
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluate, firing_statistics
from spikelm.neurons import ATMN
from spikelm.ops.dynamics import Fire
from spikelm.presets import config_from_command_line, from_dict, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, stage_manifest, versions

PRESETS = Path(__file__).parent / "ablation_presets"
TITLES = {
    "components": "Table 2, components",
    "features": "Table 3, where features are compared",
    "divergence": "Table 4, (alpha, beta)",
    "code": "T and tau, forward KL",
}
COLUMNS = ("ce", "kl_to_teacher", "reverse_kl", "kl_to_stage1", "sum_of_rates", "union_rate")


class BinaryMultistep(ATMN):
    """ATMN without negative spikes: the binary neuron of the first row of Table 2."""

    fire: ClassVar[Fire] = "binary"


NEURONS["BinaryMultistep"] = BinaryMultistep


@dataclass(frozen=True)
class Ablation:
    """Which rows, and how long each trains."""

    run: str
    output_dir: str
    tables: list[Literal["components", "features", "divergence", "code"]] = field(
        default_factory=lambda: ["components", "features", "divergence", "code"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the four rows of Table 2
    T: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    optimisation: Optimisation = Optimisation(steps=200, learning_rate=2e-3)
    evaluation_contexts: int = 96


@dataclass(frozen=True)
class Row:
    """One student: its neuron and its loss."""

    name: str
    neuron: dict[str, Any]
    alpha: float = 1.0
    beta: float = 0.0
    feature_weight: float = 0.0
    taps: str = "pre"
    seed: int = 0

    @property
    def key(self) -> str:
        """Names what decides the result, so that a row of two tables is trained once."""
        settings = {name: value for name, value in to_dict(self).items() if name != "name"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def tables(ablation: Ablation) -> dict[str, list[Row]]:
    """The rows of every table. Tables 2 to 4 use T = 4, tau = 1 and counts."""
    ternary = {"name": "ATMN", "T": 4, "tau": 1.0, "frame_weight": 1.0}
    binary = ternary | {"name": "BinaryMultistep"}
    both_kl = {"alpha": 0.2, "beta": 0.7}
    table2 = [
        Row("binary, KL", binary),
        Row("ATMN, KL", ternary),
        Row("ATMN, KL + reverse KL", ternary, **both_kl),
        Row("ATMN, KL + reverse KL, pre-norm", ternary, **both_kl, feature_weight=1.0),
    ]
    codes = {"tau 1, counts": (1.0, 1.0), "tau 0.5, weights 2^-t": (0.5, 0.5), "tau 2, counts": (2.0, 1.0)}
    rows = {
        "components": [replace(row, seed=seed) for row in table2 for seed in ablation.seeds],
        "features": [Row(taps, ternary, **both_kl, feature_weight=1.0, taps=taps) for taps in ("pre", "post", "both")],
        "divergence": [
            Row(f"({alpha}, {beta})", ternary, alpha, beta)
            for alpha, beta in ((0.0, 1.0), (1.0, 0.0), (0.7, 0.2), (0.2, 0.7))
        ],
        "code": [
            Row(f"T = {T}, {code}", ternary | {"T": T, "tau": tau, "frame_weight": weight})
            for code, (tau, weight) in codes.items()
            for T in ablation.T
        ],
    }
    return {TITLES[table]: rows[table] for table in ablation.tables}


def train_row(
    experiment: Experiment, dense: PreTrainedModel, row: Row, ablation: Ablation, name: str
) -> dict[str, Any]:
    """One student, from calibration to its held-out figures."""
    set_seed(row.seed)
    experiment = replace(experiment, config=replace(experiment.config, seed=row.seed))
    student = spiking_student(experiment, dense, recipe_of_row(experiment, row))
    objective = SBDS(row.alpha, row.beta, row.feature_weight, row.taps)
    experiment.train(name, student, dense, objective, optimisation=ablation.optimisation)
    contexts = ablation.evaluation_contexts
    firing = firing_statistics(student, experiment.held_out, max_contexts=contexts)
    to_llama, to_stage1 = (
        evaluate(student, experiment.held_out, teacher=t, max_contexts=contexts) for t in (experiment.teacher, dense)
    )
    figures = to_llama | {"kl_to_stage1": to_stage1["kl_to_teacher"]} | firing
    return {column: figures[column] for column in COLUMNS}


def fingerprint(source: Path) -> str:
    """Of the stage-1 weights, so that rows of another source are never mixed in."""
    weights = source / "stage1" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "none"


def recipe_of_row(experiment: Experiment, row: Row) -> Recipe:
    """The run's neuron with what the row changes of it."""
    return replace(experiment.config.spiking.neuron, **row.neuron).recipe()


def load_experiment(ablation: Ablation, run: RunDirectory) -> tuple[Experiment, PreTrainedModel]:
    """The teacher and data of the finished run, and its stage-1 model."""
    source = Path(ablation.run)
    if not (source / "metrics.json").exists() or not (source / "stage1").exists():
        raise SpikelmError(f"run must be the output_dir of a finished train.py with a stage1; got {ablation.run}")
    stage_manifest(source / "stage1")  # whole, or an error
    config = from_dict(Config, json.loads((source / "metrics.json").read_text())["config"])
    if config.teacher == "embedded":
        config = replace(config, teacher=str(source / "teacher"))
    experiment = prepare(config, run)
    dense = AutoModelForCausalLM.from_pretrained(source / "stage1").eval().requires_grad_(False)
    return experiment, dense.to(experiment.teacher.device)


def summarise(rows: dict[str, list[tuple[Row, dict[str, float]]]]) -> str:
    """Markdown: one line per row, seeds as mean +- standard deviation."""
    lines = []
    for title, results in rows.items():
        lines += [f"### {title}", "", "| row | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name in dict.fromkeys(row.name for row, _ in results):
            figures = [figures for row, figures in results if row.name == name]
            lines.append(f"| {name} | " + " | ".join(spread([f[column] for f in figures]) for column in COLUMNS) + " |")
        lines.append("")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.4f}"


def draw_pareto(results: list[tuple[Row, dict[str, float]]], path: Path) -> None:
    """KL against spikes, a line per code, a point per T."""
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for row, figures in results:
        T, code = row.name.split(", ", 1)
        curves.setdefault(code, []).append((figures["sum_of_rates"], figures["kl_to_stage1"], T))
    plot.pareto(curves, path, x_label="spikes per channel and token (sum of rates)", y_label="KL to stage 1 (nats)")


def main() -> None:
    """Train every row that is not there yet, then write the table."""
    ablation = config_from_command_line(Ablation, PRESETS, description=str(__doc__), default_preset="ablation")
    keep_freed_memory()
    with RunDirectory(ablation.output_dir, to_dict(ablation) | {"source": fingerprint(Path(ablation.run))}) as run:
        experiment, dense = load_experiment(ablation, run)
        plan = tables(ablation)
        for row in (row for rows in plan.values() for row in rows):
            recipe_of_row(experiment, row).make_neuron(num_channels=1)  # refuses a bad T now, not rows later
        done: dict[str, dict[str, float]] = {}
        for row in tqdm([row for rows in plan.values() for row in rows], desc="rows"):
            if row.key not in done:
                path = run.path(f"row-{row.key}.json")
                if not path.exists():
                    figures = train_row(experiment, dense, row, ablation, row.key)
                    run.write_json(path.name, {"row": to_dict(row), **figures})
                    shutil.rmtree(run.path("training") / row.key)
                done[row.key] = run.read_json(path.name)
        results = {title: [(row, done[row.key]) for row in rows] for title, rows in plan.items()}
        reference = {
            "stage1": evaluate(
                dense, experiment.held_out, teacher=experiment.teacher, max_contexts=ablation.evaluation_contexts
            )
        }
        run.write_json(
            "ablation.json",
            {title: [done[row.key] | {"row": to_dict(row)} for row in rows] for title, rows in plan.items()}
            | {"reference": reference, "config": to_dict(ablation), "versions": versions()},
        )
        table = summarise(results)
        run.path("table.md").write_text(table)
        if TITLES["code"] in results:
            draw_pareto(results[TITLES["code"]], run.path("pareto.png"))
        print(table)


if __name__ == "__main__":
    command_line(main)
