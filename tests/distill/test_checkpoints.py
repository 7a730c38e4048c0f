"""Checkpoints: damaged, unfinished, old ones; a disk that is full."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from spikelm.distill.checkpoints import (
    checkpoints,
    damage,
    finish_checkpoint,
    keep_latest,
    latest_checkpoint,
    unfinished,
)
from spikelm.distill.objectives import SBDS
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from tests.distill.small_training import OPTIONS, StopAt, curve, rows, student_of


def make_checkpoint(output_dir: Path, step: int) -> Path:
    directory = unfinished(output_dir) / f"checkpoint-{step}"
    (directory / "part").mkdir(parents=True)
    (directory / "weights").write_bytes(b"12345")
    (directory / "part" / "more").write_bytes(b"1")
    return finish_checkpoint(output_dir, step)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: (path / "weights").write_bytes(b"123"), "weights has 3 bytes, 5 were written"),
    "a bit flipped": (lambda path: (path / "weights").write_bytes(b"12344"), "weights is not what was written"),
    "lost": (lambda path: (path / "part" / "more").unlink(), "part/more is missing"),
    "torn manifest": (lambda path: (path / "manifest.json").write_text('{"step": 15'), "manifest.json is not readable"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_put_aside(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    do, named = DAMAGES[case]
    good, bad = make_checkpoint(tmp_path, 90), make_checkpoint(tmp_path, 100)
    do(bad)
    assert latest_checkpoint(tmp_path) == good
    assert f"{bad} is damaged: {named}" in caplog.text and f"the training goes on from {good}" in caplog.text
    assert (tmp_path / "checkpoint-100.damaged").is_dir() and checkpoints(tmp_path) == [good]
    caplog.clear()
    assert latest_checkpoint(tmp_path) == good and not caplog.text
    do(good)
    assert latest_checkpoint(tmp_path) is None
    assert "its beginning: no whole checkpoint is left" in caplog.text


def test_what_is_no_checkpoint_or_unfinished_is_not_used(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 90)
    renamed = make_checkpoint(tmp_path, 130).rename(tmp_path / "checkpoint-140")
    (unfinished(tmp_path) / "checkpoint-150").mkdir(parents=True)
    (tmp_path / "checkpoint-final").mkdir()
    assert damage(renamed) == "it is of step 130"
    assert latest_checkpoint(tmp_path) == good
    assert not unfinished(tmp_path).exists() and (tmp_path / "checkpoint-final").is_dir()
    manifest = json.loads((good / "manifest.json").read_text())
    assert manifest["step"] == 90 and manifest["files"]["weights"] == {
        "bytes": 5,
        "sha256": hashlib.sha256(b"12345").hexdigest(),
    }
    assert latest_checkpoint(tmp_path / "absent") is None


def test_keep_latest_counts_by_step(tmp_path: Path) -> None:
    for step in (1000, 9, 90):
        make_checkpoint(tmp_path, step)
    keep_latest(tmp_path, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-1000", "checkpoint-90"]
    assert all(damage(path) is None for path in checkpoints(tmp_path))


def test_a_training_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Tensor]]
) -> None:
    with pytest.raises(RuntimeError):
        stop = StopAt(7, RuntimeError("broken"))
        train(student_of(tiny_llama), tiny_llama, rows(), SBDS(), output_dir=tmp_path, callbacks=[stop], **OPTIONS)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    optimizer = tmp_path / "checkpoint-6" / "optimizer.pt"
    os.truncate(optimizer, optimizer.stat().st_size // 2)
    student = student_of(tiny_llama)
    train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, **OPTIONS)
    whole, expected = uninterrupted
    assert curve(tmp_path) == curve(whole)
    assert all(torch.equal(value, expected[name]) for name, value in student.named_parameters())


def test_a_save_that_fails_leaves_the_last_whole_checkpoint(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, saved = student_of(tiny_llama), LlamaForCausalLM.save_pretrained

    def save(self: LlamaForCausalLM, directory: str, **options: Any) -> None:
        saved(self, directory, **options)
        if directory.endswith("-6"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    with pytest.raises(OSError, match="No space left"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, **OPTIONS)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SpikelmError, match="not enough disk space"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, **OPTIONS)
