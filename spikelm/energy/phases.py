"""Runs a model on batches, phase by phase: prefill and one decoded token of a causal LM, or one forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import nn

from spikelm.energy.attention import PlainAttention
from spikelm.energy.spikes import Flow, mark, tensors_in
from spikelm.energy.trace import Trace
from spikelm.errors import SpikelmError

CACHES = ("past_key_values", "cache_params")
_NO_INPUTS = {"labels"}


@dataclass
class Pass:
    """One phase of one batch.

    Attributes:
        units: tokens (or samples) that it took; ``sequences`` they are in.
        state_bytes: of the cache, read and written.
        scan_state: numbers in the recurrent states, of all sequences.
    """

    trace: Trace
    units: int
    sequences: int = 1
    state_bytes: int = 0
    scan_state: int = 0


@dataclass
class Phases:
    """Every pass by phase, what the units are, and why a phase is missing."""

    unit: str
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def batches_of(model: nn.Module, data: Any, most: int) -> list[dict[str, Any]]:
    """Keyword arguments of every batch ("": the positional one) on the model's device; labels are left out."""
    if isinstance(data, (Mapping, torch.Tensor)):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise SpikelmError(
            f"report takes a batch (a tensor or a mapping of tensors) or an iterable of such; got {type(data).__name__}"
        )
    place = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
    found = [_batch(model, item, place) for item in islice(data, most)]
    if not found:
        raise SpikelmError("report takes one batch at least; got none")
    return found


def _batch(model: nn.Module, item: Any, device: torch.device) -> dict[str, Any]:
    if isinstance(item, torch.Tensor):
        named = hasattr(model, "config") and not item.is_floating_point()
        return {"input_ids" if named else "": item.to(device)}
    if not isinstance(item, Mapping):
        raise SpikelmError(f"a batch is a tensor or a mapping of tensors; got {type(item).__name__}")
    batch = {}
    for name, value in item.items():
        if name in _NO_INPUTS:
            continue
        if isinstance(value, list):  # a row of a dataset
            value = torch.as_tensor(value).unsqueeze(0)
        batch[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    if not any(True for _ in tensors_in(batch)):
        raise SpikelmError(f"a batch holds a tensor at least; got {', '.join(map(str, item)) or 'nothing'}")
    return batch


def is_causal_lm(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether it decodes token by token."""
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(generates) and "input_ids" in batch and not getattr(model.config, "is_encoder_decoder", False)


def run_phases(model: nn.Module, batches: list[dict[str, Any]]) -> Phases:
    """Counts every phase of every batch; states of SpikingJelly's and snnTorch's neurons start and end at rest."""
    tokens = "input_ids" in batches[0]
    found = Phases("token" if tokens else "sample")
    for batch in batches:
        reset(model)
        try:
            if is_causal_lm(model, batch):
                _run_causal(model, batch, found)
            else:
                trace, _ = _traced(model, batch)
                _add(found, "forward", Pass(trace, _units(model, batch, trace)))
        finally:
            reset(model)
    return found


def _run_causal(model: nn.Module, batch: dict[str, Any], found: Phases) -> None:
    ids = batch["input_ids"]
    trace, out = _traced(model, {**batch, "use_cache": True})
    name = cache_name(out)
    cache = None if name is None else getattr(out, name)
    first = Pass(trace, ids.numel(), len(ids))
    first.state_bytes, first.scan_state = sum(_cache_bytes(cache).values()), _scan_state(cache)
    _add(found, "prefill", first)
    if name is None:
        found.missing["decode"] = f"{type(model).__name__} returns no cache"
        return
    before = _cache_bytes(cache)
    trace, _ = _traced(model, next_call(model, batch, out, name))
    second = Pass(trace, len(ids), len(ids), _moved(before, _cache_bytes(cache)), _scan_state(cache))
    _add(found, "decode", second)


def cache_name(out: Any) -> str | None:
    """Under which name an output has a cache."""
    return next((name for name in CACHES if getattr(out, name, None) is not None), None)


def next_call(model: Any, batch: Mapping[str, Any], out: Any, name: str) -> dict[str, Any]:
    """The call for the token that greedy decoding appends."""
    ids = batch["input_ids"]
    more = {"input_ids": out.logits[:, -1:].argmax(-1), name: getattr(out, name), "use_cache": True}
    if batch.get("attention_mask") is not None:
        mask = batch["attention_mask"]
        more["attention_mask"] = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    accepted = inspect.signature(model.forward).parameters
    return {key: value for key, value in more.items() if key in accepted or "kwargs" in accepted}


def _add(found: Phases, phase: str, one: Pass) -> None:
    found.passes.setdefault(phase, []).append(one)


def _traced(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Trace, Any]:
    steps = _input_steps(model, batch)
    marked = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()  # a tensor of our own, to put a mark on
            mark(value, Flow(steps))
        marked[name] = value
    trace = Trace(model)
    with PlainAttention(), trace:
        return trace, call(model, marked)


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The model's output for a batch."""
    return model(batch[""]) if set(batch) == {""} else model(**batch)


def _input_steps(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """T where a SpikingJelly network takes x_seq [T, N, *]."""
    x = batch.get("")
    several = isinstance(model, nn.Module) and any(getattr(part, "step_mode", "s") == "m" for part in model.modules())
    return len(x) if several and isinstance(x, torch.Tensor) and x.dim() > 1 and not hasattr(model, "config") else 1


def _units(model: nn.Module, batch: Mapping[str, Any], trace: Trace) -> int:
    if "input_ids" in batch:
        return int(batch["input_ids"].numel())
    first = next(tensors_in(dict(batch)))
    if _input_steps(model, batch) > 1:
        return first.shape[1]
    return len(first) if first.dim() else 1


def _cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a cache by where it is kept."""
    found: dict[str, torch.Tensor] = {}
    for place, layer in enumerate(getattr(cache, "layers", None) or [cache]):
        for name, value in getattr(layer, "__dict__", {}).items():
            for number, tensor in enumerate(tensors_in(value)):
                found[f"{place}.{name}.{number}"] = tensor
    return found


def _cache_bytes(cache: Any) -> dict[str, int]:
    return {} if cache is None else {name: tensor.nbytes for name, tensor in _cache_tensors(cache).items()}


def _moved(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """What has grown is written by so much, and read as an operand; what has kept its size is read and written."""
    grown = {name: size - before.get(name, 0) for name, size in after.items()}
    return sum(grown[name] or 2 * size for name, size in after.items())


def _scan_state(cache: Any) -> int:
    return sum(tensor.numel() for name, tensor in _cache_tensors(cache).items() if ".recurrent_states." in name)


def reset(model: nn.Module) -> None:
    """Puts the neurons of both libraries at rest."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, MemoryModule):
            module.reset()
        elif hasattr(module, "reset_mem") and hasattr(module, "init_hidden"):
            module.reset_mem()
