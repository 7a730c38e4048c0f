"""python -m spikelm doctor."""

import re
import subprocess
import sys

import pytest
import torch

from spikelm import doctor
from spikelm.__main__ import main
from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError
from spikelm.ops import multistep


def test_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch         {torch.__version__.split('+')[0]}" in said
    assert re.search(r"^  lm-eval       (\d+\.|not installed$)", said, flags=re.MULTILINE)
    assert "torch         runs: the reference" in said
    if cpu_module.unavailable() is None:
        assert f"cpu           runs: {cpu_module.compiler()}, kernels in {cpu_module.cache_directory()}" in said
        assert 'backend="auto" is cpu for CPU tensors' in said
    if not torch.cuda.is_available():
        assert f"cupy          does not run: {multistep.unavailable('cupy')}" in said
        assert "torch for CUDA tensors" in said


def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "compiler", lambda: None)
    text, right = doctor.report()
    assert right
    assert "cpu           does not run: no C++ compiler was found (c++, g++, clang++); install one" in text
    assert 'backend="auto" is torch for CPU tensors' in text


def test_a_failing_build_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise SpikelmError("backend 'cpu': g++ failed with 1")

    monkeypatch.setattr(doctor, "multi_step", fail)
    if cpu_module.unavailable() is None:
        assert "cpu           does not run: backend 'cpu': g++ failed with 1" in doctor.report()[0]


@pytest.mark.skipif(cpu_module.unavailable() is not None, reason=str(cpu_module.unavailable()))
def test_a_kernel_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_one(*arguments: object, backend: str, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
        spikes, v = multistep.multi_step(*arguments, backend=backend, **named)
        return (spikes + 1 if backend == "cpu" else spikes), v

    monkeypatch.setattr(doctor, "multi_step", off_by_one)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "cpu           WRONG: its spikes differ from the reference's" in said
    assert 'backend="auto" is cpu for CPU tensors' in said


def test_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "spikelm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "doctor" in done.stderr
