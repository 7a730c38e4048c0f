"""Builds, keeps and launches the CUDA kernels: one cubin per specialisation, on first use, cached on disk.

CuPy gives NVRTC and the driver. Its own compiler is not used: it flushes subnormal numbers to zero.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spikelm.cpu.store import keep_kernel, kernel_path, private_directory, read_kernel, warn_of_damage
from spikelm.errors import SpikelmError, warn_once

# The kernels of each source; it includes what else it needs of HEADERS.
KERNELS = {
    "multistep.cuh": ("run", "prepare", "add_partials"),
    "attention.cuh": ("attend",),
    "spike_linear.cuh": ("find_active", "gather", "finish"),
}
HEADERS = ("scalars.cuh", "steps.cuh", "entries.cuh", "projection.cuh")
# No contraction to FMA: the order of roundings is part of the definition.
OPTIONS = ("-std=c++17", "--fmad=false")


class Launch(NamedTuple):
    """One of a source's KERNELS, how many blocks of it and how many threads each of them has."""

    kernel: str
    blocks: int
    threads: int


@cache
def unavailable() -> str | None:
    """Why no CUDA kernel can run, with what helps; None where one can. Found out once in a process."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of it (https://pytorch.org)"
    wanted = torch.version.cuda.split(".")[0]
    package = f"cupy-cuda{wanted}x"
    if not torch.cuda.is_available():
        return f"torch sees no CUDA device: there is none, or its driver is missing or older than CUDA {wanted}"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a library that it needs, numpy or Python itself may not suit it
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed: pip install {package}"
        return f"CuPy cannot be imported ({_first_line(error)}): pip install --force-reinstall {package}"
    runtime, nvrtc = cupy.cuda.runtime, cupy.cuda.nvrtc
    found = runtime.runtimeGetVersion() // 1000
    if str(found) != wanted:
        return (
            f"CuPy {cupy.__version__} is for CUDA {found} and torch {torch.__version__} for CUDA {wanted}: "
            f"pip uninstall cupy-cuda{found}x, then pip install {package}"
        )
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"CuPy cannot use the CUDA driver ({_first_line(error)}): update the driver"
    try:
        nvrtc.getVersion()
    except Exception as error:  # of CuPy's loader, by its version
        return f"CuPy finds no NVRTC library ({_first_line(error)}): pip install '{package}[ctk]'"
    return None


def launch(
    definitions: str,
    launches: Sequence[Launch],
    arguments: bytes,
    device: torch.device,
    source: str = "multistep.cuh",
) -> None:
    """Runs kernels of one specialisation, one after the other, on torch's current stream of ``device``.

    Nothing waits for them. The first launch of a specialisation loads it, so it must lie outside of a captured graph.

    Args:
        definitions: what the source asks for, as lines of ``#define``.
        arguments: its struct Call.

    Raises:
        SpikelmError: CUDA kernels cannot run here, or NVRTC failed.
    """
    with torch.cuda.device(device):
        functions = _LOADED.get((definitions, device.index, source)) or _load(definitions, device.index, source)
        stream = torch.cuda.current_stream(device).cuda_stream
        packed = ctypes.create_string_buffer(arguments, len(arguments))
        pointer = ctypes.c_void_p(ctypes.addressof(packed))  # parameters are handed over as pointers to their values
        for kernel, blocks, threads in launches:
            functions.driver.launchKernel(
                functions.pointers[kernel], blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointer), 0
            )


class _Functions(NamedTuple):
    driver: Any
    module: Any  # the functions live as long as it does
    pointers: dict[str, int]


_LOADED: dict[tuple[str, int, str], _Functions] = {}


def _load(definitions: str, device: int, source: str) -> _Functions:
    reason = unavailable()
    if reason is not None:
        raise SpikelmError(f"backend 'cupy': {reason}")
    cuda = importlib.import_module("cupy").cuda
    major, minor = torch.cuda.get_device_capability(device)
    module = cuda.function.Module()
    module.load(build(definitions, f"sm_{major}{minor}", source))
    pointers = {kernel: module.get_function(kernel).ptr for kernel in KERNELS[source]}
    functions = _LOADED[definitions, device, source] = _Functions(cuda.driver, module, pointers)
    return functions


def build(definitions: str, architecture: str, source: str = "multistep.cuh") -> bytes:
    """The cubin of one specialisation for ``architecture``, such as "sm_90", from the cache or from NVRTC.

    Raises:
        SpikelmError: NVRTC failed, with its log.
    """
    nvrtc = importlib.import_module("cupy").cuda.nvrtc
    parts = [definitions, *_texts(source).values(), *OPTIONS, architecture, str(nvrtc.getVersion())]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = kernel_path("cuda", key, ".cubin")
    reason: str | None = None
    try:
        private_directory("cuda")
        kept = read_kernel(path)
        if kept is not None:
            return kept
        warn_of_damage(path)
    except (OSError, SpikelmError) as error:
        reason = _unwritable(path, error)
    cubin, _ = compile_cubin(definitions, architecture, source=source)
    if reason is None:
        try:
            keep_kernel(path, cubin)
        except OSError as error:
            reason = _unwritable(path, error)
    if reason is not None:
        warn_once(f"CUDA kernels are compiled anew in every process: {reason}")
    return cubin


def _unwritable(path: Path, error: Exception) -> str:
    if isinstance(error, SpikelmError):
        return str(error)
    return f"they cannot be written to {path.parent} ({error}); set SPIKELM_CACHE to a writable directory"


def compile_cubin(
    definitions: str, architecture: str, options: Sequence[str] = (), source: str = "multistep.cuh"
) -> tuple[bytes, str]:
    """What NVRTC makes of one specialisation, and its log."""
    nvrtc = importlib.import_module("cupy").cuda.nvrtc
    names, texts = zip(*((name.encode(), text.encode()) for name, text in _texts(source).items()), strict=True)
    program = nvrtc.createProgram(f'{definitions}#include "{source}"\n', "kernel.cu", texts, names)
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"-arch={architecture}", *options))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise SpikelmError(f"backend 'cupy': NVRTC failed for {architecture} ({error}):\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def _texts(source: str) -> dict[str, str]:
    folder = Path(__file__).parent
    return {name: (folder / name).read_text() for name in (source, *HEADERS)}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
