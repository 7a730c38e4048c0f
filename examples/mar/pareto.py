"""Quality against rate: students of one stage 1 over T, tau, frame weight and target rate.

    python examples/mar/pareto.py run=runs/tiny output_dir=runs/pareto
    python examples/mar/pareto.py run=runs/tiny output_dir=runs/pareto stages=[measure]

run is the output_dir of a finished train.py: its stage 1 is where every student starts, its spiking.teacher their
teacher. Each row is written when it is done, so the same command goes on after an interruption. output_dir gets
table.md, ablation.json, pareto.png and every student (students/<key>); stages=[measure] times text generation by those
that are there, in the form that spikelm.deploy makes for a gather, and writes the table again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from settings import Config, Sparsity
from train import spiking_objective
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import spikelm
from spikelm.ablation import Row, Tables, run_rows, write_tables
from spikelm.distill.activity import weights_behind
from spikelm.evaluate import evaluate, firing_statistics
from spikelm.evaluate_decoding import tokens_per_second
from spikelm.experiment import Experiment, Optimisation, finished_settings, say, weights_fingerprint
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory

PRESETS = Path(__file__).parent / "pareto_presets"
TITLE = "Quality against rate"
COLUMNS = (
    "ce", "kl_to_teacher", "sum_of_rates", "sum_of_rates_weighted", "union_rate", "union_rate_weighted", "read_rate",
)  # fmt: skip
SPEED = "tokens_per_second"


@dataclass(frozen=True)
class Code:
    """One code and the rates its students aim at; null is a student without the activity term.

    start: sum of rates that a channel may have at calibration, as a multiple of the target; null is no limit.
    """

    T: int
    tau: float
    frame_weight: float
    targets: list[float | None]
    weight: float = 2.0
    start: float | None = None
    steps: int | None = None  # null: those of the optimisation


@dataclass(frozen=True)
class Pareto:
    """Which students, and how long each trains."""

    run: str
    output_dir: str
    codes: list[Code]
    stages: list[Literal["train", "measure"]] = field(default_factory=lambda: ["train"])
    seed: int = 0
    optimisation: Optimisation = Optimisation(steps=1200, learning_rate=2e-3)
    evaluation_contexts: int | None = None
    new_tokens: int = 128  # of a timed text


@dataclass(frozen=True)
class Student(Row):
    """One student: its code, its rate and how long it trains."""

    T: int
    tau: float
    frame_weight: float
    target: float | None
    weight: float
    max_sum_of_rates: float | None
    steps: int

    @property
    def code(self) -> str:
        """Its line in the picture."""
        return f"T = {self.T}, tau {self.tau:g}, {self.steps} steps"


def rows_of(pareto: Pareto) -> list[Student]:
    """A row for every target of every code."""
    rows = []
    for code in pareto.codes:
        for target in code.targets:
            start = None if target is None or code.start is None else round(code.start * target, 4)
            steps = code.steps or pareto.optimisation.steps
            weight = 0.0 if target is None else code.weight
            row = Student("", pareto.seed, code.T, code.tau, code.frame_weight, target, weight, start, steps)
            wanted = "no target" if target is None else f"target {target:g}"
            rows.append(replace(row, name=f"{row.code}, {wanted}"))
    return rows


def config_of(config: Config, row: Student, pareto: Pareto) -> Config:
    """The run's configuration with the row's neuron, rate and training."""
    neuron = {name: getattr(row, name) for name in ("T", "tau", "frame_weight")}
    spiking = replace(
        config.spiking,
        neuron=replace(config.spiking.neuron, **neuron),
        sparsity=Sparsity(row.target, row.weight, "union", row.max_sum_of_rates),
        optimisation=replace(pareto.optimisation, steps=row.steps),
    )
    return replace(config, seed=row.seed, spiking=spiking)


def train_row(
    experiment: Experiment, config: Config, dense: PreTrainedModel, row: Student, pareto: Pareto
) -> dict[str, Any]:
    """One student, from calibration to its held-out figures; saved."""
    set_seed(row.seed)
    config = config_of(config, row, pareto)
    spiking, experiment = config.spiking, replace(experiment, settings=config)
    student = experiment.spiking_copy(
        dense, spiking.recipe(), spiking.calibration_contexts, spiking.sparsity.max_sum_of_rates
    )
    teacher = dense if spiking.teacher == "stage1" else experiment.teacher
    record = experiment.train(row.key, student, teacher, spiking_objective(config), spiking.optimisation)
    contexts = pareto.evaluation_contexts
    firing = firing_statistics(student.eval(), experiment.held_out, max_contexts=contexts)
    figures = evaluate(student, experiment.held_out, teacher=experiment.teacher, max_contexts=contexts) | firing
    weights = weights_behind(student)
    read = sum(weights[name] * site["union_rate"] for name, site in firing["sites"].items())
    figures["read_rate"] = read / sum(weights.values())
    student.save_pretrained(student_path(experiment.run, row))
    experiment.tokenizer.save_pretrained(student_path(experiment.run, row))
    by_site = {name: site["union_rate"] for name, site in firing["sites"].items()}
    return {column: figures[column] for column in COLUMNS} | {"union_by_site": by_site, "wall_s": record["wall_s"]}


def student_path(run: RunDirectory, row: Student) -> Path:
    """Where a row's student is kept."""
    return run.path("students") / row.key


def measure(
    run: RunDirectory, rows: list[Student], pareto: Pareto, dense: PreTrainedModel, prompt_ids: torch.Tensor
) -> None:
    """Tokens per second of stage 1 and of every row's student in the form for a gather, by its key, to speed.json."""
    speeds = {"stage1": tokens_per_second(dense, prompt_ids, pareto.new_tokens)}
    for row in rows:
        student = AutoModelForCausalLM.from_pretrained(student_path(run, row)).eval()
        speeds[row.key] = tokens_per_second(spikelm.deploy(student, form="gather"), prompt_ids, pareto.new_tokens)
        say(f"{row.name}: {speeds[row.key]:.1f} tokens per second")
    run.write_json("speed.json", speeds)


def draw(results: list[tuple[Student, dict[str, Any]]], path: Path) -> None:
    """CE against both rates, a line per code, a point per target, which it names."""
    from matplotlib.figure import Figure

    panels = {
        "sum_of_rates": "spikes per channel and token (sum of rates)",
        "read_rate": "share of the weights that are read (union rate)",
    }
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for code in dict.fromkeys(row.code for row, _ in results):
            points = [(f[column], f["ce"], row.target) for row, f in results if row.code == code]
            points.sort(key=lambda point: point[0])  # a target may be None
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], marker="o", markersize=4, label=code)
            for *place, target in points:
                name = "none" if target is None else f"{target:g}"
                axes.annotate(name, place, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xlabel(label)
        axes.grid(True, color="0.92", linewidth=0.6)
    figure.axes[0].set_ylabel("held-out CE (nats); points: the target")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train every row that is not there yet, time the students where that is asked for, then write the table."""
    pareto = config_from_command_line(Pareto, PRESETS, description=str(__doc__), default_preset="pareto")
    keep_freed_memory()
    config = finished_settings(Config, pareto.run, "stage1")
    source = Path(pareto.run) / "stage1"
    rows = rows_of(pareto)
    for row in rows:
        row_config = config_of(config, row, pareto)  # refuses bad values now, not rows later
        row_config.spiking.recipe().make_neuron(num_channels=1)
        spiking_objective(row_config)
        row_config.spiking.optimisation.check(row.name)
    asked = ("stages", "codes", "new_tokens")  # of one call: rows may be added to a run
    identity = {name: value for name, value in to_dict(pareto).items() if name not in asked}
    identity |= {"source": weights_fingerprint(source), "run_config": to_dict(config)}
    with RunDirectory(pareto.output_dir, identity) as run:
        experiment = Experiment.open(config, run, config.teacher)
        dense = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False).to(experiment.teacher.device)
        if "train" in pareto.stages:
            run_rows(run, {TITLE: rows}, lambda row: train_row(experiment, config, dense, row, pareto))
        finished = [row for row in rows if run.path(f"row-{row.key}.json").exists()]
        if "measure" in pareto.stages:
            prompt = experiment.tokenizer(config.prompt, return_tensors="pt")["input_ids"]
            measure(run, finished, pareto, dense, prompt)
        print(write_results(run, experiment, dense, finished, pareto))


def write_results(
    run: RunDirectory, experiment: Experiment, dense: PreTrainedModel, rows: list[Student], pareto: Pareto
) -> str:
    """table.md, ablation.json and pareto.png of the rows that are finished, with their speed where it was timed."""
    speeds = run.read_json("speed.json") if run.path("speed.json").exists() else {}
    results: Tables[Student] = {TITLE: []}
    for row in rows:
        figures = run.read_json(f"row-{row.key}.json")
        results[TITLE].append((row, figures | ({SPEED: speeds[row.key]} if row.key in speeds else {})))
    timed = all(SPEED in figures for _, figures in results[TITLE])
    reference = evaluate(
        dense, experiment.held_out, teacher=experiment.teacher, max_contexts=pareto.evaluation_contexts
    )
    if "stage1" in speeds:
        reference[SPEED] = speeds["stage1"]
    columns = (*COLUMNS, SPEED) if timed else COLUMNS
    draw(results[TITLE], run.path("pareto.png"))
    return write_tables(run, results, columns, reference={"stage1": reference}, config=to_dict(pareto))


if __name__ == "__main__":
    command_line(main)
