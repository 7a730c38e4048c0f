"""Every neuron in both networks, over several seeds, against the network's own neuron.

    python examples/digits/compare.py output_dir=runs/digits

Training settings are the same for all neurons; what a neuron's constructor was given is in the result. Each run is
written when it is done, so the same command goes on after an interruption. output_dir gets digits.json.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import snntorch_mlp
import spikingjelly_conv
from digits import PRESETS

from spikelm.errors import SpikelmError
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line

NETWORKS = {"spikingjelly_conv": spikingjelly_conv, "snntorch_mlp": snntorch_mlp}


@dataclass(frozen=True)
class Comparison:
    """How long, and how often."""

    output_dir: str
    steps: int
    seeds: list[int] = field(default_factory=lambda: list(range(10)))


def compare(network: ModuleType, comparison: Comparison, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of every neuron in one network, and the configuration that they share."""
    rows: dict[str, Any] = {}
    for neuron in network.NEURONS:
        runs = [
            network.run(network.Config(str(directory / f"{neuron}_{seed}"), comparison.steps, seed=seed, neuron=neuron))
            for seed in comparison.seeds
        ]
        rows[neuron] = summary(runs)
        difference = rows[neuron]["mean"] - rows[network.BASELINE]["mean"]  # the baseline comes first
        rows[neuron]["points_from_baseline"] = round(100 * difference, 2)
    own = ("output_dir", "neuron", "seed")
    shared = {name: value for name, value in runs[-1]["config"].items() if name not in own}
    return rows, {"config": shared, "versions": runs[-1]["versions"]}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs that differ in their seed alone, as one row."""
    accuracies = [run["test_accuracy"] for run in runs]
    firing = {
        layer: {key: round(statistics.fmean(run["firing"][layer][key] for run in runs), 4) for key in figures}
        for layer, figures in runs[0]["firing"].items()
    }
    return {
        "arguments": runs[0]["neuron_arguments"],
        "test_accuracy": [round(accuracy, 6) for accuracy in accuracies],
        "mean": round(statistics.fmean(accuracies), 6),
        "standard_deviation": round(statistics.stdev(accuracies), 6),
        "firing": firing,
        "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
    }


def main() -> None:
    """All runs that are not there yet, then the summary."""
    comparison = config_from_command_line(Comparison, PRESETS, description=str(__doc__), default_preset="full")
    if len(set(comparison.seeds)) < 2 or len(set(comparison.seeds)) < len(comparison.seeds):
        raise SpikelmError(f"seeds must be two or more different ones; got {comparison.seeds}")
    with RunDirectory(comparison.output_dir, to_dict(comparison)) as run:
        command = " ".join(["python examples/digits/compare.py", *sys.argv[1:]])
        result: dict[str, Any] = {"command": command, "seeds": comparison.seeds}
        for name, network in NETWORKS.items():
            rows, settings = compare(network, comparison, run.path(name))
            result[name] = {"baseline": network.BASELINE, "config": settings["config"], "neurons": rows}
            result["versions"] = settings["versions"]
            print(f"{name}, test accuracy over {len(comparison.seeds)} seeds")
            for neuron, row in rows.items():
                accuracy = f"{row['mean']:.2%} +- {100 * row['standard_deviation']:.2f}"
                print(f"  {neuron:<10}{accuracy:>16}{row['points_from_baseline']:>+8.2f} points")
        run.write_json("digits.json", result)


if __name__ == "__main__":
    command_line(main)
