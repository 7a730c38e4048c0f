"""SpikingMamba's second stage: the distilled student prefers what it should (DPO against a frozen copy of itself).

    python examples/spikingmamba/dpo.py run=runs/spikingmamba output_dir=runs/spikingmamba-dpo

run is the output_dir of a finished train.py. preferences= is a .jsonl file or hub:owner/name with rows prompt, chosen,
rejected; "embedded" makes pairs of the run's own text, where the true continuation is preferred to one that the student
samples. Needs TRL (pip install 'spikelm[rl]'). Presets are in examples/spikingmamba/preference_presets; any field may
follow as field=value. The same command resumes. output_dir gets the tuned student, metrics.json and figures/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from settings import Config
from transformers import AutoModelForCausalLM, PreTrainedModel

from spikelm import plot
from spikelm.data import load_whole
from spikelm.data.preferences import load_preferences, make_preferences, require_trl, write_preferences
from spikelm.data.sources import line_rows
from spikelm.distill.arguments import check_rate
from spikelm.distill.callbacks import CompensationWeight
from spikelm.distill.preference import train_preferences
from spikelm.distributed import on_first_rank
from spikelm.errors import SpikelmError
from spikelm.experiment import (
    Experiment,
    Optimisation,
    file_fingerprint,
    finished_settings,
    say,
    weights_fingerprint,
)
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "preference_presets"
DRAWN = ("loss", "rewards/accuracies", "rewards/margins")
Pairs = tuple[Any, Any]


@dataclass(frozen=True)
class Made:
    """Pairs made of text, for preferences=embedded; those held out are of held-out text."""

    train_pairs: int = 1024
    held_out_pairs: int = 256
    prompt_tokens: int = 32
    completion_tokens: int = 32
    temperature: float = 1.5
    batch_size: int = 32


@dataclass(frozen=True)
class Read:
    """How pairs of a file or Hub dataset are read; see load_preferences."""

    held_out: float = 0.1
    long_pairs: Literal["error", "drop"] = "error"
    append_eos: bool = True


@dataclass(frozen=True)
class Preferences:
    """Everything a run of dpo.py depends on, beside the run whose student it tunes."""

    run: str
    output_dir: str
    preferences: str = "embedded"
    data: str | None = None  # the text of the made pairs and of the evaluation; None is the run's
    seed: int = 0
    beta: float = 0.01
    evaluation_contexts: int | None = None
    sample_tokens: int = 60
    made: Made = Made()
    read: Read = Read()
    optimisation: Optimisation = Optimisation(steps=300, learning_rate=5e-7, weight_decay=0.0)  # ours


def settings_of(config: Preferences) -> Config:
    """The run's configuration with what this one says about text and evaluation; refuses what would fail later."""
    require_trl("preference optimisation and its trainer")
    check_rate("beta", config.beta)
    config.optimisation.check("optimisation")
    settings = finished_settings(Config, config.run, "student")
    made, length = config.made, settings.context_length
    if config.preferences == "embedded" and made.prompt_tokens + made.completion_tokens > length:
        raise SpikelmError(
            f"made.prompt_tokens + made.completion_tokens = {made.prompt_tokens + made.completion_tokens}; the run's "
            f"contexts have {length} tokens"
        )
    settings = replace(
        settings,
        data=config.data or settings.data,
        seed=config.seed,
        evaluation_contexts=config.evaluation_contexts,
        sample_tokens=config.sample_tokens,
    )
    settings.check()
    return settings


def load_student(experiment: Experiment, config: Preferences) -> PreTrainedModel:
    """The distilled student, with the embeddings frozen where the distillation had them so."""
    student = load_whole(AutoModelForCausalLM, str(Path(config.run) / "student"), "student")
    student.to(experiment.teacher.device).eval().requires_grad_(True)
    settings = experiment.settings
    assert isinstance(settings, Config)
    if settings.distillation.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    return student


def make_pairs(experiment: Experiment, config: Preferences, student: PreTrainedModel) -> None:
    """The stage "pairs": train.jsonl from training text, held_out.jsonl from held-out text."""
    made = config.made
    options = {name: value for name, value in asdict(made).items() if not name.endswith("_pairs")}
    contexts = {
        "train": list(experiment.train_data.take(made.train_pairs)),
        "held_out": list(experiment.held_out.take(made.held_out_pairs)),
    }
    for part, found in contexts.items():
        asked = getattr(made, f"{part}_pairs")
        if len(found) < asked:
            raise SpikelmError(f"made.{part}_pairs={asked}, but there are {len(found)} contexts of that text")
    say("pairs: sampling")
    parts = {
        part: make_preferences(student, experiment.tokenizer, found, seed=2 * config.seed + number, **options)
        for number, (part, found) in enumerate(contexts.items())
    }

    def write(directory: Path) -> None:
        for part, pairs in parts.items():
            write_preferences(directory / f"{part}.jsonl", pairs)

    experiment.run.finish_stage("pairs", write, {part: len(pairs) for part, pairs in parts.items()})


def pairs_of(experiment: Experiment, config: Preferences, student: PreTrainedModel) -> Pairs:
    """(train, held-out) pairs, made first where they are to be made and are not there."""
    if config.preferences != "embedded":
        length = experiment.settings.context_length
        return load_preferences(
            config.preferences, experiment.tokenizer, length, seed=config.seed, **asdict(config.read)
        )
    if not experiment.run.is_done("pairs"):
        on_first_rank(lambda: make_pairs(experiment, config, student))
    directory = experiment.run.path("pairs")
    train, held_out = (
        Dataset.from_list([dict(row) for _, row in line_rows(str(directory / f"{part}.jsonl"))])
        for part in ("train", "held_out")
    )
    return train, held_out


def tune(
    experiment: Experiment, config: Preferences, student: PreTrainedModel, pairs: Pairs
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student after DPO, and the record of its training in training/tuned."""
    before = experiment.evaluate(student)
    record = train_preferences(
        student,
        None,
        *pairs,
        experiment.tokenizer,
        output_dir=experiment.run.path("training") / "tuned",
        seed=config.seed,
        beta=config.beta,
        max_length=experiment.settings.context_length,
        callbacks=[CompensationWeight(student, None)],
        **asdict(config.optimisation),
    )
    return student, record | {"before": before, "pairs": {"train": len(pairs[0]), "held_out": len(pairs[1])}}


def report(experiment: Experiment, config: Preferences, tuned: PreTrainedModel) -> dict[str, Any]:
    """metrics.json and the figures."""
    run = experiment.run
    record = run.stage_record("tuned")
    metrics: dict[str, Any] = {
        "student": record["before"],
        "tuned": experiment.evaluate(tuned),
        "preferences": record["held_out"],
        "pairs": record["pairs"],
        "training": {"tuned": record},
        "wall_s": {"tuned": record["wall_s"]},
        "firing": experiment.firing(tuned),
        "config": to_dict(config),
        "versions": versions(),
    }
    metrics["ce_above_student"] = metrics["tuned"]["ce"] / metrics["student"]["ce"] - 1
    plot.loss_curves({"tuned": experiment.log_of("tuned")}, experiment.figure("losses.png"), DRAWN)
    run.write_json("metrics.json", metrics)
    return metrics


def print_table(metrics: dict[str, Any]) -> None:
    """The result, on stdout."""
    columns = ("ce", "bits_per_byte", "kl_to_teacher")
    print(f"\n{'model':<10}" + "".join(f"{c:>16}" for c in (*columns, "accuracy", "standard error", "margin")))
    for name, when in (("student", "before"), ("tuned", "after")):
        preference = metrics["preferences"][when]
        figures = [metrics[name][column] for column in columns]
        figures += [preference[column] for column in ("accuracy", "standard_error", "margin")]
        print(f"{name:<10}" + "".join(f"{figure:>16.4f}" for figure in figures))
    pairs = metrics["pairs"]
    print(f"\nrewards on {pairs['held_out']} held-out pairs, trained on {pairs['train']}")
    print(f"CE above the student's {100 * metrics['ce_above_student']:.2f} %")
    print(f"wall seconds {metrics['wall_s']['tuned']:.0f}")
    for name in ("student", "tuned"):
        print(f"\n[{name}] {metrics[name]['sample']}")


def main() -> None:
    """Read the configuration, make or read the pairs, tune, report."""
    config = config_from_command_line(Preferences, PRESETS, description=str(__doc__), default_preset="tiny")
    keep_freed_memory()
    settings = settings_of(config)
    identity = to_dict(config) | {
        "student": weights_fingerprint(Path(config.run) / "student"),
        "pairs": file_fingerprint(config.preferences),
    }
    with RunDirectory(config.output_dir, identity, several_processes=True) as run:
        experiment = Experiment.open(settings, run, settings.teacher)

        def build() -> tuple[PreTrainedModel, dict[str, Any]]:
            student = load_student(experiment, config)
            return tune(experiment, config, student, pairs_of(experiment, config, student))

        tuned = experiment.stage("tuned", build)
        assert tuned is not None  # asked for
        on_first_rank(lambda: print_table(report(experiment, config, tuned)))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
