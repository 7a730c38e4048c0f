"""The neuron, its gradient compensation (SGC) and D, each combination distilled from the same teacher.

    python examples/spikingmamba/ablate.py run=runs/spikingmamba output_dir=runs/spikingmamba-ablation

run is the output_dir of a finished train.py, whose teacher and data every row uses. Each row is written when it is
done, so the same command goes on after an interruption. output_dir gets table.md, ablation.json and pareto.png.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from settings import Config
from train import check, distil
from transformers import set_seed

import spikelm
from spikelm import plot
from spikelm.ablation import Row, run_rows, write_tables
from spikelm.convert import NEURONS
from spikelm.evaluate import evaluate, firing_statistics
from spikelm.experiment import Experiment, Optimisation, finished_settings, weights_fingerprint
from spikelm.neurons import TILIF
from spikelm.ops import multistep
from spikelm.ops.dynamics import Dynamics
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory

PRESETS = Path(__file__).parent / "ablation_presets"
COLUMNS = ("ce", "kl_to_teacher", "sum_of_rates", "saturation")


class UnsignedIntegerLIF(TILIF):
    """TI-LIF without negative spikes: clip(round(x / V), 0, D), and the window and h(x) on x >= 0 alone. [ours]"""

    def encode_sum(self, x: torch.Tensor, spike_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Integers in 0..D."""
        return super().encode_sum(x.relu(), spike_dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """D binary frames."""
        return super().encode(x.relu())


class BinaryLIF(TILIF):
    """A leaky binary neuron over D time steps with the input at every one, soft reset, threshold D V.

    With the leak left out its count is clip(floor(x / V), 0, D). Surrogate ATan(alpha=2); h(x) on x >= 0 alone. [ours]
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        from spikingjelly.activation_based.surrogate import ATan

        self.binary = Dynamics("binary", ATan(alpha=2.0), decay=self.beta)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """D binary frames, with their gradient."""
        x_seq = x.unsqueeze(0).expand(self.D, *x.shape)
        threshold = self.D * self._threshold(x, x.dim())
        return multistep.multi_step(x_seq, None, threshold, self.binary, keep_state=False, backend=self.backend)[0]

    def encode_sum(self, x: torch.Tensor, spike_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Counts in 0..D."""
        count = self.encode(x).sum(0)
        if not (self.training and self.sgc):
            return count
        smooth = self.D * torch.tanh(x.relu() / (self.D * self._threshold(x, x.dim())))
        mixed = (1 - self.sgc_weight) * count + self.sgc_weight * smooth
        return mixed if self.sgc == "blend" else mixed + (count - mixed).detach()


NEURONS |= {"UnsignedIntegerLIF": UnsignedIntegerLIF, "BinaryLIF": BinaryLIF}
NAMES = {"BinaryLIF": "binary LIF", "UnsignedIntegerLIF": "integer LIF", "TILIF": "TI-LIF"}


@dataclass(frozen=True)
class Ablation:
    """Which rows, and how long each trains."""

    run: str
    output_dir: str
    neurons: list[Literal["BinaryLIF", "UnsignedIntegerLIF", "TILIF"]] = field(default_factory=lambda: list(NAMES))
    sgc: list[Literal["gradient", "blend"] | None] = field(default_factory=lambda: [None, "gradient", "blend"])
    D: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    beta: float = 0.9  # of the binary LIF
    optimisation: Optimisation = Optimisation(steps=200, learning_rate=2e-3)
    evaluation_contexts: int = 96


@dataclass(frozen=True)
class Student(Row):
    """One student: its neuron, D and SGC."""

    neuron: str
    D: int
    sgc: str | None


@dataclass(frozen=True)
class AblationConfig(Config):
    """The finished run's configuration, with the row's neuron in place of TI-LIF."""

    neuron_class: str = "TILIF"
    beta: float = 1.0

    def recipe(self) -> spikelm.Recipe:
        """The row's neuron at the run's two places."""
        recipe = super().recipe()
        return replace(
            recipe, neuron=self.neuron_class, neuron_arguments={**recipe.neuron_arguments, "beta": self.beta}
        )


def tables(ablation: Ablation) -> dict[str, list[Student]]:
    """A table per neuron."""
    return {
        NAMES[neuron]: [
            Student(f"D = {D}, SGC {sgc or 'off'}", seed, neuron, D, sgc)
            for D, sgc, seed in itertools.product(ablation.D, ablation.sgc, ablation.seeds)
        ]
        for neuron in ablation.neurons
    }


def config_of(config: Config, row: Student, ablation: Ablation) -> AblationConfig:
    """The configuration of a row."""
    return AblationConfig(
        **{name: getattr(config, name) for name in config.__dataclass_fields__}
        | {
            "seed": row.seed,
            "neuron": replace(config.neuron, D=row.D, sgc=row.sgc),
            "neuron_class": row.neuron,
            "beta": ablation.beta if row.neuron == "BinaryLIF" else 1.0,
            "distillation": replace(config.distillation, optimisation=ablation.optimisation),
            "evaluation_contexts": ablation.evaluation_contexts,
            "sample_tokens": 1,
        }
    )


def train_row(experiment: Experiment, config: AblationConfig, row: Student) -> dict[str, Any]:
    """One student, from calibration to its held-out figures."""
    set_seed(row.seed)
    student, record = distil(replace(experiment, settings=config), config, row.key)
    contexts = config.evaluation_contexts
    firing = firing_statistics(student, experiment.held_out, max_contexts=contexts)
    figures = evaluate(student, experiment.held_out, teacher=experiment.teacher, max_contexts=contexts) | firing
    figures["saturation"] = statistics.fmean(site["saturation"] for site in firing["sites"].values())
    at_conversion = {f"{name}_at_conversion": record["at_conversion"][name] for name in ("ce", "kl_to_teacher")}
    return {column: figures[column] for column in COLUMNS} | at_conversion


def draw_pareto(results: dict[str, list[tuple[Student, dict[str, Any]]]], path: Path) -> None:
    """KL against spikes, a line per neuron, a point per D: the mean over seeds, with the first SGC setting there is."""
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for neuron, rows in results.items():
        for D in dict.fromkeys(row.D for row, _ in rows):
            figures = [figures for row, figures in rows if (row.D, row.sgc) == (D, rows[0][0].sgc)]
            kl, rate = (statistics.fmean(f[column] for f in figures) for column in ("kl_to_teacher", "sum_of_rates"))
            curves.setdefault(neuron, []).append((rate, kl, f"D = {D}"))
    plot.pareto(curves, path, x_label="spikes per channel and token (mean |s|)", y_label="KL to the teacher (nats)")


def main() -> None:
    """Train every row that is not there yet, then write the tables."""
    ablation = config_from_command_line(Ablation, PRESETS, description=str(__doc__), default_preset="ablation")
    keep_freed_memory()
    config = finished_settings(Config, ablation.run, "student")
    plan = tables(ablation)
    for row in (row for rows in plan.values() for row in rows):
        check(config_of(config, row, ablation))  # refuses a bad D now, not rows later
    identity = to_dict(ablation) | {"teacher": weights_fingerprint(config.teacher), "run_config": to_dict(config)}
    with RunDirectory(ablation.output_dir, identity) as run:
        experiment = Experiment.open(config, run, config.teacher)
        results = run_rows(run, plan, lambda row: train_row(experiment, config_of(config, row, ablation), row))
        contexts = ablation.evaluation_contexts
        reference = evaluate(experiment.teacher, experiment.held_out, max_contexts=contexts)
        print(write_tables(run, results, COLUMNS, reference={"teacher": reference}, config=to_dict(ablation)))
        draw_pareto(results, run.path("pareto.png"))


if __name__ == "__main__":
    command_line(main)
