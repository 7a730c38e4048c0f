"""Building the CPU kernels: what is cached, what is reported, and who builds when two want to."""

import functools
import multiprocessing
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cpu import launch, module, store
from spikelm.errors import SpikelmError
from tests.kernel_cases import Case, dynamics, kernel_for

pytestmark = pytest.mark.usefixtures("fresh")
F32 = torch.float32
DEFINITIONS = kernel_for(Case(dynamics("binary"))).definitions
NAMES = module.FUNCTIONS["tiles.cpp"]
# A source that compiles at once; the answer is the first function's.
QUICK = "".join(f'extern "C" int {name}(const void*) {{ return ANSWER; }}\n' for name in NAMES)


def quick(answer: int = 0) -> str:
    return f"#define ANSWER {answer}\n{QUICK}"


def call(text: str) -> int:
    """The answer of a source's library."""
    return module._load(module.build(text), NAMES)["forward"](b"")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPIKELM_MARCH", raising=False)
    return tmp_path / "cache" / "cpu"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's commands from now on."""
    commands: list[list[str]] = []
    run = subprocess.run

    def recorded(command: list[str], **options: Any) -> Any:
        if "--version" not in command:
            commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(module.subprocess, "run", recorded)
    return commands


@pytest.fixture
def use_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets CXX (None: unset), forgetting what was found before and again afterwards."""
    before = module.compiler, module._version

    def use(program: str | None) -> None:
        if program is None:
            monkeypatch.delenv("CXX", raising=False)
        else:
            monkeypatch.setenv("CXX", program)
        for name, function in zip(("compiler", "_version"), before, strict=True):
            monkeypatch.setattr(module, name, functools.cache(function.__wrapped__))

    return use


def script(path: Path, text: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# ---- the cache


def test_a_kernel_is_compiled_once(cache: Path, compiled: list[list[str]]) -> None:
    first = module.build(quick())
    assert len(compiled) == 1
    assert first.parent == cache
    assert module.build(quick()) == first
    assert len(compiled) == 1
    assert call(quick()) == 0
    assert {path.suffix for path in cache.iterdir()} <= {".so", ".sha256", ".lock"}


def test_a_loaded_kernel_is_not_looked_for_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Any] = []
    monkeypatch.setattr(module, "source", lambda *key: texts.append(key) or quick())
    found = module.functions(DEFINITIONS, F32, F32)
    assert set(found) == set(NAMES)
    shutil.rmtree(cache)
    assert module.functions(DEFINITIONS, F32, F32) is found
    assert module.functions(DEFINITIONS, F32, torch.int8) is not found
    assert texts == [(DEFINITIONS, F32, F32, "tiles.cpp"), (DEFINITIONS, F32, torch.int8, "tiles.cpp")]


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert module.cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("SPIKELM_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert module.cache_directory() == tmp_path / "home" / ".cache" / "spikelm"


def test_what_makes_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_compiler: Callable[[str | None], None]
) -> None:
    """Source, flags, target, compiler, its version and the processor; one by one."""
    real = module.compiler()

    def fake(name: str, version: str) -> str:
        return script(tmp_path / name, f'[ "$1" = --version ] && echo {version} && exit; exec {real} "$@"')

    libraries = [module.build(quick())]
    libraries.append(module.build(quick(1)))
    monkeypatch.setenv("SPIKELM_MARCH", "x86-64" if os.uname().machine == "x86_64" else "armv8-a")
    libraries.append(module.build(quick()))
    monkeypatch.delenv("SPIKELM_MARCH")
    with monkeypatch.context() as patched:
        patched.setattr(module, "FLAGS", (*module.FLAGS, "-DNOTHING"))
        libraries.append(module.build(quick()))
        patched.undo()
    with monkeypatch.context() as patched:
        patched.setattr(module, "processor", lambda: "another")
        libraries.append(module.build(quick()))
    for name, version in (("one", "1"), ("one", "2"), ("two", "2")):
        use_compiler(fake(name, version))
        libraries.append(module.build(quick()))
    assert len(set(libraries)) == len(libraries) == len(list(cache.glob("*.so"))) == 8


def test_the_real_source_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its types and definitions are in the text."""
    texts = {
        module.source(definitions, io, spike)
        for definitions in (DEFINITIONS, DEFINITIONS.replace("ATAN", "TRIANGLE"))
        for io in module.STORAGE
        for spike in (io, torch.int8)
        if io != torch.int8
    }
    assert len(texts) == 16
    assert all('#include "steps.cuh"' not in text and "struct Arguments" in text for text in texts)


# ---- what goes wrong


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SpikelmError, match=r"cannot write kernels to .*file/cpu .*set SPIKELM_CACHE to a writable"):
        module.build(quick())


def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_compiler: Callable[[str | None], None]
) -> None:
    assert module.unavailable() is None
    use_compiler(None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        module.unavailable()
        == "no C++ compiler was found (c++, g++, clang++); install one, such as Debian's package g++"
    )
    with pytest.raises(SpikelmError, match=r"^backend 'cpu': no C\+\+ compiler was found"):
        module.functions(DEFINITIONS, F32, F32)


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_the_compiler_on_the_path(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_compiler: Callable[[str | None], None]
) -> None:
    path = script(tmp_path / name, "exit 0")
    use_compiler(None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.compiler() == path


def test_cxx_that_names_nothing(use_compiler: Callable[[str | None], None]) -> None:
    use_compiler("no-such-compiler")
    reason = "the C++ compiler of the environment variable CXX, no-such-compiler, was not found"
    assert module.unavailable() == reason
    with pytest.raises(SpikelmError, match=f"^backend 'cpu': {reason.replace('+', '[+]')}$"):
        module.build(quick())


def test_cxx_that_is_no_program(use_compiler: Callable[[str | None], None], tmp_path: Path) -> None:
    """Executable, but nothing the system can run."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    use_compiler(str(broken))
    with pytest.raises(SpikelmError, match=r"backend 'cpu'.*broken"):
        module.build(quick())


def test_a_failure_is_told_and_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[list[str]]
) -> None:
    monkeypatch.setattr(module, "source", lambda *key: "int main( { return undeclared; }\n")
    for _ in range(2):
        with pytest.raises(SpikelmError, match=r"(?s)^backend 'cpu': .* failed with 1:\n.*error: "):
            module.functions(DEFINITIONS, F32, F32)
    assert len(compiled) == 1
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}  # no library and no temporary directory
    monkeypatch.setattr(module, "source", lambda *key: quick())
    module.functions(DEFINITIONS, F32, torch.int8)  # another specialisation is tried


def test_a_failure_without_the_word_error(use_compiler: Callable[[str | None], None], tmp_path: Path) -> None:
    use_compiler(script(tmp_path / "killed", '[ "$1" = --version ] && exit; echo out of memory >&2; exit 3'))
    with pytest.raises(SpikelmError, match=r"killed failed with 3:\nout of memory"):
        module.build(quick())


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_broken_library(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compiler may leave it: whole in the cache, by its digest, and still none."""
    monkeypatch.setattr(module, "source", lambda *key: quick())
    library = module.build(quick())
    store.keep_kernel(library, content)
    with pytest.raises(SpikelmError, match=f"{library} cannot be loaded, delete it to build it anew: "):
        module.functions(DEFINITIONS, F32, F32)
    library.unlink()
    assert call(quick()) == 0


def test_a_kernel_that_returns_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "source", lambda *key: quick(1))
    kernel = kernel_for(Case(dynamics("binary")))
    with pytest.raises(SpikelmError, match=r"backend 'cpu': no memory for forward over 2 steps of \(2, 3\)"):
        launch.forward(kernel, torch.zeros(2, 3), None, torch.tensor(1.0), 2, F32, 0.0, False, True)


# ---- two processes at once


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the children call no torch
def test_two_processes_build_once(cache: Path, tmp_path: Path, use_compiler: Callable[[str | None], None]) -> None:
    """The compiler waits, so that both are there before one has finished, and notes its runs."""
    log, real, text = tmp_path / "log", module.compiler(), quick(5)
    use_compiler(script(tmp_path / "slow", f'[ "$1" = --version ] || echo run >>{log}; sleep 0.5; exec {real} "$@"'))
    fork = multiprocessing.get_context("fork")
    together, answers = fork.Barrier(2), fork.SimpleQueue()

    def child() -> None:
        together.wait()
        answers.put(call(text))

    processes = [fork.Process(target=child, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [answers.get(), answers.get()] == [5, 5]
    assert log.read_text().split() == ["run"]
    assert sorted(path.suffix for path in cache.iterdir()) in ([".lock", ".sha256", ".so"], [".sha256", ".so"])
