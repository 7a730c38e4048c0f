"""Where spikes go: every activation carries what is known of it, through whatever moves it, to the product it enters.

Marks are kept beside the tensors, for as long as one pass is counted. What has none depends on no input: a weight, or
what is made of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from spikelm.energy.time_axis import entries_taken, keeps_first_axis

_RESHAPED = set("view _unsafe_view _reshape_alias reshape".split())
_SAME = set("clone detach alias _to_copy lift_fresh lift contiguous neg abs".split())
_MOVED = set(
    """t transpose permute expand squeeze unsqueeze slice select split split_with_sizes unbind unfold diagonal index
    index_select gather repeat repeat_interleave flip roll tril triu""".split()
)
_JOINED = {"cat", "stack"}
_SUMMED = {"sum", "mean"}
_MADE = set("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split())


@dataclass(frozen=True)
class Spikes:
    """Of a tensor that neurons have emitted.

    Attributes:
        count: spikes behind every element, over all its frames, of its shape; None on the meta device.
        frames: frames that every element is the sum of; 1 where it is a frame itself.
        span: values that an element can have, less one.
        signed: whether spikes have a sign.
        weighted: whether the frames weigh other than 1, so that a product has to scale their sums.
    """

    count: torch.Tensor | None
    frames: int = 1
    span: int = 1
    signed: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class Flow:
    """Of an activation: how many time steps its first axis holds, alone or folded in, and its spikes if it has some.

    ``input_length`` is how long the first axis of the network's input is, where that axis is still the first one here;
    else 0.
    """

    steps: int = 1
    spikes: Spikes | None = None
    input_length: int = 0


_OUTSIDE = WeakIdKeyDictionary()  # what is marked where no pass is counted
_FLOWS: ContextVar[WeakIdKeyDictionary] = ContextVar("flows", default=_OUTSIDE)


@contextmanager
def marks_forgotten() -> Iterator[None]:
    """Starts without marks, and leaves none: not on a buffer that the model wrote its input to."""
    before = _FLOWS.set(WeakIdKeyDictionary())
    try:
        yield
    finally:
        _FLOWS.reset(before)


def flow_of(tensor: Any) -> Flow | None:
    """None for what depends on no input."""
    found: Flow | None = _FLOWS.get().get(tensor) if isinstance(tensor, torch.Tensor) else None
    return found


def mark(tensor: torch.Tensor, flow: Flow) -> None:
    """Sets what is known of an activation."""
    _FLOWS.get()[tensor] = flow


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def spikes_of(tensor: torch.Tensor) -> Spikes | None:
    """Of an activation: its neurons' spikes, or the tensor itself where it has zeros, ones and nothing else."""
    flow = flow_of(tensor)
    if flow is None or flow.spikes is not None or tensor.is_meta:
        return None if flow is None else flow.spikes
    if tensor.is_complex() or not _is_binary(tensor.flatten()[:4096]) or not _is_binary(tensor):
        return None
    # Zeros alone are a state before its first step, ones alone an attention to a single key.
    ones = tensor.count_nonzero()
    return Spikes(tensor.detach().float()) if 0 < int(ones) < tensor.numel() else None


def _is_binary(tensor: torch.Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def spread(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
    """Marks the results of an operator that has an activation among its arguments."""
    flows = [flow for tensor in tensors_in((args, dict(kwargs))) if (flow := flow_of(tensor)) is not None]
    name = _name(func)
    if name in _MADE:
        return  # the size of an input, none of its values
    steps = _steps_behind(name, args, max(flow.steps for flow in flows))
    inputs = [(tensor, flow) for tensor in tensors_in(args) if (flow := flow_of(tensor)) and flow.input_length]
    counts = _moved(func, name, args, kwargs, out) if any(flow.spikes for flow in flows) else None
    results = list(tensors_in(out))
    for place, tensor in enumerate(results):
        spikes = counts[place] if counts is not None and len(counts) == len(results) else None
        kept = [f.input_length for x, f in inputs if keeps_first_axis(name, x, f.input_length, args, tensor)]
        mark(tensor, Flow(steps, spikes, kept[0] if kept else 0))
        base = tensor._base
        if base is not None and func._schema.is_mutable:  # a part of it was written to: whatever it was, it is no more
            mark(base, Flow(steps))


def _name(func: Any) -> str:
    name: str = func._schema.name.split("::")[1]
    return name.removesuffix("_") if not name.endswith("__") else name


def _steps_behind(name: str, args: tuple[Any, ...], steps: int) -> int:
    """1 where the time axis is summed over or an entry of it is taken."""
    if steps == 1 or not args or not isinstance(args[0], torch.Tensor):
        return steps
    first, along = args[0], args[1] if len(args) > 1 else 0
    if first.dim() == 0 or len(first) != steps:
        return steps
    if name in _SUMMED and (along in ([0], 0) or len(args) == 1):
        return 1
    return 1 if entries_taken(name, first, args) else steps


def _moved(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> list[Spikes | None] | None:
    """The spikes of every result, or None where they are spikes no more."""
    first = args[0]
    if name in _JOINED:
        return _joined(func, args, kwargs, out)
    if name == "mul":
        return _masked(args, out)
    if name == "add" and kwargs.get("alpha", 1) == 1:
        return _added(args, out)
    if name == "copy":
        first = args[1]
    flow = flow_of(first)
    spikes = None if flow is None else flow.spikes
    if spikes is None:
        return None
    if spikes.count is None:
        return [spikes for _ in tensors_in(out)] if name in _RESHAPED | _SAME | _MOVED | {"copy", "div"} else None
    count = spikes.count
    if name in _SAME or (name == "div" and _is_number(args[1])):
        return [spikes]
    if name in _RESHAPED:
        return [replace(spikes, count=count.reshape(out.shape))]
    if name == "copy":
        return [replace(spikes, count=count.expand_as(out).clone())]
    if name in _MOVED or (name == "constant_pad_nd" and not any(args[2:])):
        return [replace(spikes, count=part) for part in tensors_in(func(count, *args[1:], **kwargs))]
    if name == "masked_fill" and isinstance(args[2], (int, float)) and args[2] == 0:
        return [replace(spikes, count=count.masked_fill(args[1], 0))]
    return None


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (value.numel() == 1 and flow_of(value) is None)


def _joined(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> list[Spikes | None] | None:
    """All parts are spikes, or zeros beside them."""
    found = [flow.spikes if (flow := flow_of(part)) else None for part in args[0]]
    known = [spikes for spikes in found if spikes is not None]
    if any(spikes.count is None for spikes in known):
        return [known[0]]
    if any(spikes is None and bool(part.any()) for part, spikes in zip(args[0], found, strict=True)):
        return None
    counts = [
        torch.zeros_like(part, dtype=torch.float32) if spikes is None or spikes.count is None else spikes.count.float()
        for part, spikes in zip(args[0], found, strict=True)
    ]
    return [replace(_widest(known), count=func(counts, *args[1:], **kwargs))]


def _masked(args: tuple[Any, ...], out: Any) -> list[Spikes | None] | None:
    """Spikes times one number are spikes, and so are spikes times zeros and ones."""
    for one, other in (args[:2], args[1::-1]):
        flow = flow_of(one)
        if flow is None or flow.spikes is None:
            continue
        if _is_number(other):
            return [flow.spikes]
        if flow.spikes.count is None:
            return None
        if not other.is_meta and _is_binary(other):
            return [replace(flow.spikes, count=flow.spikes.count * other)]
    return None


def _added(args: tuple[Any, ...], out: Any) -> list[Spikes | None] | None:
    """The sum of two spike tensors of a shape: either one's spikes are passed on."""
    found = [flow.spikes if (flow := flow_of(part)) else None for part in args[:2]]
    one, other = found
    if one is None or other is None or args[0].shape != args[1].shape or one.count is None or other.count is None:
        return None
    widest = _widest([one, other])
    return [replace(widest, count=one.count + other.count, span=one.span + other.span)]


def _widest(known: list[Spikes]) -> Spikes:
    return Spikes(
        None,
        max(spikes.frames for spikes in known),
        max(spikes.span for spikes in known),
        any(spikes.signed for spikes in known),
        any(spikes.weighted for spikes in known),
    )
