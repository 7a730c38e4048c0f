"""examples/mar in several processes, and from a teacher's answers on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm.distill.callbacks import read_metrics


@pytest.mark.slow
def test_a_student_trains_from_what_the_teacher_said_before(
    mar: Any, finished: Path, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert mar.call("store_teacher.py", [f"run={finished}", f"output_dir={store}", "k=16"]) == 0
    fields = same_teacher | {"stage1": finished / "stage1", "objective": "stored", "teacher_store": store}
    assert mar.run(tmp_path / "run", fields | {"spiking.optimisation.steps": 20}) == 0
    log = [json.loads(line) for line in (tmp_path / "run/training/student/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    capfd.readouterr()
    assert mar.run(tmp_path / "other", fields | {"context_length": 16}) == 2
    assert "is of other contexts than this run trains on" in capfd.readouterr().err
    assert mar.run(tmp_path / "llama", fields | {"spiking.teacher": OTHER[teacher_asked(finished)]}) == 2
    assert "was made with another teacher" in capfd.readouterr().err
    assert mar.run(tmp_path / "none", fields | {"teacher_store": "null"}) == 2
    assert "objective=stored takes teacher_store=DIRECTORY" in capfd.readouterr().err
    assert mar.run(tmp_path / "absent", fields | {"teacher_store": tmp_path / "no"}) == 2
    assert "holds no teacher's store" in capfd.readouterr().err and not (tmp_path / "absent").exists()


OTHER = {"llama": "stage1", "stage1": "llama"}


def teacher_asked(run: Path) -> str:
    """spiking.teacher of a finished run."""
    return str(json.loads((run / "metrics.json").read_text())["config"]["spiking"]["teacher"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_make_the_run_of_one(mar: Any, finished: Path, tmp_path: Path) -> None:
    steps = {"distillation.steps": 12, "spiking.optimisation.steps": 12}
    arguments = mar.arguments(tmp_path / "run", {"teacher": finished / "teacher"} | steps)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [sys.executable, *launch, "--rdzv-endpoint", "localhost:0", str(mar.directory / "train.py"), *arguments]
    places = ["parallel.student=sharded", "parallel.teacher=sharded"]
    done = subprocess.run(
        [*command, *places], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wall seconds") == 1  # one of them reports
    assert mar.run(tmp_path / "one", {"teacher": finished / "teacher"} | steps) == 0
    for stage in ("orientation", "alignment", "stage1"):
        shared, alone = (read_metrics(tmp_path / name / "training" / stage / "log.jsonl") for name in ("run", "one"))
        assert [line["loss"] for line in shared] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "one")]
    for model, tolerance in (("teacher", 1e-6), ("stage1", 1e-3), ("student", 2e-2)):
        assert figures[0][model]["ce"] == pytest.approx(figures[1][model]["ce"], rel=tolerance)
    assert mar.run(tmp_path / "run", {"teacher": finished / "teacher"} | steps) == 0  # one process takes it up
