"""MAR from beginning to end: Llama -> Mamba-2 (stage 1) -> ternary spikes before every projection (stage 2).

    python examples/mar/train.py --preset tiny teacher=PATH_OR_HUB_ID data=stories.txt output_dir=runs/stories

Presets are in examples/mar/presets; any field may follow as field=value (--help lists them). Without teacher= and
data= a small Llama is trained on the documentation that Python carries. The same command resumes an interrupted run.
output_dir gets a checkpoint per stage (orientation, alignment, stage1, student), metrics.json and figures/.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from settings import STAGES, Config, Optimisation, Spiking
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import spikelm
from spikelm import plot
from spikelm.convert import recipe_of, spike_sites
from spikelm.data import bytes_per_token, load_contexts, load_teacher, load_whole, python_documentation, train_teacher
from spikelm.data.sources import source_names
from spikelm.distill import SBDS, HiddenAlignment, LogitDistillation, MatrixOrientation
from spikelm.distill.callbacks import last_metrics
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.evaluate import batches, evaluate, firing_statistics, generate_sample
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "presets"


@dataclass
class Experiment:
    """What every stage works with."""

    config: Config
    run: RunDirectory
    teacher: PreTrainedModel
    tokenizer: Any
    train_data: Any
    held_out: Any
    bytes_per_token: float

    def evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Held-out figures of a model against the Llama, and a greedy text."""
        figures = evaluate(
            model,
            self.held_out,
            teacher=self.teacher,
            bytes_per_token=self.bytes_per_token,
            max_contexts=self.config.evaluation_contexts,
        )
        return figures | {
            "sample": generate_sample(model, self.tokenizer, self.config.prompt, self.config.sample_tokens)
        }

    def train(self, name: str, student: PreTrainedModel, teacher: PreTrainedModel, objective: Any, **more: Any) -> Any:
        """One training run, resumed where an earlier one stopped; checkpoints and log in training/<name>."""
        settings: Optimisation = more.pop("optimisation")
        return train(
            student,
            teacher,
            self.train_data,
            objective,
            output_dir=self.run.path("training") / name,
            seed=self.config.seed,
            **to_dict(settings),
            **more,
        )

    def stage(self, name: str, build: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]) -> PreTrainedModel | None:
        """The model of a finished stage; builds and saves it where it is asked for and not there; None if neither."""
        if self.run.is_done(name):
            return self.load(name)
        if name not in self.config.stages:
            return None
        say(f"{name}: training")
        start = time.monotonic()
        model, record = build()
        model.eval()
        record |= {"total_s": round(time.monotonic() - start, 1)}
        self.run.finish_stage(name, lambda directory: self._save(model, directory), record)
        for checkpoint in (self.run.path("training") / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # the optimiser's state; log.jsonl stays
        return model

    def load(self, name: str) -> PreTrainedModel:
        """The model of a finished stage."""
        return AutoModelForCausalLM.from_pretrained(self.run.path(name)).to(self.teacher.device).eval()

    def _save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def check(config: Config) -> None:
    """Refuses now what a later stage would refuse after an hour."""
    source_names(config.data)
    config.spiking.neuron.recipe().make_neuron(num_channels=1)
    spiking_objective(config.spiking)
    LogitDistillation(**to_dict(config.divergence))
    if not config.distillation.steps or not config.spiking.optimisation.steps:
        raise SpikelmError("distillation.steps and spiking.optimisation.steps must be >= 1; stages= leaves stages out")


def prepare(config: Config, run: RunDirectory) -> Experiment:
    """The teacher, trained first if it is the embedded one, and the packed data."""
    path = config.teacher
    if path == "embedded":
        path = str(run.path("teacher"))
        if not Path(path).exists():
            say("teacher: training a small Llama on Python's documentation")
            size = to_dict(config.embedded_teacher)
            train_teacher(
                path, python_documentation(), context_length=config.context_length, seed=config.seed,
                held_out=config.held_out, **size,
            )  # fmt: skip
    teacher, tokenizer = load_teacher(path)
    if config.context_length > teacher.config.max_position_embeddings:
        raise SpikelmError(
            f"context_length {config.context_length} is beyond the teacher's {teacher.config.max_position_embeddings}"
        )
    train_data, held_out = load_contexts(
        config.data, tokenizer, config.context_length, held_out=config.held_out, text_field=config.text_field,
        streaming=config.streaming, max_tokens=config.max_tokens,
    )  # fmt: skip
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(config.seed)  # after the teacher, so that a run that finds one there starts like the run that trained it
    return Experiment(config, run, teacher, tokenizer, train_data, held_out, bytes_per_token(held_out, tokenizer))


def stage1(experiment: Experiment) -> PreTrainedModel | None:
    """Llama -> Mamba-2 in MOHAWK's three steps, each from the last one there is; or the Llamba that is given."""
    config, teacher = experiment.config, experiment.teacher
    if config.stage1 is not None:
        return load_llamba(config.stage1, teacher)
    model: PreTrainedModel | None = None
    missing: str | None = None
    steps: list[tuple[str, Optimisation, Any, list[str] | None]] = [
        ("orientation", config.orientation, MatrixOrientation(), ["*.mixer.*"]),
        ("alignment", config.alignment, HiddenAlignment(), ["*.mixer.*"]),
        ("stage1", config.distillation, LogitDistillation(**to_dict(config.divergence)), None),
    ]
    for name, optimisation, objective, trainable in steps:
        if optimisation.steps == 0:
            continue

        def build(
            start: PreTrainedModel | None = model,
            name: str = name,
            optimisation: Optimisation = optimisation,
            objective: Any = objective,
            trainable: list[str] | None = trainable,
        ) -> tuple[PreTrainedModel, dict[str, Any]]:
            student = start or LlambaForCausalLM.from_llama(teacher, **to_dict(config.mixer))  # type: ignore[arg-type]
            student.requires_grad_(True)
            return student, experiment.train(
                name, student, teacher, objective, optimisation=optimisation, trainable=trainable
            )

        if missing and name in config.stages and not experiment.run.is_done(name):
            raise SpikelmError(f"{name} starts from {missing}: run that first, or set {missing}.steps=0")
        built = experiment.stage(name, build)
        model, missing = built or model, name if built is None else missing
    return model if experiment.run.is_done("stage1") else None


def load_llamba(path: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """A dense Llamba with the vocabulary of the teacher."""
    dense = load_whole(LlambaForCausalLM, path, "stage1")
    spiking = " and is spiking" if recipe_of(dense) else ""
    if spiking or dense.config.vocab_size != teacher.config.vocab_size:
        raise SpikelmError(
            f"stage1 must be a dense Llamba with the teacher's vocabulary of {teacher.config.vocab_size}; {path} has "
            f"{dense.config.vocab_size}{spiking}"
        )
    return dense.to(teacher.device).eval()


def stage2(experiment: Experiment, dense: PreTrainedModel) -> PreTrainedModel | None:
    """Mamba-2 -> spikes: neurons before every projection, calibrated thresholds, SBDS."""
    config = experiment.config.spiking

    def build() -> tuple[PreTrainedModel, dict[str, Any]]:
        student = spiking_student(experiment, dense, config.neuron.recipe())
        converted = experiment.evaluate(student)
        objective = spiking_objective(config)
        teacher = dense.requires_grad_(False) if config.teacher == "stage1" else experiment.teacher
        record = experiment.train("student", student, teacher, objective, optimisation=config.optimisation)
        return student, record | {"at_conversion": converted}

    return experiment.stage("student", build)


def spiking_objective(config: Spiking) -> SBDS:
    """The loss of stage 2."""
    return SBDS(config.alpha, config.beta, config.feature_weight, config.taps, config.chunk_size)


def spiking_student(experiment: Experiment, dense: PreTrainedModel, recipe: spikelm.Recipe) -> PreTrainedModel:
    """A copy of the dense model with neurons, their thresholds calibrated on the first training contexts."""
    student = copy.deepcopy(dense).requires_grad_(True)
    spikelm.spikify(student, recipe)
    count = experiment.config.spiking.calibration_contexts
    rows = batches(list(experiment.train_data.take(count)), 4)
    inputs = ({"input_ids": ids.to(dense.device), "logits_to_keep": 1} for ids in rows)
    spikelm.calibrate(student, inputs, tokens_per_site=count * experiment.config.context_length)
    return student


def report(experiment: Experiment, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """metrics.json and the figures, from whatever stages there are."""
    run, config = experiment.run, experiment.config
    done = [name for name in STAGES if run.is_done(name)]
    models = {name: experiment.load(name) for name in done if name not in models} | models
    metrics: dict[str, Any] = {name: experiment.evaluate(model) for name, model in models.items()}
    metrics["training"] = {name: run.stage_record(name) for name in done}
    metrics["wall_s"] = teacher_seconds(run) | {name: run.stage_record(name)["wall_s"] for name in done}
    logs = {name: run.path("training") / name / "log.jsonl" for name in done}
    figures = run.path("figures")
    figures.mkdir(exist_ok=True)
    if logs:
        plot.loss_curves(logs, figures / "losses.png")
    if "student" in models:
        student = models["student"]
        metrics["firing"] = firing_statistics(student, experiment.held_out, max_contexts=config.evaluation_contexts)
        plot.firing_heatmap(metrics["firing"], figures / "firing.png")
        sentence = experiment.held_out[0]["input_ids"][:32]
        draw_raster(student, sentence, experiment.tokenizer, figures / "raster.png")
    metrics["config"], metrics["versions"] = to_dict(config), versions()
    run.write_json("metrics.json", metrics)
    return metrics


def teacher_seconds(run: RunDirectory) -> dict[str, float]:
    """How long the embedded teacher trained, if there is one."""
    log = run.path("teacher") / "log.jsonl"
    return {"teacher": last_metrics(log)["wall_s"]} if log.exists() else {}


@torch.no_grad()
def draw_raster(student: PreTrainedModel, ids: list[int], tokenizer: Any, path: Path) -> None:
    """The spikes of one bank of neurons over a sentence."""
    name, owner = list(spike_sites(student).items())[0]
    seen: list[torch.Tensor] = []
    handle = owner.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    student(torch.tensor([ids], device=student.device))
    handle.remove()
    frames = owner.neuron.encode(seen[0][0])  # T, L, C
    plot.raster(frames.cpu(), path, tokens=[tokenizer.decode([i]) for i in ids], title=f"Spikes before {name}")


def print_table(metrics: dict[str, Any]) -> None:
    """The result, on stdout."""
    columns = ("ce", "bits_per_byte", "kl_to_teacher", "reverse_kl")
    print(f"\n{'model':<18}" + "".join(f"{column:>16}" for column in columns))
    present = [name for name in ("teacher", "stage1", "student") if name in metrics]
    for name in present:
        print(f"{name:<18}" + "".join(f"{metrics[name][column]:>16.4f}" for column in columns))
    if "firing" in metrics:
        firing = metrics["firing"]
        print(f"\nspikes per channel and token {firing['sum_of_rates']:.3f}, fires at all {firing['union_rate']:.3f}")
    print("wall seconds " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_s"].items()))
    for name in present:
        print(f"\n[{name}] {metrics[name]['sample']}")


def say(message: str) -> None:
    """A line of progress, to stderr."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Read the configuration, run the stages that are asked for, report."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="tiny")
    identity = to_dict(replace(config, stages=list(STAGES)))  # one run may do its stages one at a time
    check(config)
    keep_freed_memory()
    with RunDirectory(config.output_dir, identity) as run:
        experiment = prepare(config, run)
        models = {"teacher": experiment.teacher}
        dense = stage1(experiment)
        if dense is not None:
            models["stage1"] = dense
            student = stage2(experiment, dense)
            if student is not None:
                models["student"] = student
        elif "student" in config.stages:
            raise SpikelmError("the student needs stage1: run it first, or leave student out of stages=")
        print_table(report(experiment, models))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
