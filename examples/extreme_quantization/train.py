"""1-bit and 1.58-bit spiking BERTs at equilibrium from beginning to end, distilled from a BERT classifier.

    python examples/extreme_quantization/train.py --preset tiny data=FILES held_out=1821 output_dir=runs/sst2

The teacher is any BertForSequenceClassification (teacher=DIRECTORY_OR_HUB_ID); without it a small BERT is trained on
the task first, and without data= the task is to tell what Python's docstrings are about. data= takes TSV, CSV and JSONL
files, glue:sst2 and hub:owner/name. The float spiking student is distilled in stages, the quantised ones start from it.
Presets are in examples/extreme_quantization/presets; any field may follow as field=value (--help lists them). The same
command resumes an interrupted run. output_dir gets float, ternary, binary, metrics.json and figures/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from settings import Config, Stages
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed

from spikelm import plot
from spikelm.baselines import bag_of_words, majority
from spikelm.data.classification import (
    Row,
    check_labels,
    collate_classification,
    encode_rows,
    hold_out_sentences,
    load_classification,
)
from spikelm.data.embedded_classification import embedded_classification, train_bert
from spikelm.data.sources import Reading, read_pieces, source_names
from spikelm.deploy import packed_storage, storage_line
from spikelm.distill.trainer import train
from spikelm.distributed import on_first_rank
from spikelm.energy import report as energy_report
from spikelm.errors import SpikelmError
from spikelm.evaluate_classification import rate_accuracy, spiking_accuracy
from spikelm.experiment import say, teacher_seconds, trained_stage
from spikelm.layers.equilibrium_if import by_layer
from spikelm.models.spikingbert import SpikingBertForSequenceClassification, from_bert, with_weights
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "presets"
ENERGY_SENTENCES = 16


class Task:
    """The teacher, the sentences it is asked about, and where things are kept."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self.config, self.run = config, run
        self.rows, self.held_out_rows = read_rows(config)
        self.teacher, self.tokenizer = load_classifier(teacher_directory(config, run, self.rows, self.held_out_rows))
        for rows in (self.rows, self.held_out_rows):
            check_labels(rows, self.teacher.config.num_labels)
        self.train_data = encode_rows(self.rows, self.tokenizer, config.max_length)
        self.held_out = encode_rows(self.held_out_rows, self.tokenizer, config.max_length)

    def train(self, student: SpikingBertForSequenceClassification, name: str, stages: Stages) -> dict[str, Any]:
        """All stages of a student, each resumed where it stopped; their records by name."""
        set_seed(self.config.seed)
        records = {}
        for stage, optimisation in stages.by_name().items():
            student.config.mode = "spiking" if stage == "spiking" else "rate"
            records[stage] = train(
                student,
                self.teacher,
                self.general_data() if stage == "general" else self.train_data,
                self.config.objective(stage),
                output_dir=self.run.path("training") / name / stage,
                seed=self.config.seed,
                data_collator=collate_classification,
                group_by_length=True,
                parallel=self.config.parallel,
                **asdict(optimisation),
            )
        student.config.mode = "spiking"
        return {"stages": records, "wall_s": sum(record["wall_s"] for record in records.values())}

    def general_data(self) -> list[dict[str, Any]]:
        """Sentences whose labels nothing looks at."""
        if self.config.general_text is None:
            return self.train_data
        names = source_names(self.config.general_text)
        pieces = read_pieces(names, Reading(self.tokenizer, None, "train", None, False))
        sentences = [line.strip() for piece in pieces for line in piece.text.split("\n") if line.strip()]
        return encode_rows([Row(text, 0) for text in sentences], self.tokenizer, self.config.max_length)

    def float_student(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The student with float weights, from the teacher's own."""
        set_seed(self.config.seed)
        student = from_bert(self.teacher, **self.config.student_config())
        return student, self.train(student, "float", self.config.float_stages)

    def quantised_student(self, float_student: Any, weights: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The student with binary or ternary weights, its masters from the float one."""
        student = with_weights(float_student, weights, per_row=self.config.student.per_row)
        return student, self.train(student, weights, self.config.quantised_stages)

    def stage(self, name: str, build: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]) -> Any:
        """A finished student, trained first where it is not there."""

        def load(name: str) -> Any:
            return SpikingBertForSequenceClassification.from_pretrained(self.run.path(name)).to(self.teacher.device)  # type: ignore[arg-type]

        return trained_stage(self.run, name, build, load, self.tokenizer)


def read_rows(config: Config) -> tuple[list[Row], list[Row]]:
    """To train on, and held out."""
    fields = {"text_field": config.text_field, "label_field": config.label_field}
    rows = load_classification(config.data, max_rows=config.max_rows, **fields)
    if config.held_out_data is None:
        return hold_out_sentences(rows, config.held_out, config.held_out_seed)
    return rows, load_classification(config.held_out_data, split="validation", **fields)


def teacher_directory(config: Config, run: RunDirectory, rows: list[Row], held_out: list[Row]) -> str:
    """The teacher's directory or Hub id; the embedded one is trained on the spot, once per run."""
    if config.teacher != "embedded":
        return config.teacher

    def train_it() -> None:
        if run.is_done("teacher"):
            return
        say("teacher: training a small BERT on the task's sentences")
        names = embedded_classification()[1] if config.data == "embedded" else None
        shape = asdict(config.embedded_teacher) | {"max_position_embeddings": config.max_length}
        train_bert(run.path("teacher"), rows, held_out, label_names=names, seed=config.seed, **shape)

    on_first_rank(train_it)
    return str(run.path("teacher"))


def load_classifier(source: str) -> tuple[PreTrainedModel, Any]:
    """A BERT classifier in eval mode on its device, and its tokenizer."""
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SpikelmError(f"teacher {source} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise SpikelmError(
            f"teacher {source} is no classifier that was trained: it lacks {', '.join(sorted(loaded['missing_keys']))}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def report(task: Task, students: dict[str, Any]) -> dict[str, Any]:
    """metrics.json and the figures."""
    run, config = task.run, task.config
    tokens = [len(row["input_ids"]) for row in task.held_out]
    metrics: dict[str, Any] = {
        "held_out": {
            "sentences": len(tokens),
            "training_rows": len(task.rows),
            "mean_tokens": sum(tokens) / len(tokens),
        },
        "baselines": {
            "majority": majority(task.rows, task.held_out_rows),
            "bag_of_words": bag_of_words(task.rows, task.held_out_rows),
        },
        "teacher": {"accuracy": rate_accuracy(task.teacher, task.held_out)},
        "students": {},
    }
    for name, student in students.items():
        say(f"{name}: measuring after {', '.join(map(str, config.T))} steps")
        figures: dict[str, Any] = {"rate_network_accuracy": rate_accuracy(student, task.held_out, mode="rate")}
        figures["after"] = spiking_accuracy(student, task.held_out, config.T)
        figures["energy"] = {
            T: energy_of(student, task.held_out[:ENERGY_SENTENCES], T, after["firing_rates"])
            for T, after in figures["after"].items()
        }
        if storage := packed_storage(student):
            figures["storage"] = storage
        metrics["students"][name] = figures
    trained = ["float", *(name for name in students if name != "float")]
    metrics["training"] = {name: run.stage_record(name) for name in trained}
    metrics["wall_s"] = teacher_seconds(run) | {name: metrics["training"][name]["wall_s"] for name in trained}
    draw(task, metrics)
    metrics["config"], metrics["versions"] = to_dict(config), versions()
    run.write_json("metrics.json", metrics)
    return metrics


def energy_of(student: PreTrainedModel, rows: list[Any], T: int, rates: dict[str, float]) -> dict[str, Any]:
    """The energy report's figures on some sentences, unpadded, and T times the rates on all of them."""
    batches = [{"input_ids": row["input_ids"], "T": T} for row in rows]
    counted = energy_report(student, batches, max_batches=len(batches)).summary()
    whole, projections = counted["whole"], counted["projections"]
    return counted | {
        "T": T,
        "per": f"token of {len(rows)} held-out sentences",
        "T_times_rate": {population: T * rate for population, rate in rates.items()},
        "break_even": counted["costs"]["mac"] / counted["costs"]["accumulation"],
        "benefit": whole["benefit"],
        "projections_benefit": projections["benefit"],
        "verdict": "better than dense" if whole["benefit"] > 1 else "worse than dense",
    }


def draw(task: Task, metrics: dict[str, Any]) -> None:
    """Accuracy, gap and rates against T."""
    figures = task.run.path("figures")
    figures.mkdir(exist_ok=True)
    students = metrics["students"]
    accuracy = {
        name: [(T, 100 * after["accuracy"]) for T, after in student["after"].items()]
        for name, student in students.items()
    }
    plot.against_steps(accuracy, figures / "accuracy.png", y_label="held-out accuracy, %", level={
        "teacher": 100 * metrics["teacher"]["accuracy"], "bag of words": 100 * metrics["baselines"]["bag_of_words"],
    })  # fmt: skip
    for name, student in students.items():
        gaps = layer_curves({T: after["rate_gaps"] for T, after in student["after"].items()})
        plot.against_steps(gaps, figures / f"gap-{name}.png", y_label="mean |asr - F|", logarithmic=True)
        rates = student["after"][max(student["after"])]["firing_rates"]
        sites = {population: {"firing_rate": rate} for population, rate in rates.items()}
        plot.firing_heatmap({"sites": sites}, figures / f"rates-{name}.png", rate="firing_rate")


def layer_curves(values: dict[int, dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Means over the populations of a layer, a curve over T each."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for T, populations in values.items():
        for layer, found in by_layer(populations).items():
            curves.setdefault(layer, []).append((T, sum(found) / len(found)))
    return curves


def print_table(metrics: dict[str, Any]) -> None:
    """The result, on stdout."""
    T = [int(steps) for steps in next(iter(metrics["students"].values()))["after"]]
    print(f"\n{'accuracy, %':<14}{'rates':>8}" + "".join(f"{f'T = {steps}':>9}" for steps in T))
    for name, accuracy in (metrics["baselines"] | {"teacher": metrics["teacher"]["accuracy"]}).items():
        print(f"{name:<14}{100 * accuracy:>8.2f}")
    for name, student in metrics["students"].items():
        cells = "".join(f"{100 * student['after'][steps]['accuracy']:>9.2f}" for steps in T)
        print(f"{name:<14}{100 * student['rate_network_accuracy']:>8.2f}{cells}")
    print("\nestimated energy of a token, spiking over dense (1 is break-even; not measured on hardware)")
    for name, student in metrics["students"].items():
        cells = "".join(f"{1 / student['energy'][steps]['benefit']:>9.1f}" for steps in T)
        print(f"{name:<22}{cells}")
    for name, student in metrics["students"].items():
        if "storage" in student:
            print(f"{name}: {storage_line(student['storage'])}")
    print("wall seconds " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_s"].items()))


def main() -> None:
    """Read the configuration, distil the students, report."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="tiny")
    config.check()
    keep_freed_memory()
    with RunDirectory(config.output_dir, to_dict(config), several_processes=True) as run:
        task = Task(config, run)
        float_student = task.stage("float", task.float_student)
        students = {}
        for weights in config.weights:
            build = partial(task.quantised_student, float_student, weights)
            students[weights] = float_student if weights == "float" else task.stage(weights, build)
        on_first_rank(lambda: print_table(report(task, students)))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
