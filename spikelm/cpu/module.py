"""Builds and loads the CPU kernels: one shared library per specialisation, on first use, cached on disk."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spikelm.cpu.store import cache_directory as cache_directory
from spikelm.cpu.store import keep_kernel, kernel_path, private_directory, read_kernel, warn_of_damage
from spikelm.errors import SpikelmError

# What each source exports: functions that take a packed struct and return 0, or another number where memory is short.
FUNCTIONS = {
    "tiles.cpp": ("forward", "forward_sum", "backward", "backward_sum"),
    "attention.cpp": ("attend",),
    "packing.cpp": ("pack_channels", "pack_tokens"),
    "spike_linear.cpp": ("project",),
    "llamba.cpp": ("step_block",),
}
# What sources include, in an order in which no file needs a later one.
HEADERS = (
    *("parallel.hpp", "lanes.hpp", "bits.hpp", "../cuda/steps.cuh", "../cuda/entries.cuh", "../cuda/projection.cuh"),
    *("gather.hpp", "codes.hpp", "bank.hpp"),
)
STORAGE = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "half_t",
    torch.bfloat16: "bf16_t",
    torch.int8: "signed char",
}
# No -ffast-math: NaN and the order of additions are part of the definition, and so is the lack of FMA.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-fopenmp", "-w")

Functions = dict[str, Callable[[Any], int]]  # of bytes, or of a buffer that the function may change
_Key = tuple[str, torch.dtype, torch.dtype, str]
_LOADED: dict[_Key, Functions] = {}
_FAILED: dict[_Key, str] = {}


@cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on the PATH; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def unavailable() -> str | None:
    """Why no CPU kernel can be built, with what helps; None where one can."""
    if compiler() is not None:
        return None
    if os.environ.get("CXX"):
        return f"the C++ compiler of the environment variable CXX, {os.environ['CXX']}, was not found"
    return "no C++ compiler was found (c++, g++, clang++); install one, such as Debian's package g++"


def functions(definitions: str, io: torch.dtype, spike: torch.dtype, file: str = "tiles.cpp") -> Functions:
    """The FUNCTIONS of one specialisation of a source.

    Raises:
        SpikelmError: no compiler, or it failed; remembered, so that it is not tried again in this process.
    """
    key = (definitions, io, spike, file)
    found = _LOADED.get(key)
    if found is None:
        if key in _FAILED:
            raise SpikelmError(_FAILED[key])
        try:
            found = _LOADED[key] = _load(build(source(*key)), FUNCTIONS[file])
        except SpikelmError as error:
            _FAILED[key] = str(error)
            raise
    return found


def source(definitions: str, io: torch.dtype, spike: torch.dtype, file: str = "tiles.cpp") -> str:
    """The text of one specialisation, its own headers included."""
    folder = Path(__file__).parent
    text = (folder / file).read_text()
    for path in (folder / name for name in HEADERS):
        text = text.replace(f'#include "{path.name}"\n', path.read_text())
    return definitions + storage(io, spike) + text


@cache
def storage(io: torch.dtype, spike: torch.dtype) -> str:
    """The types that cuda/steps.cuh asks for."""
    types = {"IO_T": STORAGE[io], "SPIKE_T": STORAGE[spike], "STATE_T": "double" if io == torch.float64 else "float"}
    return "".join(f"#define {name} {value}\n" for name, value in types.items())


def build(text: str) -> Path:
    """Compiles a source into the cache, unless it is there whole, and returns the library's path.

    A file lock lets one of several processes build. $SPIKELM_MARCH names another target than "native".
    """
    program = compiler()
    if program is None:
        raise SpikelmError(f"backend 'cpu': {unavailable()}")
    command = [program, *FLAGS, f"-march={os.environ.get('SPIKELM_MARCH', 'native')}"]
    key = hashlib.sha256("\0".join([text, *command, _version(program), processor()]).encode()).hexdigest()[:32]
    library, lock = (kernel_path("cpu", key, suffix) for suffix in (".so", ".lock"))
    try:
        private_directory("cpu")
        if read_kernel(library) is not None:
            return library
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if read_kernel(library) is None:
                warn_of_damage(library)
                keep_kernel(library, _compile(command, text, library.parent))
    except OSError as error:
        raise SpikelmError(
            f"backend 'cpu': cannot write kernels to {library.parent} ({error}); set SPIKELM_CACHE to a writable "
            "directory"
        ) from error
    except SpikelmError as error:
        raise error if str(error).startswith("backend ") else SpikelmError(f"backend 'cpu': {error}") from error
    return library


def _compile(command: list[str], text: str, folder: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path, library = Path(temporary) / "kernel.cpp", Path(temporary) / "kernel.so"
        path.write_text(text)
        done = subprocess.run([*command, str(path), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            said = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000] or done.stderr[-2000:]
            raise SpikelmError(f"backend 'cpu': {command[0]} failed with {done.returncode}:\n{said}")
        return library.read_bytes()


def _load(library: Path, names: Sequence[str]) -> Functions:
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise SpikelmError(f"backend 'cpu': {library} cannot be loaded, delete it to build it anew: {error}") from error
    found: Functions = {}
    for name in names:
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        found[name] = function
    return found


@cache
def _version(program: str) -> str:
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise SpikelmError(f"backend 'cpu': the C++ compiler {program} cannot be run ({error})") from error


@cache
def processor() -> str:
    """What -march=native stands for: kernels in a shared home must not reach another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
