"""The CUDA kernels under AddressSanitizer, and that it finds what is out of bounds."""

import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cuda import launch, module
from spikelm.cuda.module import KERNELS, Launch
from spikelm.ops import layout
from tests.cuda.checks import draw_sum, run
from tests.cuda.shim import SOURCES, Shim
from tests.kernel_cases import Case, dynamics, kernel_for

HERE = Path(__file__).parent
DENSE = Case(dynamics("ternary", "soft_delayed", "TRIANGLE"), frame=(6, 40), threshold=(40,), with_v=True)
LONG = replace(DENSE, T=33, frame=(3, 21), threshold=())
APART = replace(DENSE, dtype=torch.bfloat16, frame=(4, 3, 7), threshold=(3, 1), layout="swapped", grad_layout="sliced")


class Recorder:
    """In place of the launch: keeps every call with the bytes of its tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.tensors: Sequence[torch.Tensor | None] = ()
        monkeypatch.setattr(launch, "pack", self.pack)
        monkeypatch.setattr(module, "launch", self.launch)

    def pack(self, kernel: Any, tensors: Sequence[torch.Tensor | None], *rest: Any, **options: Any) -> bytes:
        self.tensors = tensors
        return layout.pack(kernel, tensors, *rest, **options)

    def launch(self, definitions: str, launches: Sequence[Launch], arguments: bytes, device: torch.device) -> None:
        parts = [arguments]
        for tensor in self.tensors:
            if tensor is None:
                parts.append(struct.pack("q", -1))
                continue
            span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            content = bytes(tensor.as_strided((span,), (1,)).view(torch.uint8).numpy())
            parts += [struct.pack("q", len(content)), content]
        places = [KERNELS["multistep.cuh"].index(kernel) for kernel, *_ in launches]
        parts += [struct.pack("3q", place, *shape) for place, (_, *shape) in zip(places, launches, strict=True)]
        self.calls.append((definitions, b"".join(parts)))


def replay(compiler: str, sources: Path, folder: Path, call: tuple[str, bytes]) -> subprocess.CompletedProcess[str]:
    definitions, record = call
    (folder / "kernel.cpp").write_text(
        f'{definitions}#define SOURCE multistep.cuh\n#include "shim.hpp"\n#include "replay.hpp"\n'
    )
    (folder / "record").write_bytes(record)
    program = folder / "kernel"
    command = [compiler, "-O1", "-std=c++17", "-w", "-fsanitize=address", "-I", str(sources), "-I", str(HERE)]
    subprocess.run([*command, str(folder / "kernel.cpp"), "-o", str(program)], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, folder / "record"], env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def sanitizer(compiler_path: str) -> None:
    """Skips the tests where the compiler has no AddressSanitizer."""
    command = [compiler_path, "-fsanitize=address", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode:
        pytest.skip(f"needs AddressSanitizer, which {compiler_path} has not")


@pytest.mark.parametrize("case", [LONG, APART], ids=["T33", "swapped"])
def test_nothing_is_out_of_bounds(
    case: Case, compiler_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run(case)
    for call in recorder.calls:
        done = replay(compiler_path, SOURCES, tmp_path, call)
        assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_nothing_is_out_of_bounds_in_a_sum(compiler_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, case = Recorder(monkeypatch), replace(LONG, dynamics=dynamics("ternary", "hard", first=True))
    inputs = draw_sum(case)
    launch.backward_sum(kernel_for(case), inputs.x, inputs.threshold, 33, inputs.grad_spikes[0], 0.5, True)
    done = replay(compiler_path, SOURCES, tmp_path, recorder.calls[0])
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("if (a.v_last) store(a.v_last + i, v)", "if (a.v_last) store(a.v_last + i + VECTOR, v)", "WRITE"),
        ("first + k < T", "k < T", "READ"),
    ],
)
def test_what_is_out_of_bounds_is_found(
    old: str, new: str, found: str, compiler_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run(LONG)
    mutant = Shim.mutated(compiler_path, tmp_path, "multistep.cuh", old, new)
    done = replay(compiler_path, mutant.sources, tmp_path, recorder.calls[0])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert f"{found} of size" in done.stderr
