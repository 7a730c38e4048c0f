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
from spikelm.energy.spikes import Flow, mark, marks_forgotten, tensors_in
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
        return _filled({"input_ids" if named else "": item.to(device)})
    if not isinstance(item, Mapping):
        raise SpikelmError(f"a batch is a tensor or a mapping of tensors; got {type(item).__name__}")
    batch = {}
    for name, value in item.items():
        if name in _NO_INPUTS:
            continue
        if isinstance(value, list):  # a row of a dataset
            value = _row(name, value).unsqueeze(0)
        batch[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    if not any(True for _ in tensors_in(batch)):
        raise SpikelmError(f"a batch holds a tensor at least; got {', '.join(map(str, item)) or 'nothing'}")
    return _filled(batch)


def _row(name: str, values: list[Any]) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SpikelmError(
            f"a list in a batch is one row of numbers, rows of one length within it; {name} is not: {error}"
        ) from error


def _filled(batch: dict[str, Any]) -> dict[str, Any]:
    name, first = _main_input(batch)
    if not first.numel():
        raise SpikelmError(f"a batch holds one sample or token at least; got {name or 'a tensor'} {list(first.shape)}")
    return batch


def _main_input(batch: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """Name and tensor of what the units are counted by."""
    if isinstance(batch.get("input_ids"), torch.Tensor):
        return "input_ids", batch["input_ids"]
    return next((name, tensor) for name, value in batch.items() for tensor in tensors_in(value))


def is_causal_lm(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether it decodes token by token."""
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(generates) and "input_ids" in batch and not getattr(model.config, "is_encoder_decoder", False)


def run_phases(model: nn.Module, batches: list[dict[str, Any]], time_steps: int | None = None) -> Phases:
    """Counts every phase of every batch; states of SpikingJelly's and snnTorch's neurons start and end at rest.

    ``time_steps`` are those that the network runs; None where its neurons say it.
    """
    tokens = "input_ids" in batches[0]
    found = Phases("token" if tokens else "sample")
    for batch in batches:
        reset(model)
        try:
            if is_causal_lm(model, batch):
                with marks_forgotten():
                    _run_causal(model, batch, found, time_steps)
            else:
                _add(found, "forward", _run_forward(model, batch, time_steps))
        finally:
            reset(model)
    return found


def _run_forward(model: nn.Module, batch: dict[str, Any], time_steps: int | None) -> Pass:
    """One forward, and another where it shows that the input's first axis is time though it was not taken for it."""
    name, first = _main_input(batch)
    if name == "input_ids" or first.dim() < 2:
        with marks_forgotten():
            trace, _ = _traced(model, batch, time_steps)
        return Pass(trace, first.numel() if name == "input_ids" else len(first) if first.dim() else 1)
    multi_step = any(getattr(part, "step_mode", "s") == "m" for part in model.modules())
    supposed = multi_step and not hasattr(model, "config")
    trace = _run_with_axis(model, batch, time_steps, supposed)
    sequence = trace.takes_sequence()
    if sequence != supposed:
        reset(model)
        trace = _run_with_axis(model, batch, time_steps, sequence)
    return Pass(trace, first.shape[1] if sequence else len(first))


def _run_with_axis(model: nn.Module, batch: dict[str, Any], time_steps: int | None, sequence: bool) -> Trace:
    with marks_forgotten():
        return _traced(model, batch, time_steps, _main_input(batch)[1], sequence)[0]


def _run_causal(model: nn.Module, batch: dict[str, Any], found: Phases, time_steps: int | None) -> None:
    ids = batch["input_ids"]
    trace, out = _traced(model, {**batch, "use_cache": True}, time_steps)
    name = cache_name(out)
    cache = None if name is None else getattr(out, name)
    first = Pass(trace, ids.numel(), len(ids))
    first.state_bytes, first.scan_state = sum(_cache_bytes(cache).values()), _scan_state(cache)
    _add(found, "prefill", first)
    if name is None:
        found.missing["decode"] = f"{type(model).__name__} returns no cache"
        return
    before = _cache_bytes(cache)
    trace, _ = _traced(model, next_call(model, batch, out, name), time_steps)
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


def _traced(
    model: nn.Module,
    batch: Mapping[str, Any],
    time_steps: int | None,
    first: torch.Tensor | None = None,
    sequence: bool = False,
) -> tuple[Trace, Any]:
    """``first``: the tensor of the batch whose first axis is followed, and is time in a ``sequence``."""
    marked = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            length = len(first) if first is not None and value.dim() > 1 and len(value) == len(first) else 0
            followed = length if value is first else 0
            value = value.detach()  # a tensor of our own, to put a mark on
            mark(value, Flow(max(1, length) if sequence else 1, None, followed))
        marked[name] = value
    trace = Trace(model, time_steps)
    with PlainAttention(), trace:
        return trace, call(model, marked)


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The model's output for a batch."""
    return model(batch[""]) if set(batch) == {""} else model(**batch)


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
