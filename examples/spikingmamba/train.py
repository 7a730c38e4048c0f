"""SpikingMamba: a Mamba-2 language model, signed-integer spikes before its projections, one distillation.

    python examples/spikingmamba/train.py --preset tiny teacher=PATH_OR_HUB_ID data=stories.txt output_dir=runs/stories

The teacher is a Mamba2ForCausalLM or a dense Llamba (stage 1 of examples/mar makes one of a Llama); without teacher=
and data= a small Mamba2ForCausalLM is trained on the documentation that Python carries. Presets are in
examples/spikingmamba/presets; any field may follow as field=value (--help lists them). The same command resumes an
interrupted run. weights=ternary or binary quantises the student's projections (docs/weights.md). output_dir gets the
student, metrics.json, energy.json (docs/energy.md) and figures/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from settings import Config
from transformers import Mamba2ForCausalLM, PreTrainedModel

from spikelm import plot
from spikelm.convert import recipe_of, remember
from spikelm.deploy import packed_storage, storage_line
from spikelm.distill import HiddenMatch
from spikelm.distill.callbacks import CompensationWeight
from spikelm.distributed import on_first_rank
from spikelm.energy import report as energy_report
from spikelm.errors import SpikelmError
from spikelm.experiment import Experiment, embedded_teacher, say, teacher_seconds
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "presets"


def check(config: Config) -> None:
    """Refuses now what a later stage would refuse after an hour."""
    config.check()
    config.recipe().make_neuron(num_channels=1)
    objective_of(config)
    settings, end = config.distillation, config.neuron.sgc_end
    settings.optimisation.check("distillation.optimisation")
    if not 0 < end <= 1:
        raise SpikelmError(f"neuron.sgc_end must be within (0, 1], given {end}")
    contexts, limit = settings.calibration_contexts, settings.max_sum_of_rates
    if contexts < 1:
        raise SpikelmError(f"distillation.calibration_contexts must be at least 1, given {contexts}")
    if limit is not None and not limit > 0:
        raise SpikelmError(f"distillation.max_sum_of_rates must be > 0 or null, given {limit}")


def objective_of(config: Config) -> HiddenMatch:
    """The loss of the single stage."""
    settings = config.distillation
    return HiddenMatch(settings.kl_weight, settings.hidden_weight, settings.temperature, settings.chunk_size)


def prepare(config: Config, run: RunDirectory) -> Experiment:
    """The teacher, trained first if it is the embedded one, and the packed data."""
    path = config.teacher
    if path == "embedded":
        path = embedded_teacher(config, run, "mamba2", to_dict(config.embedded_teacher))
    experiment = Experiment.open(config, run, path)
    teacher = experiment.teacher
    if not isinstance(teacher, (Mamba2ForCausalLM, LlambaForCausalLM)) or recipe_of(teacher):
        raise SpikelmError(
            f"teacher must be a dense Mamba2ForCausalLM or Llamba; {path} is a {type(teacher).__name__}"
            f"{' with neurons' if recipe_of(teacher) else ''}. examples/mar/train.py makes a Llamba of a Llama (stage1)"
        )
    return experiment


def distil(experiment: Experiment, config: Config, name: str = "student") -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student, from its teacher's own weights, and the record of its training in training/<name>."""
    settings = config.distillation
    student = experiment.spiking_copy(
        experiment.teacher, config.recipe(), settings.calibration_contexts, settings.max_sum_of_rates
    )
    converted = experiment.evaluate(student)
    if settings.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    weight = CompensationWeight(student, config.neuron.sgc_end if config.neuron.sgc == "blend" else None)
    record = experiment.train(
        name, student, experiment.teacher, objective_of(config), settings.optimisation, callbacks=[weight]
    )
    if config.neuron.sgc == "blend":  # what the annealing has ended with is what a later training starts with
        trained = replace(config, neuron=replace(config.neuron, sgc_weight=record["sgc_weight"]))
        remember(student, replace(trained.recipe(), calibrated=True))
    return student, record | {"at_conversion": converted}


def report(experiment: Experiment, student: PreTrainedModel) -> dict[str, Any]:
    """metrics.json and the figures."""
    run = experiment.run
    metrics: dict[str, Any] = {
        name: experiment.evaluate(model) for name, model in (("teacher", experiment.teacher), ("student", student))
    }
    metrics["ce_above_teacher"] = metrics["student"]["ce"] / metrics["teacher"]["ce"] - 1
    record = run.stage_record("student")
    metrics["training"] = {"student": record}
    metrics["wall_s"] = teacher_seconds(run) | {"student": record["wall_s"]}
    metrics["firing"] = experiment.firing(student)
    counted = energy_report(student, experiment.held_out, teacher=experiment.teacher)
    run.write_json("energy.json", counted.to_dict())
    counted.plot(experiment.figure("energy.png"))
    metrics["energy"] = counted.summary()
    if storage := packed_storage(student):
        metrics["storage"] = storage
    plot.loss_curves({"student": experiment.log_of("student")}, experiment.figure("losses.png"))
    metrics["config"], metrics["versions"] = to_dict(experiment.settings), versions()
    run.write_json("metrics.json", metrics)
    return metrics


def print_table(metrics: dict[str, Any]) -> None:
    """The result, on stdout."""
    columns = ("ce", "bits_per_byte", "kl_to_teacher", "reverse_kl")
    rows = {
        "teacher": metrics["teacher"],
        "at conversion": metrics["training"]["student"]["at_conversion"],
        "student": metrics["student"],
    }
    print(f"\n{'model':<18}" + "".join(f"{column:>16}" for column in columns))
    for name, figures in rows.items():
        print(f"{name:<18}" + "".join(f"{figures[column]:>16.4f}" for column in columns))
    firing, energy = metrics["firing"], metrics["energy"]
    print(f"\nCE above the teacher's {100 * metrics['ce_above_teacher']:.2f} %")
    print(f"mean |s| {firing['sum_of_rates']:.3f}, share of s != 0 {firing['union_rate']:.3f}")
    print(
        f"energy of dense / spiking, an estimate: projections alone {energy['projections']['benefit']:.2f}, "
        f"everything that is counted {energy['whole']['benefit']:.2f} (energy.json)"
    )
    if "storage" in metrics:
        print(storage_line(metrics["storage"]))
    print("wall seconds " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_s"].items()))
    for name in ("teacher", "student"):
        print(f"\n[{name}] {metrics[name]['sample']}")


def main() -> None:
    """Read the configuration, distil, report."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="tiny")
    check(config)
    keep_freed_memory()
    with RunDirectory(config.output_dir, to_dict(config), several_processes=True) as run:
        experiment = prepare(config, run)

        def build() -> tuple[PreTrainedModel, dict[str, Any]]:
            student, record = distil(experiment, config)
            held_out = experiment.held_out_terms(objective_of(config), student)
            return student, record | {"held_out_terms_without_sgc": held_out}

        student = experiment.stage("student", build)
        assert student is not None  # asked for
        on_first_rank(lambda: print_table(report(experiment, student)))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
