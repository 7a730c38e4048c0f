"""examples/spikingmamba/dpo.py from its command line to what it leaves in output_dir."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikelm.convert import recipe_of
from spikelm.distill.callbacks import read_metrics
from spikelm.run import RunDirectory

FIELDS = {
    "evaluation_contexts": 8,
    "sample_tokens": 8,
    "beta": 0.1,
    "made.train_pairs": 48,
    "made.held_out_pairs": 24,
    "made.prompt_tokens": 12,
    "made.completion_tokens": 16,
    "optimisation.steps": 25,
    "optimisation.batch_size": 8,
    "optimisation.learning_rate": 0.001,
    "optimisation.save_steps": 100,
}


def arguments(run: Path, output_dir: Path, more: dict[str, Any] | None = None) -> list[str]:
    values = {**FIELDS, "run": run, **(more or {}), "output_dir": output_dir}
    return ["--preset", "smoke", *(f"{name}={value}" for name, value in values.items())]


def metrics_of(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def finished_dpo(spikingmamba: Any, finished_spikingmamba: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a small run. Tests leave it as it is."""
    output_dir = tmp_path_factory.mktemp("dpo") / "run"
    assert spikingmamba.call("dpo.py", arguments(finished_spikingmamba, output_dir)) == 0
    return output_dir


def test_metrics_hold_what_is_promised(finished_dpo: Path, finished_spikingmamba: Path) -> None:
    metrics = metrics_of(finished_dpo)
    before, after = metrics["preferences"]["before"], metrics["preferences"]["after"]
    assert (before["accuracy"], before["margin"]) == (0.5, 0.0)
    assert after["accuracy"] > 0.5 + after["standard_error"] and after["margin"] > 0, "real text is preferred"
    assert after["pairs"] == metrics["pairs"]["held_out"] <= 24 and 8 < metrics["pairs"]["train"] <= 48
    source = metrics_of(finished_spikingmamba)["student"]
    assert metrics["student"]["ce"] == pytest.approx(source["ce"], rel=1e-5), "the student that was distilled"
    assert metrics["tuned"]["ce"] != metrics["student"]["ce"]
    assert metrics["ce_above_student"] == pytest.approx(metrics["tuned"]["ce"] / metrics["student"]["ce"] - 1)
    lines = [json.loads(line) for line in (finished_dpo / "training/tuned/log.jsonl").read_text().splitlines()]
    assert {line["sgc_weight"] for line in lines} == {0.3}, "students train with compensation, which the log says"
    assert metrics["config"]["beta"] == 0.1 and metrics["training"]["tuned"]["steps"] == 25
    for figure in ("losses", "firing", "raster"):
        assert (finished_dpo / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_the_tuned_student_comes_back(finished_dpo: Path, finished_spikingmamba: Path) -> None:
    student, tuned = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (finished_spikingmamba / "student", finished_dpo / "tuned")
    )
    assert recipe_of(tuned) == recipe_of(student)
    changed = {
        name
        for (name, old), new in zip(student.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert "backbone.layers.0.mixer.in_proj.weight" in changed
    assert not any("embedding" in name for name in changed), "frozen as in the distillation"


def test_pairs_are_of_different_text(finished_dpo: Path, spikingmamba: Any) -> None:
    train, held_out = (
        [json.loads(line) for line in (finished_dpo / "pairs" / f"{part}.jsonl").read_text().split("\n")[:-1]]
        for part in ("train", "held_out")
    )
    text = spikingmamba.text.read_text()
    places = [[text.find(pair["prompt"] + pair["chosen"]) for pair in pairs] for pairs in (train, held_out)]
    assert min(map(min, places)) >= 0, "chosen is how the text goes on"
    assert max(places[0]) < min(places[1])
    assert not any(pair["prompt"] + pair["rejected"] in text for pair in (*train, *held_out))


def test_an_interrupted_run_goes_on(
    spikingmamba: Any,
    finished_spikingmamba: Path,
    finished_dpo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = arguments(finished_spikingmamba, tmp_path / "run")
    finish = RunDirectory.finish_stage

    def interrupted(self: RunDirectory, stage: str, *given: Any) -> Path:
        if stage == "tuned":
            raise KeyboardInterrupt
        return finish(self, stage, *given)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish_stage", interrupted)
        assert spikingmamba.call("dpo.py", command) == 130
    kept = [tmp_path / "run" / name for name in ("pairs/train.jsonl", "training/tuned/checkpoint-25/model.safetensors")]
    times = [path.stat().st_mtime_ns for path in kept]
    log = (tmp_path / "run" / "training" / "tuned" / "log.jsonl").read_text()
    assert spikingmamba.call("dpo.py", command) == 0
    assert kept[0].stat().st_mtime_ns == times[0] and not kept[1].exists()
    assert (tmp_path / "run" / "training" / "tuned" / "log.jsonl").read_text() == log, "nothing was trained again"
    found, expected = metrics_of(tmp_path / "run"), metrics_of(finished_dpo)
    assert found["preferences"] == expected["preferences"] and found["tuned"]["ce"] == expected["tuned"]["ce"]
    capfd.readouterr()
    assert spikingmamba.call("dpo.py", command) == 0, "once more: the table again"
    output = capfd.readouterr()
    assert "tuned: training" not in output.err and "accuracy" in output.out and "[tuned]" in output.out
    other = arguments(finished_spikingmamba, tmp_path / "run", {"beta": 0.2})
    assert spikingmamba.call("dpo.py", other) == 2
    assert "already holds another run (beta=0.1 there, beta=0.2 asked)" in capfd.readouterr().err


def test_pairs_of_a_file(spikingmamba: Any, finished_spikingmamba: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"The cat {n}", "chosen": " ran to house", "rejected": " xqz"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"preferences": tmp_path / "pairs.jsonl", "read.held_out": 0.3, "optimisation.steps": 3}
    assert spikingmamba.call("dpo.py", arguments(finished_spikingmamba, tmp_path / "run", fields)) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["pairs"] == {"train": 14, "held_out": 6}
    assert not (tmp_path / "run" / "pairs").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"made.prompt_tokens": 30}, "made.prompt_tokens + made.completion_tokens = 46; the run's contexts have 32"),
        ({"made.held_out_pairs": 100000}, "made.held_out_pairs=100000, but there are"),
        ({"preferences": "missing.jsonl"}, "no such preference pairs: missing.jsonl"),
        ({"run": "missing"}, "run must be the output_dir of a finished train.py with a student"),
        ({"optimisation.steps": 0}, "steps must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_done(
    spikingmamba: Any,
    finished_spikingmamba: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert spikingmamba.call("dpo.py", arguments(finished_spikingmamba, tmp_path / "run", fields)) == 2
    (error,) = [line for line in capfd.readouterr().err.split("\n") if line.startswith("error: ")]
    assert message in error
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_make_the_run_of_one(
    spikingmamba: Any, finished_spikingmamba: Path, finished_dpo: Path, tmp_path: Path
) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [sys.executable, *launch, "--rdzv-endpoint", "localhost:0", str(spikingmamba.directory / "dpo.py")]
    command += arguments(finished_spikingmamba, tmp_path / "run")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wall seconds") == 1  # one of them reports
    for part in ("train", "held_out"):
        pairs = [(directory / "pairs" / f"{part}.jsonl").read_text() for directory in (tmp_path / "run", finished_dpo)]
        assert pairs[0] == pairs[1]
    log = "training/tuned/log.jsonl"
    shared, alone = (read_metrics(directory / log) for directory in (tmp_path / "run", finished_dpo))
    for name in ("loss", "rewards/margins"):
        # Far enough behind the first steps a spike may flip by rounding.
        assert [line[name] for line in shared] == pytest.approx([line[name] for line in alone], rel=1e-3)
    found, wanted = metrics_of(tmp_path / "run"), metrics_of(finished_dpo)
    assert found["preferences"]["before"] == wanted["preferences"]["before"]
    assert found["tuned"]["ce"] == pytest.approx(wanted["tuned"]["ce"], rel=1e-3)
    # One process takes it up.
    assert spikingmamba.call("dpo.py", arguments(finished_spikingmamba, tmp_path / "run")) == 0
