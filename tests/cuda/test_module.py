"""Why CUDA kernels cannot run, where cubins are kept, and what the driver is told: with a CuPy made up for it."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikelm import errors
from spikelm.cuda import launch, module
from spikelm.cuda.module import Launch
from spikelm.errors import SpikelmError, SpikelmWarning
from tests.kernel_cases import Case, dynamics, kernel_for


class Refusal(Exception):
    """What the made-up CuPy raises."""


class FakeNvrtc:
    """Counts programs; ``fails`` makes it refuse them."""

    NVRTCError = Refusal

    def __init__(self) -> None:
        self.compiled: list[tuple[str, ...]] = []
        self.alive = 0
        self.fails = False
        self.version = (13, 0)

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def createProgram(self, source: str, name: str, headers: tuple[bytes, ...], names: tuple[bytes, ...]) -> int:
        (included,) = re.findall(r'#include "(.*)"', source)
        assert set(names) == {included.encode(), *(header.encode() for header in module.HEADERS)}
        self.alive += 1
        return 1

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        if self.fails:
            raise Refusal("NVRTC_ERROR_COMPILATION (6)")
        self.compiled.append(options)

    def getCUBIN(self, program: int) -> bytes:
        return b"cubin %d" % len(self.compiled)

    def getProgramLog(self, program: int) -> str:
        return "kernel.cu(1): error: no such thing"

    def destroyProgram(self, program: int) -> None:
        self.alive -= 1


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A CuPy that does nothing, for CUDA 13, with a torch that says it has CUDA 13 and a device."""
    launched: list[tuple[Any, ...]] = []

    class Module:
        def load(self, cubin: bytes) -> None:
            self.cubin = cubin

        def get_function(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(ptr=(self.cubin, name))

    def launch_kernel(function: Any, *rest: int) -> None:
        *shape, stream, parameters, extra = rest
        address = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        assert address is not None
        launched.append((function, tuple(shape), stream, ctypes.string_at(address, 8), extra))

    runtime = SimpleNamespace(
        runtimeGetVersion=lambda: 13020, getDeviceCount=lambda: 1, CUDARuntimeError=Refusal
    )  # fmt: skip
    cuda = SimpleNamespace(
        runtime=runtime,
        nvrtc=FakeNvrtc(),
        driver=SimpleNamespace(launchKernel=launch_kernel),
        function=SimpleNamespace(Module=Module),
    )
    fake = SimpleNamespace(__version__="14.2.0", cuda=cuda, launched=launched)
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_LOADED", {})
    module.unavailable.cache_clear()
    yield fake
    module.unavailable.cache_clear()


def raising(error: Exception) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def test_available(cupy: SimpleNamespace) -> None:
    assert module.unavailable() is None


def test_torch_without_cuda(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert module.unavailable() == (
        f"torch {torch.__version__} is built without CUDA; install a CUDA build of it (https://pytorch.org)"
    )


def test_no_device(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.unavailable() == (
        "torch sees no CUDA device: there is none, or its driver is missing or older than CUDA 13"
    )


@pytest.mark.parametrize("version", ["12.8", "13.0"])
def test_no_cupy(version: str, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "cuda", version)
    assert module.unavailable() == f"CuPy is not installed: pip install cupy-cuda{version[:2]}x"


def test_a_broken_cupy(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module.unavailable() == (
        "CuPy cannot be imported (No module named 'a_module_that_is_not_there'): "
        "pip install --force-reinstall cupy-cuda13x"
    )


def test_cupy_for_another_cuda(cupy: SimpleNamespace) -> None:
    cupy.cuda.runtime.runtimeGetVersion = lambda: 12090
    assert module.unavailable() == (
        f"CuPy 14.2.0 is for CUDA 12 and torch {torch.__version__} for CUDA 13: "
        "pip uninstall cupy-cuda12x, then pip install cupy-cuda13x"
    )


def test_no_driver(cupy: SimpleNamespace) -> None:
    cupy.cuda.runtime.getDeviceCount = raising(Refusal("cudaErrorInsufficientDriver: too old\nmore"))
    assert module.unavailable() == (
        "CuPy cannot use the CUDA driver (cudaErrorInsufficientDriver: too old): update the driver"
    )


def test_no_nvrtc(cupy: SimpleNamespace) -> None:
    cupy.cuda.nvrtc.getVersion = raising(RuntimeError('Failure finding "libnvrtc.so.13"\nmore'))
    assert module.unavailable() == (
        "CuPy finds no NVRTC library (Failure finding \"libnvrtc.so.13\"): pip install 'cupy-cuda13x[ctk]'"
    )


def test_a_launch_says_why_there_is_none(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpikelmError, match="backend 'cupy': torch sees no CUDA device"):
        module.launch("", [], b"", torch.device("cuda", 0))


def test_a_cubin_is_built_once(cupy: SimpleNamespace, tmp_path: Path) -> None:
    nvrtc = cupy.cuda.nvrtc
    assert module.build("#define A\n", "sm_90") == b"cubin 1"
    assert module.build("#define A\n", "sm_90") == b"cubin 1"
    assert nvrtc.compiled == [("-std=c++17", "--fmad=false", "-arch=sm_90")]
    path, digest = sorted((tmp_path / "cuda").iterdir())  # and nothing else
    assert path.read_bytes() == b"cubin 1"
    assert digest.name == f"{path.name}.sha256"
    assert module.build("#define B\n", "sm_90") == b"cubin 2"
    assert module.build("#define A\n", "sm_80") == b"cubin 3"
    nvrtc.version = (13, 1)
    assert module.build("#define A\n", "sm_90") == b"cubin 4"
    assert nvrtc.alive == 0


def test_another_source_is_another_cubin(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    module.build("", "sm_90")
    texts = module._texts("multistep.cuh")
    monkeypatch.setattr(module, "_texts", lambda source: texts | {"steps.cuh": texts["steps.cuh"] + "\n"})
    assert module.build("", "sm_90") == b"cubin 2"


def test_nvrtc_fails(cupy: SimpleNamespace) -> None:
    cupy.cuda.nvrtc.fails = True
    with pytest.raises(SpikelmError, match=r"for sm_90 \(NVRTC_ERROR_COMPILATION \(6\)\):\nkernel.cu\(1\): error"):
        module.build("", "sm_90")
    assert cupy.cuda.nvrtc.alive == 0


def test_a_cache_that_cannot_be_written(cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(errors, "_SAID", set())
    with pytest.warns(SpikelmWarning, match="cannot be written to .*; set SPIKELM_CACHE to a writable directory"):
        assert module.build("", "sm_90") == b"cubin 1"
    assert module.build("", "sm_90") == b"cubin 2"  # without a second warning


def test_what_the_driver_is_told(cupy: SimpleNamespace) -> None:
    launches = [Launch("run", 5, 128), Launch("add_partials", 3, 32)]
    for device in (0, 0, 1):
        module.launch("#define A\n", launches, b"argument", torch.device("cuda", device))
    expected = [
        ((b"cubin 1", "run"), (5, 1, 1, 128, 1, 1, 0), 77, b"argument", 0),
        ((b"cubin 1", "add_partials"), (3, 1, 1, 32, 1, 1, 0), 77, b"argument", 0),
    ]
    assert cupy.launched == 3 * expected
    assert set(module._LOADED) == {("#define A\n", 0, "multistep.cuh"), ("#define A\n", 1, "multistep.cuh")}
    module.launch("#define A\n", [Launch("attend", 2, 128)], b"argument", torch.device("cuda", 0), "attention.cuh")
    assert cupy.launched[-1][:2] == ((b"cubin 2", "attend"), (2, 1, 1, 128, 1, 1, 0))


@pytest.mark.parametrize(
    ("T", "threshold", "frame", "expected"),
    [
        (4, (), (300, 4), [("run", 3, 128), ("add_partials", 1, 1024)]),  # 1200 neurons by fours
        (33, (), (300, 4), [("run", 10, 128), ("add_partials", 1, 1024)]),
        (4, (8,), (1 << 19, 8), [("run", 1024, 128), ("add_partials", 8, 1024)]),  # many neurons a thread
        (4, (1 << 20, 1), (1 << 20, 4), [("run", 8192, 128), ("add_partials", 1 << 20, 32)]),
    ],
)
def test_what_is_launched(
    T: int,
    threshold: tuple[int, ...],
    frame: tuple[int, ...],
    expected: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[Launch] = []
    monkeypatch.setattr(module, "launch", lambda definitions, launches, arguments, device: launched.extend(launches))
    case = Case(dynamics("ternary"), T=T, frame=frame, threshold=threshold)
    x = torch.empty(T, *frame)
    launch.backward(kernel_for(case), x, None, torch.ones(threshold), T, None, None, 0.0, False, False, True)
    assert launched == expected
