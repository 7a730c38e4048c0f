"""Fixtures for the tests of the CUDA kernels."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spikelm.cpu.module import compiler
from spikelm.cuda import module
from tests.cuda.shim import Shim


@pytest.fixture(scope="session")
def compiler_path() -> str:
    """The host's C++ compiler; skips the test where there is none."""
    found = compiler()
    if found is None:
        pytest.skip("needs a C++ compiler (c++, g++ or clang++), and there is none on the PATH")
    return found


@pytest.fixture(scope="session")
def built_shim(compiler_path: str, tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """The kernels as they are, thread by thread on the CPU; built once in a session."""
    return Shim(compiler_path, tmp_path_factory.mktemp("shim"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shim(built_shim: Shim, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """spikelm.cuda.launch runs on CPU tensors through this; ``ran`` starts empty."""
    built_shim.ran.clear()
    monkeypatch.setattr(built_shim, "schedule", built_shim.schedule)  # put back afterwards
    monkeypatch.setattr(module, "launch", built_shim.launch)
    return built_shim


@pytest.fixture
def mutated(
    compiler_path: str, tmp_path: Path, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], Shim]:
    """mutated(file, old, new) is a shim over a copy of the sources in which ``old``, found once, reads ``new``."""

    def mutate(file: str, old: str, new: str) -> Shim:
        mutant = Shim.mutated(compiler_path, tmp_path, file, old, new)
        monkeypatch.setattr(module, "launch", mutant.launch)
        return mutant

    return mutate
