"""What a phase takes on this machine, measured: beside the estimates, never among them."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spikelm.energy.phases import cache_name, call, is_causal_lm, next_call, reset
from spikelm.energy.spikes import tensors_in


@torch.no_grad()
def latency(model: nn.Module, batch: dict[str, Any], repeats: int = 5) -> dict[str, Any]:
    """Median seconds of a phase for the whole batch, and joules of the first phase where NVML gives them."""
    device = next(iter(tensors_in(batch))).device
    causal = is_causal_lm(model, batch)
    full = {**batch, "use_cache": True} if causal else batch
    first = "prefill" if causal else "forward"

    def run() -> Any:
        reset(model)
        return call(model, full)

    out = run()  # warms up
    seconds = {first: _median_seconds(run, device, repeats)}
    name = cache_name(out) if causal else None
    if name is not None:
        seconds["decode"] = _decode_seconds(model, batch, out, name, device, repeats)
    joules, reason = _joules(run, device, repeats)
    reset(model)
    return {
        "measured": "on this machine, apart from the estimate",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "median_seconds": seconds,
        f"joules_{first}": joules,
        "no_joules_because": reason,
    }


def _decode_seconds(model: Any, batch: Any, out: Any, name: str, device: torch.device, repeats: int) -> float:
    """Of one token after another, while the cache grows."""
    taken = []
    for _ in range(repeats):
        step = next_call(model, batch, out, name)
        taken.append(_median_seconds(lambda step=step: model(**step), device, 1))  # type: ignore[misc]
        if "attention_mask" in step:
            batch = {**batch, "attention_mask": step["attention_mask"]}
    return statistics.median(taken)


def _median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _joules(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float | None, str | None]:
    """Of one call, the mean of many: the counter is coarse."""
    if device.type != "cuda":
        return None, f"NVML measures GPUs; the model is on {device.type}"
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, "pynvml is not installed"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        for _ in range(20 * repeats):
            run()
        _synchronise(device)
        spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before  # mJ
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    return spent / 1e3 / (20 * repeats), None
