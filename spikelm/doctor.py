"""What is installed, which backends run here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import NamedTuple

import torch

from spikelm import __version__
from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.multistep import multi_step, unavailable

PACKAGES = ("torch", "spikingjelly", "snntorch", "transformers", "lm-eval", "cupy-cuda12x", "cupy-cuda13x")


class State(NamedTuple):
    """A backend in words, whether "auto" takes it, and whether it gives what the reference gives."""

    text: str
    runs: bool = True
    right: bool = True


def report() -> tuple[str, bool]:
    """The text of `python -m spikelm doctor`, and whether every backend that runs gives what the reference gives."""
    lines = [f"spikelm {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    lines += [f"  {package:<14}{_version(package)}" for package in PACKAGES]
    lines += ["", "backends", "  torch         runs: the reference"]
    states = {backend: _state(backend, device) for backend, device in (("cpu", "cpu"), ("cupy", "cuda"))}
    lines += [f"  {backend:<14}{state.text}" for backend, state in states.items()]
    on_cpu, on_cuda = (backend if state.runs else "torch" for backend, state in states.items())
    lines += ["", f'backend="auto" is {on_cpu} for CPU tensors and {on_cuda} for CUDA tensors']
    return "\n".join(lines), all(state.right for state in states.values())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _state(backend: str, device: str) -> State:
    """Runs a small kernel."""
    reason = unavailable(backend)
    if reason is not None:
        return State(f"does not run: {reason}", runs=False)
    try:
        equal = _equals_reference(backend, device)
    except (SpikelmError, RuntimeError) as error:
        return State(f"does not run: {error}", runs=False)
    where = f"{cpu_module.compiler()}, " if backend == "cpu" else ""
    where += f"kernels in {cpu_module.cache_directory()}"
    if not equal:
        wrong = f"WRONG: its spikes differ from the reference's ({where}); please report it, and use backend='torch'"
        return State(wrong, right=False)
    return State(f"runs: {where}")


def _equals_reference(backend: str, device: str) -> bool:
    x = torch.linspace(-3, 3, 4 * 999, device=device).view(4, 999)
    threshold, dynamics = torch.full((), 0.7, device=device), Dynamics("integer", decay=0.9, levels=4)
    (found, v), (expected, v_expected) = (
        multi_step(x, None, threshold, dynamics, backend=name) for name in (backend, "torch")
    )
    return torch.equal(found, expected) and torch.equal(v, v_expected)  # type: ignore[arg-type]
