"""From which share of active channels on a dense product is quicker than a gather: measured once on a machine."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from spikelm.cpu import module
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel

TOLERATED = 1.05  # a gather's time over the dense product's, up to which it is taken
_SHAPE = (2048, 4096)  # channels and outputs of the measurement
_ROUNDS = 5
_MOST_BYTES = 1 << 20  # of a file of some kilobytes


def break_even(weights: torch.dtype, tokens: int) -> float:
    """The share of active channels, within [0, 1], up to which a CPU's gather is taken for weights of that type.

    Measured at the first call with as many threads as torch has, half a second, and kept in the kernels' cache.
    """
    return _known(weights, tokens, torch.get_num_threads())


@cache
def _known(weights: torch.dtype, tokens: int, threads: int) -> float:
    key = json.dumps([str(weights), tokens, threads, torch.__version__])
    path = module.cache_directory() / "break_even.json"
    machine = hashlib.sha256(module.processor().encode()).hexdigest()[:16]
    share = _kept(path).get(machine, {}).get(key)
    if isinstance(share, float) and 0 <= share <= 1:
        return share
    share = _measure(weights, tokens)
    kept = _kept(path)
    kept.setdefault(machine, {})[key] = share
    with suppress(OSError):  # measured anew in the next process
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(json.dumps(kept, indent=1))
            os.replace(whole, path)
    return share


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """The shares of every machine in a file, whatever else may be in it or in its place."""
    with suppress(OSError, ValueError, RecursionError):
        entry = path.lstat()
        if not stat.S_ISREG(entry.st_mode) or entry.st_size > _MOST_BYTES:  # reading a pipe would not end
            return {}
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return {machine: shares for machine, shares in found.items() if isinstance(shares, dict)}
    return {}


def _measure(weights: torch.dtype, tokens: int) -> float:
    """Gathers' times at a quarter and all of the channels give a line; where it meets TOLERATED times the dense one."""
    from spikelm.cpu import spike_linear as cpu
    from spikelm.ops.spike_linear import Encoder, SpikeWeights

    channels, outputs = _SHAPE
    io = weights if weights.is_floating_point else torch.float32
    int8 = weights == torch.int8
    cpu_only: Any = {"device": "cpu"}
    scale = torch.ones(outputs, dtype=torch.float32, **cpu_only) if int8 else None
    several = [
        SpikeWeights(torch.ones(_SHAPE, dtype=weights, **cpu_only), "int8" if int8 else "float", scale=scale)
        for _ in range(2)
    ]
    encoder = Encoder(torch.ones((), dtype=torch.float32, **cpu_only), Dynamics("integer", levels=1))
    kernel = encoder.dynamics.kernel
    assert isinstance(kernel, Kernel)
    y = [torch.empty(tokens, outputs, dtype=io, **cpu_only)]

    def gather(share: float) -> float:
        spikes = torch.zeros(tokens, channels, dtype=io, **cpu_only)
        spikes[:, :: round(1 / share)] = 1
        return _quickest(lambda i: cpu.project(kernel, encoder, spikes, [several[i % 2]], y, channels))

    spikes = torch.ones(tokens, channels, dtype=io, **cpu_only)
    dense = _quickest(lambda i: F.linear(spikes, several[i % 2].matrix(io)))
    quarter, whole = gather(0.25), gather(1.0)
    slope = max((whole - quarter) / 0.75, 1e-12)
    return min(1.0, max(0.0, (TOLERATED * dense - whole) / slope + 1))


def _quickest(call: Callable[[int], object]) -> float:
    times = []
    for i in range(2 * _ROUNDS):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return min(times)
