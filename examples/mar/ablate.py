"""The paper's ablations on a small teacher: Tables 2, 3 and 4 of MAR, T x (tau, frame weight), objectives, weights.

    python examples/mar/ablate.py run=runs/tiny output_dir=runs/ablation
    python examples/mar/ablate.py run=runs/tiny output_dir=runs/objectives tables=[objective] seeds=[0,1]

run is the output_dir of a finished train.py, whose stage-1 model is the start of every row and its frozen teacher; of
the objectives the teacher is the Llama. Each row is written when it is done, so the same command goes on after an
interruption. output_dir gets table.md, ablation.json and pareto.png.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from settings import Config
from train import spiking_objective
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from spikelm import plot
from spikelm.ablation import Row, Tables, run_rows, write_tables
from spikelm.convert import NEURONS, Recipe
from spikelm.deploy import packed_storage
from spikelm.distill.objectives import Objective
from spikelm.evaluate import evaluate, firing_statistics
from spikelm.experiment import Experiment, Optimisation, finished_settings, weights_fingerprint
from spikelm.neurons import ATMN
from spikelm.ops.dynamics import Fire
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory

PRESETS = Path(__file__).parent / "ablation_presets"
TITLES = {
    "components": "Table 2, components",
    "features": "Table 3, where features are compared",
    "divergence": "Table 4, (alpha, beta)",
    "code": "T and tau, forward KL",
    "objective": "Objectives, the Llama as frozen teacher",  # SpAD needs attention maps
    "weights": "Weights of the projections, forward KL",
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
    tables: list[Literal["components", "features", "divergence", "code", "objective", "weights"]] = field(
        default_factory=lambda: ["components", "features", "divergence", "code"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of Table 2, objectives and weights
    T: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    optimisation: Optimisation = Optimisation(steps=200, learning_rate=2e-3)
    evaluation_contexts: int = 96


@dataclass(frozen=True)
class Student(Row):
    """One student: its neuron, its loss and its teacher. alpha to taps are of the objective sbds."""

    neuron: dict[str, Any]
    alpha: float = 1.0
    beta: float = 0.0
    feature_weight: float = 0.0
    taps: Literal["pre", "post", "both"] = "pre"
    objective: Literal["sbds", "spad", "kl"] = "sbds"
    teacher: Literal["stage1", "llama"] = "stage1"
    weights: Literal["float", "binary", "ternary"] = "float"
    per_row: bool = False


def tables(ablation: Ablation) -> dict[str, list[Student]]:
    """The rows of every table. All but the codes use T = 4, tau = 1 and counts; SpAD has the run's spad fields."""
    ternary = {"name": "ATMN", "T": 4, "tau": 1.0, "frame_weight": 1.0}
    binary = ternary | {"name": "BinaryMultistep"}
    both_kl = {"alpha": 0.2, "beta": 0.7}
    table2 = [
        Student("binary, KL", 0, binary),
        Student("ATMN, KL", 0, ternary),
        Student("ATMN, KL + reverse KL", 0, ternary, **both_kl),
        Student("ATMN, KL + reverse KL, pre-norm", 0, ternary, **both_kl, feature_weight=1.0),
    ]
    codes = {"tau 1, counts": (1.0, 1.0), "tau 0.5, weights 2^-t": (0.5, 0.5), "tau 2, counts": (2.0, 1.0)}
    objectives = [
        Student("SBDS", 0, ternary, **both_kl, feature_weight=1.0, teacher="llama"),
        Student("SpAD", 0, ternary, objective="spad", teacher="llama"),
        Student("KL", 0, ternary, objective="kl", teacher="llama"),
    ]
    weights = [
        Student("float", 0, ternary),
        Student("ternary", 0, ternary, weights="ternary"),
        Student("ternary per row", 0, ternary, weights="ternary", per_row=True),
        Student("binary", 0, ternary, weights="binary"),
    ]
    rows = {
        "components": [replace(row, seed=seed) for row in table2 for seed in ablation.seeds],
        "features": [
            Student(taps, 0, ternary, **both_kl, feature_weight=1.0, taps=taps) for taps in ("pre", "post", "both")
        ],
        "divergence": [
            Student(f"({alpha}, {beta})", 0, ternary, alpha, beta)
            for alpha, beta in ((0.0, 1.0), (1.0, 0.0), (0.7, 0.2), (0.2, 0.7))
        ],
        "code": [
            Student(f"T = {T}, {code}", 0, ternary | {"T": T, "tau": tau, "frame_weight": weight})
            for code, (tau, weight) in codes.items()
            for T in ablation.T
        ],
        "objective": [replace(row, seed=seed) for row in objectives for seed in ablation.seeds],
        "weights": [replace(row, seed=seed) for row in weights for seed in ablation.seeds],
    }
    return {TITLES[table]: rows[table] for table in ablation.tables}


def train_row(experiment: Experiment, config: Config, dense: PreTrainedModel, row: Student, ablation: Ablation) -> Any:
    """One student, from calibration to its held-out figures."""
    set_seed(row.seed)
    experiment = replace(experiment, settings=replace(config, seed=row.seed))
    student = experiment.spiking_copy(dense, recipe_of_row(config, row), config.spiking.calibration_contexts)
    teacher = dense if row.teacher == "stage1" else experiment.teacher
    experiment.train(row.key, student, teacher, objective_of_row(config, row), ablation.optimisation)
    contexts = ablation.evaluation_contexts
    firing = firing_statistics(student, experiment.held_out, max_contexts=contexts)
    to_llama, to_stage1 = (
        evaluate(student, experiment.held_out, teacher=t, max_contexts=contexts) for t in (experiment.teacher, dense)
    )
    figures = to_llama | {"kl_to_stage1": to_stage1["kl_to_teacher"]} | firing
    storage = packed_storage(student)  # of quantised weights alone
    return {column: figures[column] for column in COLUMNS} | ({"storage": storage} if storage else {})


def recipe_of_row(config: Config, row: Student) -> Recipe:
    """The run's neuron with what the row changes of it, and the row's weights."""
    neuron = replace(config.spiking.neuron, **row.neuron)
    return replace(config.spiking, neuron=neuron, weights=row.weights, per_row=row.per_row).recipe()


def objective_of_row(config: Config, row: Student) -> Objective:
    """The row's loss, with what the run says of all others."""
    fields = {name: getattr(row, name) for name in ("alpha", "beta", "feature_weight", "taps", "teacher")}
    return spiking_objective(replace(config, objective=row.objective, spiking=replace(config.spiking, **fields)))


def draw_pareto(results: list[tuple[Student, dict[str, Any]]], path: Path) -> None:
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
    config = finished_settings(Config, ablation.run, "stage1")
    source = Path(ablation.run) / "stage1"
    with RunDirectory(
        ablation.output_dir, to_dict(ablation) | {"source": weights_fingerprint(source), "run_config": to_dict(config)}
    ) as run:
        plan = tables(ablation)
        for row in (row for rows in plan.values() for row in rows):
            recipe_of_row(config, row).make_neuron(num_channels=1)  # refuses a bad T now, not rows later
        experiment = Experiment.open(config, run, config.teacher)
        dense = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False).to(experiment.teacher.device)
        results: Tables[Student] = run_rows(run, plan, lambda row: train_row(experiment, config, dense, row, ablation))
        contexts = ablation.evaluation_contexts
        reference = evaluate(dense, experiment.held_out, teacher=experiment.teacher, max_contexts=contexts)
        table = write_tables(run, results, COLUMNS, reference={"stage1": reference}, config=to_dict(ablation))
        if TITLES["code"] in results:
            draw_pareto(results[TITLES["code"]], run.path("pareto.png"))
        print(table)


if __name__ == "__main__":
    command_line(main)
