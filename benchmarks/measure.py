"""How benchmarks/compare.py measures: interleaved times, bytes saved for the backward, peak memory, the machine."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import torch
from torch.autograd.graph import saved_tensors_hooks

from spikelm.cpu.module import compiler
from spikelm.run import versions

PACKAGES = ("snntorch", "triton", "cupy-cuda12x", "cupy-cuda13x")


class Timing(NamedTuple):
    """Median and quartiles in seconds, and of how many calls."""

    median: float
    low: float
    high: float
    calls: int


Call = tuple[Callable[[], object], Callable[[], object]]  # prepare, which is not timed, and the call


def interleave(
    calls: Mapping[str, Call],
    device: str,
    *,
    seconds: float,
    most: int = 201,
    block: int = 1,
    host: bool = False,
) -> dict[str, Timing]:
    """Times all calls in one process, in rounds of ``block`` calls each, in a new order every round.

    As many rounds as fit into ``seconds``, at least 5 and at most ``most``. What a call returns is freed outside of its
    time. On a GPU the time between two events; with ``host`` that of the launching process, without waiting.
    """
    clock = _wall_clock if device == "cpu" or host else _event_clock
    for _ in range(2):
        begin = time.perf_counter()
        for prepare, call in calls.values():
            prepare()
            clock(call)
        if device != "cpu":
            torch.cuda.synchronize()
        whole = time.perf_counter() - begin
        if whole > 2:
            break  # long enough to be warm
    rounds = min(max(int(seconds / (whole * block)), 5), most)
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                prepare, call = calls[name]
                for _ in range(block):
                    prepare()
                    found[name].append(clock(call))
            if device != "cpu":
                torch.cuda.synchronize()
    finally:
        gc.enable()
    return {name: _timing(times) for name, times in found.items()}


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times))


def _wall_clock(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - begin


def _event_clock(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3


def least_bytes(dtype: torch.dtype, spikes: torch.dtype, backward: bool) -> int:
    """Bytes per element-step that anyone moves: x in, spikes out; in the backward x and a gradient in, another out."""
    return 5 * dtype.itemsize if backward else dtype.itemsize + spikes.itemsize


def rows(
    where: dict[str, Any],
    timings: dict[str, Timing],
    bytes_of: dict[str, int],
    differences: dict[str, tuple[float, float]],
    x: torch.Tensor,
) -> list[dict[str, Any]]:
    """One row for each contender; ours with how many times faster it is than each equal contender."""
    found = []
    copy_per_byte = timings["copy"].median / (2 * x.nbytes)
    equal = {name: contenders.is_equal(value, x.dtype) for name, value in differences.items()}
    for name, timing in timings.items():
        row = {**where, "contender": name, "calls": timing.calls}
        row["us"], row["quartiles_us"] = 1e6 * timing.median, [1e6 * timing.low, 1e6 * timing.high]
        row["ns_per_element_step"] = 1e9 * timing.median / x.numel()
        if name in bytes_of:
            row["bytes_per_element_step"] = bytes_of[name]
            row["to_floor"] = timing.median / (copy_per_byte * bytes_of[name] * x.numel())
            row["equal"] = equal[name]
            if not equal[name]:
                row["spikes_that_differ"], row["gradient_off_by"] = differences[name]
        if name in contenders.ALL_OURS:
            row["times_faster"] = {
                other: timings[other].median / timing.median
                for other in timings
                if other in equal and equal[other] and other not in contenders.ALL_OURS
            }
        found.append({key: rounded(value) for key, value in row.items()})
    return found


def rounded(value: Any) -> Any:
    """Five digits are more than a clock knows; None for what JSON does not hold."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return {key: rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


def saved_bytes(contender: contenders.Contender, x: torch.Tensor) -> dict[str, int]:
    """Bytes that autograd holds between forward and backward: x itself, and everything else; storages count once."""
    leaf, kept = x.detach().requires_grad_(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    contender.prepare()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.forward(leaf)
    contender.prepare()
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in kept.items()}
    of_x = sizes.pop(leaf.untyped_storage().data_ptr(), 0)
    return {"x": of_x, "besides": sum(sizes.values())}


def peak_memory(who: Sequence[tuple[str, str]], T: int, N: int, device: str) -> list[dict[str, Any]]:
    """Bytes in use at the peak of forward + backward (float32): in all, and besides x and the spikes' gradient.

    ``who``: pairs of a neuron and a contender. On a CPU the resident set of a process of its own, which the system
    counts; on a GPU torch's allocator does.
    """
    arguments = [(kind, name, T, N, device) for kind, name in who]
    if device != "cpu":
        return [_peak(*one) for one in arguments]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(_peak_elsewhere, arguments))


def _peak_elsewhere(arguments: tuple[str, str, int, int, str]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak, *arguments).result()


def _peak(kind: str, who: str, T: int, N: int, device: str) -> dict[str, Any]:
    neuron = contenders.NEURONS[kind]
    everyone = contenders.field_of(neuron, device, backward=True)
    (contender,) = (one for one in everyone if one.name == who)
    _train(contender, neuron, T, 64, device)  # whatever is loaded and built at a first call
    gc.collect()
    if device == "cpu":
        before = _resident("VmRSS")
        inputs = _train(contender, neuron, T, N, device, reset_peak=_reset_resident_peak)
        peak = _resident("VmHWM")
    else:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        inputs = _train(contender, neuron, T, N, device, reset_peak=torch.cuda.reset_peak_memory_stats)
        peak = torch.cuda.max_memory_allocated()
    used = peak - before
    return {"neuron": kind, "contender": who, "T": T, "N": N, "peak": used, "besides_inputs": used - inputs}


def _train(
    contender: contenders.Contender,
    neuron: contenders.Neuron,
    T: int,
    N: int,
    device: str,
    reset_peak: Callable[[], object] = lambda: None,
) -> int:
    """One forward + backward; the bytes of x and the spikes' gradient."""
    x = contenders.inputs(T, N, torch.float32, device, neuron.non_negative)
    gradient = torch.ones_like(x)
    reset_peak()
    contender.prepare()
    contenders.call_of(contender, x, gradient)()
    contender.prepare()
    return x.nbytes + gradient.nbytes


def _resident(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts anew at what is resident now


def reuse_memory() -> str:
    """Has glibc keep whatever is freed, of any size, for all contenders; says so.

    Else each output of more than 32 MB is mapped, faulted in and zeroed anew, which costs more than any contender.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        return "mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)"
    return "as the C library has it"


def machine() -> dict[str, Any]:
    """Versions of all that takes part, the processor, the compiler, the memory and the load before the measurement."""
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    for package in ("transformers", "datasets", "tokenizers", "accelerate"):
        del found[package]
    program = compiler()
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    found["compiler"] = text.partition("\n")[0] or None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["machine"] |= {"memory_gb": round(memory / 1e9, 1), "load_before": round(os.getloadavg()[0], 2)}
    return found


def commit(root: Path) -> str | None:
    """The commit that is checked out, "-dirty" where the package or the benchmarks differ from it; None without git."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "spikelm", "benchmarks/*.py"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() + ("-dirty" if changed.stdout.strip() else "") if done.returncode == 0 else None
