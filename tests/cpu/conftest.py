"""What the tests of the CPU kernels share."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cpu import module
from spikelm.ops import launch

_GUARD = 64  # elements on either side of every output


@pytest.fixture(autouse=True)
def _compiler() -> None:
    """Where no kernel can be built, nothing here can run."""
    if reason := module.unavailable():
        pytest.skip(reason)


class _Poisoned:
    """torch, but what is empty is full of NaN (-77 for integers), between guards of 99."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: object = None) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        buffer = torch.full((count + 2 * _GUARD,), 99, dtype=dtype)
        buffer[_GUARD : _GUARD + count] = math.nan if dtype.is_floating_point else -77
        self.buffers.append((buffer, count))
        return buffer[_GUARD : _GUARD + count].view(shape)

    def empty_like(self, x: torch.Tensor, *, dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
        assert memory_format == torch.contiguous_format
        return self.empty(x.shape, dtype=dtype)

    def check(self) -> None:
        """Raises AssertionError where a kernel wrote outside its output."""
        for buffer, count in self.buffers:
            guards = torch.cat((buffer[:_GUARD], buffer[_GUARD + count :]))
            assert bool((guards == 99).all()), f"written outside an output of {count} elements"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' outputs hold NaN or -77 before, and what is beside them must stay as it is."""
    stand_in = _Poisoned()
    monkeypatch.setattr(launch, "torch", stand_in)
    yield
    assert stand_in.buffers
    stand_in.check()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is loaded yet, in this process."""
    monkeypatch.setattr(module, "_LOADED", {})
    monkeypatch.setattr(module, "_FAILED", {})


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Builds kernels for another target, such as "x86-64-v3"; skips where this processor does not run it."""

    def build_for(target: str) -> None:
        needed = {
            "x86-64-v4": {"avx512bw", "avx512vl"},
            "x86-64-v3": {"avx2", "f16c", "fma", "bmi2"},
            "x86-64": {"sse2"},
            "native": set(),
        }
        try:
            features = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            features = set()
        if not needed[target] <= features:
            pytest.skip(f"this processor does not run {target}")
        monkeypatch.setenv("SPIKELM_MARCH", target)

    return build_for
