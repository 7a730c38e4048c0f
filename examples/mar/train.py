"""MAR from beginning to end: Llama -> Mamba-2 (stage 1) -> ternary spikes before every projection (stage 2).

    python examples/mar/train.py --preset tiny teacher=PATH_OR_HUB_ID data=stories.txt output_dir=runs/stories

Presets are in examples/mar/presets; any field may follow as field=value (--help lists them). Without teacher= and
data= a small Llama is trained on the documentation that Python carries. The same command resumes an interrupted run.
objective=sbds, spad or kl is the loss of stage 2: MAR's, BiSpikCLM's, or the forward KL alone; objective=stored
teacher_store=DIRECTORY is the KL from what store_teacher.py has kept of the teacher.
spiking.sparsity.target=0.5 keeps the student's neurons below that rate (docs/mar.md).
spiking.weights=ternary or binary quantises the student's projections (docs/weights.md).
output_dir gets a checkpoint per stage (orientation, alignment, stage1, student), metrics.json and figures/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from settings import STAGES, Config
from torch import nn
from transformers import PreTrainedModel

from spikelm import plot
from spikelm.convert import recipe_of
from spikelm.data import load_whole
from spikelm.data.teacher_store import TeacherStore, collate_stored, rows_fingerprint
from spikelm.deploy import packed_storage, storage_line
from spikelm.distill import SBDS, HiddenAlignment, LogitDistillation, MatrixOrientation
from spikelm.distill.objectives import Objective
from spikelm.distill.stored import StoredDistillation
from spikelm.distributed import on_first_rank
from spikelm.errors import SpikelmError
from spikelm.experiment import Experiment, Optimisation, embedded_teacher, say, teacher_seconds
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "presets"


def check(config: Config) -> None:
    """Refuses now what a later stage would refuse after an hour."""
    config.check()
    config.spiking.recipe().make_neuron(num_channels=1)
    spiking_objective(config)
    LogitDistillation(**to_dict(config.divergence))
    if not config.distillation.steps or not config.spiking.optimisation.steps:
        raise SpikelmError("distillation.steps and spiking.optimisation.steps must be >= 1; stages= leaves stages out")
    for name in ("orientation", "alignment", "distillation"):
        if getattr(config, name).steps:
            getattr(config, name).check(name)
    config.spiking.optimisation.check("spiking.optimisation")
    trained = (Path(config.output_dir) / "student").exists()
    if config.objective == "stored" and "student" in config.stages and not trained:
        open_store(config)


def prepare(config: Config, run: RunDirectory) -> Experiment:
    """The teacher, trained first if it is the embedded one, and the packed data."""
    path = config.teacher
    if path == "embedded":
        path = embedded_teacher(config, run, "llama", to_dict(config.embedded_teacher))
    return Experiment.open(config, run, path)


def stage1(experiment: Experiment, config: Config) -> PreTrainedModel | None:
    """Llama -> Mamba-2 in MOHAWK's three steps, each from the last one there is; or the Llamba that is given."""
    teacher = experiment.teacher
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
            return student, experiment.train(name, student, teacher, objective, optimisation, trainable=trainable)

        if missing and name in config.stages and not experiment.run.is_done(name):
            raise SpikelmError(f"{name} starts from {missing}: run that first, or set {missing}.steps=0")
        built = experiment.stage(name, build, asked=name in config.stages)
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


def stage2(experiment: Experiment, dense: PreTrainedModel, config: Config) -> PreTrainedModel | None:
    """Mamba-2 -> spikes: neurons before every projection, calibrated thresholds, the objective of the run."""
    spiking = config.spiking

    def build() -> tuple[PreTrainedModel, dict[str, Any]]:
        highest = spiking.sparsity.max_sum_of_rates
        student = experiment.spiking_copy(dense, spiking.recipe(), spiking.calibration_contexts, highest)
        converted = experiment.evaluate(student)
        objective = spiking_objective(config)
        teacher = dense.requires_grad_(False) if spiking.teacher == "stage1" else experiment.teacher
        guide, more = teacher_of(experiment, config, teacher)
        record = experiment.train("student", student, guide, objective, spiking.optimisation, **more)
        return student, record | {"at_conversion": converted}

    return experiment.stage("student", build, asked="student" in config.stages)


def teacher_of(experiment: Experiment, config: Config, teacher: PreTrainedModel) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher and the training's own data; with objective=stored what the teacher said of it, and no teacher."""
    if config.objective != "stored":
        return teacher, {}
    store = open_store(config, teacher)
    on_first_rank(store.verify)
    if store.index["data"] != rows_fingerprint(np.asarray(experiment.train_data["input_ids"], dtype=np.int32)):
        raise SpikelmError(f"teacher_store {config.teacher_store} is of other contexts than this run trains on")
    return nn.Identity(), {"dataset": store, "data_collator": collate_stored}


def open_store(config: Config, teacher: PreTrainedModel | None = None) -> TeacherStore:
    """The finished store of the run, of contexts as long as the run's."""
    assert config.teacher_store is not None  # checked
    store = TeacherStore(config.teacher_store, teacher)
    if store.index["context_length"] != config.context_length:
        raise SpikelmError(f"teacher_store {config.teacher_store} is of other contexts than this run trains on")
    return store


def spiking_objective(config: Config) -> Objective:
    """The loss of stage 2, with the activity term where the run has one."""
    return config.spiking.sparsity.applied_to(quality_objective(config))


def quality_objective(config: Config) -> Objective:
    """What compares the student with its teacher."""
    spiking = config.spiking
    if config.objective == "stored":
        if config.teacher_store is None or config.streaming:
            raise SpikelmError("objective=stored takes teacher_store=DIRECTORY (store_teacher.py) and no streaming")
        return StoredDistillation(spiking.chunk_size)
    if config.objective == "kl":
        return LogitDistillation(chunk_size=spiking.chunk_size)
    if config.objective == "sbds":
        return SBDS(spiking.alpha, spiking.beta, spiking.feature_weight, spiking.taps, spiking.chunk_size)
    if spiking.teacher == "stage1" and config.spad.attention_weight:
        raise SpikelmError(
            "objective=spad compares attention maps, which a Mamba-2 teacher (spiking.teacher=stage1) does not give: "
            "set spiking.teacher=llama, or spad.attention_weight=0"
        )
    return config.spad


def report(experiment: Experiment, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """metrics.json and the figures, from whatever stages there are."""
    run = experiment.run
    done = [name for name in STAGES if run.is_done(name)]
    models = {name: experiment.load(name) for name in done if name not in models} | models
    metrics: dict[str, Any] = {name: experiment.evaluate(model) for name, model in models.items()}
    metrics["training"] = {name: run.stage_record(name) for name in done}
    metrics["wall_s"] = teacher_seconds(run) | {name: run.stage_record(name)["wall_s"] for name in done}
    if done:
        plot.loss_curves({name: experiment.log_of(name) for name in done}, experiment.figure("losses.png"))
    if "student" in models:
        metrics["firing"] = experiment.firing(models["student"])
        if storage := packed_storage(models["student"]):
            metrics["storage"] = storage
    metrics["config"], metrics["versions"] = to_dict(experiment.settings), versions()
    run.write_json("metrics.json", metrics)
    return metrics


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
    if "storage" in metrics:
        print(storage_line(metrics["storage"]))
    print("wall seconds " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_s"].items()))
    for name in present:
        print(f"\n[{name}] {metrics[name]['sample']}")


def main() -> None:
    """Read the configuration, run the stages that are asked for, report."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="tiny")
    identity = to_dict(replace(config, stages=list(STAGES)))  # one run may do its stages one at a time
    check(config)
    keep_freed_memory()
    with RunDirectory(config.output_dir, identity, several_processes=True) as run:
        experiment = prepare(config, run)
        models = {"teacher": experiment.teacher}
        dense = stage1(experiment, config)
        if dense is not None:
            models["stage1"] = dense
            student = stage2(experiment, dense, config)
            if student is not None:
                models["student"] = student
        elif "student" in config.stages:
            raise SpikelmError("the student needs stage1: run it first, or leave student out of stages=")
        on_first_rank(lambda: print_table(report(experiment, models)))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
