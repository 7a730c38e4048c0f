"""Runs the CUDA kernels on the CPU: a stand-in for spikelm.cuda.module.launch over tests/cuda/shim.hpp."""

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from spikelm.cuda.module import KERNELS, Launch

FORWARD, REVERSE, SHUFFLED = range(3)
SOURCES = Path(__file__).parents[2] / "spikelm" / "cuda"
FLAGS = ("-O0", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")


class Shim:
    """Builds specialisations of the kernels in ``sources`` into ``folder``, and runs them in the order ``schedule``.

    ``ran`` has the definitions of every launch, as dictionaries, and ``loaded`` the libraries by them.
    """

    def __init__(self, compiler: str, folder: Path, sources: Path = SOURCES) -> None:
        self.compiler, self.folder, self.sources = compiler, folder, sources
        self.schedule = FORWARD
        self.ran: list[dict[str, str]] = []
        self.loaded: dict[str, ctypes.CDLL] = {}

    @classmethod
    def mutated(cls, compiler: str, folder: Path, file: str, old: str, new: str) -> "Shim":
        """Over a copy of the sources in which ``old``, which is there once, reads ``new``."""
        for path in SOURCES.glob("*.cuh"):
            text = path.read_text()
            if path.name == file:
                assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
                text = text.replace(old, new)
            (folder / path.name).write_text(text)
        return cls(compiler, folder, folder)

    def launch(
        self,
        definitions: str,
        launches: Sequence[Launch],
        arguments: bytes,
        device: torch.device,
        source: str = "multistep.cuh",
    ) -> None:
        assert device.type == "cpu", device
        library = self.library(definitions, source)
        self.ran.append(dict(line.split(maxsplit=2)[1:] for line in definitions.splitlines()))
        for kernel, blocks, threads in launches:
            library.launch(arguments, KERNELS[source].index(kernel), blocks, threads, self.schedule)

    def library(self, definitions: str, source: str = "multistep.cuh") -> ctypes.CDLL:
        """One specialisation, built at the first call."""
        if definitions not in self.loaded:
            path = self.folder / f"{hashlib.sha256(definitions.encode()).hexdigest()[:16]}.so"
            text = f'{definitions}#define SOURCE {source}\n#include "shim.hpp"\n'
            includes = ("-I", str(self.sources), "-I", str(Path(__file__).parent))
            command = [self.compiler, *FLAGS, *includes, "-x", "c++", "-", "-o", str(path)]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)  # no AssertionError: a mutant that does not compile proves nothing
            library = ctypes.CDLL(str(path))
            if source == "multistep.cuh":
                library.element_of.restype = library.place_of.restype = ctypes.c_longlong
                library.threshold_of.restype = ctypes.c_double
                library.place_of.argtypes = library.threshold_of.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
            self.loaded[definitions] = library
        return self.loaded[definitions]
