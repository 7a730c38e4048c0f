"""examples/digits: both networks train with every neuron, and what the result file says holds."""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spikelm.errors import SpikelmError
from spikelm.run import command_line

LoadExample = Callable[[str], ModuleType]
BASELINES = {"spikingjelly_conv": "LIFNode", "snntorch_mlp": "Leaky"}
CASES = [(network, name) for network, own in BASELINES.items() for name in (own, "ATMN", "TILIF", "BinaryIF")]


def exit_status(script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        command_line(script.main)
    return leaving.value.code


@pytest.mark.parametrize(("network", "neuron"), CASES)
def test_a_short_run_learns_and_writes_its_metrics(
    network: str, neuron: str, load_example: LoadExample, tmp_path: Path
) -> None:
    script = load_example(f"digits/{network}.py")
    config = script.Config(str(tmp_path / "run"), steps=30, neuron=neuron)
    metrics = script.run(config)
    assert metrics["test_accuracy"] > 0.6, "chance is 0.1"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 30 and metrics["seconds"] > 0 and metrics["config"]["neuron"] == neuron
    assert {"torch", "spikingjelly", "snntorch", "scikit-learn"} <= metrics["versions"].keys()
    assert len(metrics["firing"]) == 2
    for layer in metrics["firing"].values():
        assert 0 < layer["nonzero"] < 1
        assert layer["rate"] == pytest.approx(layer["nonzero"], abs=1e-3) or neuron == "TILIF"
        assert layer["nonzero"] - 1e-3 <= layer["rate"] <= 4
    assert script.run(config) == metrics, "read, not trained again"


@pytest.mark.parametrize("network", BASELINES)
def test_a_seed_decides_the_run_whatever_the_generator_did_before(
    network: str, load_example: LoadExample, tmp_path: Path
) -> None:
    script = load_example(f"digits/{network}.py")
    states, results = [], []
    for attempt in ("first", "second"):
        torch.manual_seed(len(attempt))
        results.append(script.run(script.Config(str(tmp_path / attempt), steps=3, seed=5))["firing"])
        states.append(torch.get_rng_state())
    other = script.run(script.Config(str(tmp_path / "other"), steps=3, seed=6))["firing"]
    assert results[0] == results[1] != other
    script.run(script.Config(str(tmp_path / "baseline"), steps=3, seed=5, neuron=BASELINES[network]))
    assert torch.equal(torch.get_rng_state(), states[0]), "no neuron draws: weights and batches are the same for all"
    assert torch.equal(states[0], states[1])


def test_the_command_line_trains_and_prints_the_result(
    load_example: LoadExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_example("digits/snntorch_mlp.py")
    arguments = ["--preset", "smoke", "neuron=ATMN", "seed=3", f"output_dir={tmp_path / 'run'}"]
    assert exit_status(script, arguments, monkeypatch) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["config"]["neuron"], metrics["config"]["seed"]) == (30, "ATMN", 3)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"ATMN: test accuracy {metrics['test_accuracy']:.2%}")
    assert "30/30" in captured.err


@pytest.mark.parametrize(
    ("network", "argument", "named"),
    [
        ("spikingjelly_conv", "neuron=LIF", "neuron=LIF: accepted are LIFNode, ATMN, TILIF, BinaryIF"),
        ("snntorch_mlp", "neuron=LIFNode", "neuron=LIFNode: accepted are Leaky, ATMN, TILIF, BinaryIF"),
        ("spikingjelly_conv", "T=0", "T must be an integer >= 1; got 0"),
        ("snntorch_mlp", "hidden_layers=0", "hidden_layers must be an integer >= 1; got 0"),
        ("snntorch_mlp", "steps=0", "steps must be an integer >= 1; got 0"),
        ("snntorch_mlp", "batch_size=-1", "batch_size must be an integer >= 1; got -1"),
        ("snntorch_mlp", "learning_rate=0", "learning_rate must be a finite number > 0; got 0.0"),
        ("compare", "seeds=[1]", "seeds must be two or more different ones; got [1]"),
        ("compare", "seeds=[1, 1]", "seeds must be two or more different ones; got [1, 1]"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_nothing(
    network: str,
    argument: str,
    named: str,
    load_example: LoadExample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_example(f"digits/{network}.py")
    assert exit_status(script, [argument, f"output_dir={tmp_path / 'run'}"], monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {named}\n"
    assert not (tmp_path / "run").exists()


def test_an_output_dir_belongs_to_one_neuron(load_example: LoadExample, tmp_path: Path) -> None:
    script = load_example("digits/snntorch_mlp.py")
    script.run(script.Config(str(tmp_path), steps=1, neuron="Leaky"))
    with pytest.raises(SpikelmError, match="neuron=Leaky there, neuron=ATMN asked"):
        script.run(script.Config(str(tmp_path), steps=1, neuron="ATMN"))


def test_the_comparison_sums_up_its_runs(
    load_example: LoadExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = load_example("digits/compare.py")
    monkeypatch.delitem(compare.NETWORKS, "spikingjelly_conv")  # the slower one
    arguments = ["steps=2", "seeds=[0, 7]", f"output_dir={tmp_path / 'run'}"]
    assert exit_status(compare, arguments, monkeypatch) == 0
    result = json.loads((tmp_path / "run" / "digits.json").read_text())
    assert result["seeds"] == [0, 7] and result["command"].endswith(" ".join(arguments))
    assert 0.96 < result["linear_classifier"] < 0.98
    assert [network["config"]["hidden_layers"] for network in result["networks"].values()] == [1, 2]
    for network in compare.NETWORKS:
        neurons = result["networks"][network]["neurons"]
        assert list(neurons) == ["Leaky", "ATMN", "TILIF", "BinaryIF"]
        for name, row in neurons.items():
            runs = [
                json.loads((tmp_path / "run" / network / f"{name}_{k}" / "metrics.json").read_text()) for k in (0, 7)
            ]
            assert row["test_accuracy"] == pytest.approx([run["test_accuracy"] for run in runs], abs=1e-6)
            assert row["mean"] == pytest.approx(statistics.fmean(row["test_accuracy"]), abs=1e-6)
            points = 100 * (row["mean"] - neurons["Leaky"]["mean"])
            assert row["points_from_baseline"] == pytest.approx(points, abs=0.01)
            assert row["firing"]["neurons.0"]["rate"] == pytest.approx(
                statistics.fmean(run["firing"]["neurons.0"]["rate"] for run in runs), abs=1e-4
            )


@pytest.mark.parametrize("network", BASELINES)
def test_the_measured_neurons_are_within_a_point_of_the_baseline(network: str, repository: Path) -> None:
    result = json.loads((repository / "benchmarks" / "results" / "digits.json").read_text())
    neurons = result["networks"][network]["neurons"]
    assert result["networks"][network]["baseline"] == next(iter(neurons)) == BASELINES[network]
    assert set(neurons) == {BASELINES[network], "ATMN", "TILIF", "BinaryIF"}
    assert all(len(row["test_accuracy"]) == len(result["seeds"]) for row in neurons.values())
    assert all(row["points_from_baseline"] >= -1 for row in neurons.values())
    assert neurons[BASELINES[network]]["mean"] > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("network", BASELINES)
def test_binary_if_reaches_the_baseline_within_a_point(network: str, load_example: LoadExample, tmp_path: Path) -> None:
    script = load_example(f"digits/{network}.py")
    mean = {
        neuron: statistics.fmean(
            script.run(script.Config(str(tmp_path / f"{neuron}{seed}"), steps=150, seed=seed, neuron=neuron))[
                "test_accuracy"
            ]
            for seed in (0, 1)
        )
        for neuron in (BASELINES[network], "BinaryIF")
    }
    assert mean[BASELINES[network]] > 0.96
    assert mean["BinaryIF"] >= mean[BASELINES[network]] - 0.01
