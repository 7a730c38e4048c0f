"""Several processes tune by preferences what one tunes: the same curve, every pair once, checkpoints for any number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spikelm.distill.callbacks import read_metrics
from tests.distill.test_shared_training import assert_same, run

SCRIPT = Path(__file__).with_name("shared_preferences.py")
NOT_COMPARED = ("wall_s", "epoch")  # within a pass the epoch counts forward passes, which processes share
SPIKING: dict[str, Any] = {"student": "spiking", "pairs": 11, "steps": 50}
# Of the last update of a pass with 27 pairs, 11 pairs: for each of two processes 4, then 3 and a filler.
ACCUMULATED: dict[str, Any] = {"student": "llamba", "pairs": 27, "steps": 20, "gradient_accumulation": 4}
# Within a pass of three steps, the last of which leaves a process without a pair.
RESUMED: dict[str, Any] = {
    "student": "llamba",
    "pairs": 10,
    "steps": 30,
    "save_steps": 5,
    "gradient_checkpointing": True,
}


def launch(processes: int, output_dir: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """The script, by itself or under torchrun."""
    done = run(processes, output_dir, SCRIPT, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(directory: Path) -> list[dict[str, float]]:
    """What was logged at every step."""
    lines = read_metrics(directory / "log.jsonl")
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def held_out(directory: Path) -> dict[str, dict[str, float]]:
    """Figures before and after the training."""
    found: dict[str, dict[str, float]] = json.loads((directory / "result.json").read_text())["held_out"]
    return found


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings by one process in one/, by two in two/, and one that was broken off twice in resumed/."""
    directory = tmp_path_factory.mktemp("preferences")
    runs = {"spiking": SPIKING, "accumulated": ACCUMULATED}
    launch(2, directory, {**in_directory("two", runs), "resumed": {**RESUMED, "fail_at": 13}})
    alone = in_directory("one", {**runs, "resumed": RESUMED})
    launch(1, directory, {**alone, "resumed": {**RESUMED, "fail_at": 23}})
    assert len(curve(directory / "resumed")) == 22  # a step that fails is not logged
    launch(2, directory, {"resumed": RESUMED})
    return directory


def in_directory(name: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The same runs, each a directory deeper."""
    return {f"{name}/{run}": options for run, options in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "wanted"),
    [("two/spiking", "one/spiking"), ("two/accumulated", "one/accumulated"), ("resumed", "one/resumed")],
)
def test_two_processes_give_the_curve_of_one(output_dir: Path, found: str, wanted: str) -> None:
    lines = curve(output_dir / wanted)
    assert len(lines) == (50 if "spiking" in wanted else 20 if "accumulated" in wanted else 30)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert_same(curve(output_dir / found), lines)
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "skipped_updates"} <= lines[0].keys()
    one, two = held_out(output_dir / wanted), held_out(output_dir / found)
    assert two["before"] == one["before"] == {"accuracy": 0.5, "standard_error": 0.0, "margin": 0.0, "pairs": 6}
    # A spike of a held-out text may flip by rounding.
    assert two["after"] == pytest.approx(one["after"], rel=1e-2 if "spiking" in wanted else 1e-5)


@pytest.mark.slow
def test_figures_are_means_over_all_pairs_of_an_update(output_dir: Path) -> None:
    # Before the first step the policy is the reference, and the mean over a pass that is one update is known.
    lines = read_metrics(output_dir / "two" / "accumulated" / "log.jsonl")
    assert (lines[0]["rewards/chosen"], lines[0]["rewards/accuracies"]) == (0.0, 0.0)
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
        pairs = 16 if line["step"] % 2 else 11
        assert line["rewards/accuracies"] * pairs == pytest.approx(round(line["rewards/accuracies"] * pairs), abs=1e-4)
