"""examples/mar/train.py stopped in the middle, on a full disk, and given what it cannot use."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ERROR = "error: "


def same_student(weights: Callable[[Path], dict[str, torch.Tensor]], one: Path, other: Path) -> None:
    """Both runs end in the same spiking model."""
    expected, found = weights(one / "student"), weights(other / "student")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def curve(output_dir: Path, stage: str) -> list[tuple[int, float]]:
    lines = (output_dir / "training" / stage / "log.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def error_line(capture: pytest.CaptureFixture[str]) -> str:
    """The one line that says what is wrong; the last on stderr, no traceback above it."""
    lines = capture.readouterr().err.rstrip("\n").split("\n")
    assert lines[-1].startswith(ERROR), lines[-5:]
    assert sum(line.startswith(ERROR) for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_after_kill_in_both_stages_the_same_command_gives_the_same_run(
    mar: Any, finished: Path, same_teacher: dict[str, Any], tmp_path: Path, weights: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    for stage in ("stage1", "student"):
        status, _ = mar.stop(run, same_teacher, stage, signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert not (run / stage).exists(), "killed in the middle of the stage"
        assert any((run / "training" / stage).glob("checkpoint-*/manifest.json"))
    assert curve(run, "stage1") == [
        (step, pytest.approx(loss, rel=1e-4)) for step, loss in curve(finished, "stage1")
    ]  # the stage that the second process resumed
    assert mar.run(run, same_teacher) == 0
    for stage in ("stage1", "student"):
        expected, found = curve(finished, stage), curve(run, stage)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    same_student(weights, finished, run)


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_completes(
    mar: Any, finished: Path, same_teacher: dict[str, Any], tmp_path: Path, weights: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    status, errors = mar.stop(run, same_teacher, "stage1", signal.SIGINT)
    assert status == 130
    assert errors.rstrip().splitlines()[-1] == "interrupted: run the same command again to resume"
    assert "Traceback" not in errors
    assert not (run / "stage1").exists()
    saved = (run / "training" / "stage1").glob("checkpoint-*/manifest.json")
    stopped_at = max(json.loads(manifest.read_text())["step"] for manifest in saved)
    assert stopped_at == curve(run, "stage1")[-1][0] and 12 < stopped_at < 60
    assert mar.run(run, same_teacher) == 0
    assert curve(run, "stage1")[-1][0] == 60
    same_student(weights, finished, run)


@pytest.mark.parametrize("place", ["checkpoints.partial/checkpoint-24/", "run/stage1.partial/"])
def test_a_disk_that_fills_up_is_one_line_and_the_run_resumes(
    place: str,
    mar: Any,
    finished: Path,
    same_teacher: dict[str, Any],
    tmp_path: Path,
    weights: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, flush = tmp_path / "run", os.fsync

    def full(descriptor: int) -> None:
        # File systems that allocate late say only here that there is no room.
        if place in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert mar.run(run, same_teacher) == 1
    assert "no space left on the disk" in error_line(capfd)
    assert not (run / "stage1").exists() and not (run / "stage1.partial").exists()
    assert mar.run(run, same_teacher) == 0
    same_student(weights, finished, run)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_it_is_written(
    mar: Any,
    same_teacher: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    assert mar.run(tmp_path / "run", same_teacher) != 0
    assert "MB needed" in error_line(capfd)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"spiking.alhpa": 1}, "'spiking.alpha'"),
    "wrong type": ({"seed": "many"}, "seed=many"),
    "tau": ({"spiking.neuron.tau": 0}, "tau"),
    "T": ({"spiking.neuron.T": 0}, "T must"),
    "alpha": ({"spiking.alpha": -1}, "alpha"),
    "surrogate": ({"spiking.neuron.surrogate_function": "Nothing"}, "surrogate"),
    "no distillation": ({"distillation.steps": 0}, "distillation.steps"),
    "no teacher": ({"teacher": "/nowhere/teacher"}, "/nowhere/teacher"),
    "no text": ({"data": "/nowhere/text.txt"}, "/nowhere/text.txt"),
    "no text, teacher to be trained": ({"data": "/nowhere/text.txt", "teacher": "embedded"}, "/nowhere/text.txt"),
    "context": ({"context_length": 33}, "context_length 33 is beyond the teacher's 32"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_is_one_line_and_leaves_nothing(
    case: str, mar: Any, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields, named = FIELDS[case]
    assert mar.run(tmp_path / "run", same_teacher | fields) == 2
    assert named in error_line(capfd)
    refuse_nothing_afterwards(tmp_path / "run")


def refuse_nothing_afterwards(run: Path) -> None:
    """What failed before it made anything is no run: the corrected command may use the same output_dir."""
    assert not run.exists() or [path.name for path in run.iterdir()] == ["run.lock"]


def test_an_unknown_preset_names_those_there_are(
    mar: Any, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mar.run(tmp_path / "run", same_teacher, preset="huge") == 2
    assert "demo, llamba_1b, llamba_1b_8gpu, smoke, tiny" in error_line(capfd)
    assert not (tmp_path / "run").exists()


TEXTS = {
    "empty": (b"", "is empty"),
    "binary": (b"words\x00\x01\x02 and words" * 500, "binary"),
    "not UTF-8": (b"words \xff\xfe and words" * 500, "UTF-8"),
    "short": (b"Too short.", "too short"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_cannot_be_used_is_one_line_that_names_it(
    case: str, mar: Any, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, named = TEXTS[case]
    text = tmp_path / "given.txt"
    text.write_bytes(content)
    assert mar.run(tmp_path / "run", same_teacher | {"data": text}) == 2
    line = error_line(capfd)
    assert named in line and str(text) in line
    refuse_nothing_afterwards(tmp_path / "run")


def test_a_teacher_that_is_no_causal_model_is_named(
    mar: Any, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(finished / "teacher").save_pretrained(tmp_path / "bert")
    assert mar.run(tmp_path / "run", {"teacher": tmp_path / "bert"}) == 2
    line = error_line(capfd)
    assert "BertModel" in line and "causal LM" in line
    refuse_nothing_afterwards(tmp_path / "run")


def test_a_tokenizer_that_does_not_fit_the_teacher_names_both_sizes(
    mar: Any, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "teacher")
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(finished / "teacher").save_pretrained(tmp_path / "small")
    assert mar.run(tmp_path / "run", {"teacher": tmp_path / "small"}) == 2
    line = error_line(capfd)
    assert "300" in line and "200" in line
    refuse_nothing_afterwards(tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("nowhere", "cannot be loaded"),
        ("teacher", "backbone.embedding.weight among them"),
        ("student", "is spiking"),
        ("torn", "its .safetensors files hold 8,000 bits"),
    ],
)
def test_a_stage1_that_is_no_dense_llamba_is_one_line(
    place: str,
    named: str,
    mar: Any,
    finished: Path,
    same_teacher: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = finished / place
    if place == "torn":
        given = shutil.copytree(finished / "stage1", tmp_path / "torn")
        os.truncate(given / "model.safetensors", 1000)
    assert mar.run(tmp_path / "run", same_teacher | {"stage1": given}) == 2
    line = error_line(capfd)
    assert named in line and str(given) in line
    refuse_nothing_afterwards(tmp_path / "run")


def test_the_directory_of_another_run_is_refused_and_left_as_it_is(
    mar: Any, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert mar.run(finished, {"seed": 1}) == 2
    assert "already holds another run (seed=0 there, seed=1 asked)" in error_line(capfd)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(
    mar: Any, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert mar.run(tmp_path / "run", same_teacher) == 2
    assert "notes.txt" in error_line(capfd)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_damaged_stage_is_named(mar: Any, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    weights = run / "stage1" / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    assert mar.run(run, {}) == 2
    line = error_line(capfd)
    assert "stage 'stage1' is damaged: model.safetensors" in line and str(size // 2) in line
    shutil.rmtree(run / "student")
    shutil.rmtree(run / "stage1")
    assert mar.run(run, {}) == 0, "deleting the damaged stage, as the message says, lets the run go on"


@pytest.mark.parametrize("stage", ["stage1", "teacher"])
def test_a_damaged_stage_is_named_by_the_ablation_too(
    stage: str, mar: Any, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    os.truncate(run / stage / "model.safetensors", 1000)
    assert mar.call("ablate.py", [f"run={run}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "model.safetensors" in error_line(capfd)
    refuse_nothing_afterwards(tmp_path / "out")
