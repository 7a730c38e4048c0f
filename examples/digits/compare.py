"""Every neuron in both networks, over several seeds, against the network's own neuron and a linear classifier.

    python examples/digits/compare.py output_dir=runs/digits

Training settings are the same for all neurons; what a neuron's constructor was given is in the result. Each run is
written when it is done, so the same command goes on after an interruption. output_dir gets digits.json.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import snntorch_mlp
import spikingjelly_conv
from digits import PRESETS, images
from sklearn.linear_model import LogisticRegression

from spikelm.errors import SpikelmError
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line

NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "spikingjelly_conv": (spikingjelly_conv, {}),
    "snntorch_mlp": (snntorch_mlp, {}),
    "snntorch_mlp, 2 hidden layers": (snntorch_mlp, {"hidden_layers": 2}),
}


@dataclass(frozen=True)
class Comparison:
    """How long, and how often."""

    output_dir: str
    steps: int
    seeds: list[int] = field(default_factory=lambda: list(range(10)))


def compare(name: str, comparison: Comparison) -> dict[str, Any]:
    """The figures of every neuron in one network, and the configuration that its runs share."""
    script, fields = NETWORKS[name]
    rows: dict[str, Any] = {}
    for neuron in script.NEURONS:
        runs = []
        for seed in comparison.seeds:
            place = Path(comparison.output_dir) / name / f"{neuron}_{seed}"
            runs.append(script.run(script.Config(str(place), comparison.steps, seed=seed, neuron=neuron, **fields)))
        rows[neuron] = summary(runs)
        difference = rows[neuron]["mean"] - rows[script.BASELINE]["mean"]  # the baseline comes first
        rows[neuron]["points_from_baseline"] = round(100 * difference, 2)
    own = ("output_dir", "neuron", "seed")
    shared = {name: value for name, value in runs[-1]["config"].items() if name not in own}
    return {"baseline": script.BASELINE, "config": shared, "versions": runs[-1]["versions"], "neurons": rows}


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


def linear_accuracy() -> float:
    """What a classifier without a hidden layer reaches on the test images."""
    train_x, train_labels, test_x, test_labels = images()
    classifier = LogisticRegression(max_iter=1000).fit(train_x, train_labels)
    return round(float(classifier.score(test_x, test_labels)), 6)


def main() -> None:
    """All runs that are not there yet, then the summary."""
    comparison = config_from_command_line(Comparison, PRESETS, description=str(__doc__), default_preset="full")
    if len(set(comparison.seeds)) < 2 or len(set(comparison.seeds)) < len(comparison.seeds):
        raise SpikelmError(f"seeds must be two or more different ones; got {comparison.seeds}")
    with RunDirectory(comparison.output_dir, to_dict(comparison)) as run:
        command = " ".join(["python examples/digits/compare.py", *sys.argv[1:]])
        result = {"command": command, "seeds": comparison.seeds, "linear_classifier": linear_accuracy()}
        result["networks"] = {name: compare(name, comparison) for name in NETWORKS}
        run.write_json("digits.json", result)
    print_result(result)


def print_result(result: dict[str, Any]) -> None:
    """The means, on stdout."""
    for name, network in result["networks"].items():
        print(f"{name}, test accuracy over {len(result['seeds'])} seeds")
        for neuron, row in network["neurons"].items():
            accuracy = f"{row['mean']:.2%} +- {100 * row['standard_deviation']:.2f}"
            print(f"  {neuron:<10}{accuracy:>16}{row['points_from_baseline']:>+8.2f} points")
    print(f"linear classifier {result['linear_classifier']:.2%}")


if __name__ == "__main__":
    command_line(main)
