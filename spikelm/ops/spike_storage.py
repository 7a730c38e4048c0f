"""Spikes kept for a backward pass in 1, 2, 4 or 8 bit each instead of a floating-point number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

# Largest |s| / unit -> bits of s / unit + offset; binary spikes have no sign.
_SIGNED = ((1, 2), (7, 4), (127, 8))


@dataclass(frozen=True)
class SpikeCode:
    """What values spikes have: ``unit`` times the integers of -largest..largest, or of 0..largest where not signed."""

    largest: int
    unit: float = 1.0
    signed: bool = True

    @property
    def bits(self) -> int | None:
        """Of a stored spike; None where 8 do not hold it."""
        if not self.signed and self.largest == 1:
            return 1
        return next((bits for limit, bits in _SIGNED if self.largest <= limit), None)

    @property
    def offset(self) -> int:
        """Added to a spike over unit, so that it is not negative."""
        return {1: 0, 2: 1, 4: 8, 8: 128}[self.bits or 8]


@dataclass(frozen=True)
class StoredSpikes:
    """Spikes as integers, several a byte: byte j of ``data`` holds the elements j, j + len(data), .. of the tensor."""

    data: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    code: SpikeCode


def store(spikes: torch.Tensor, code: SpikeCode) -> StoredSpikes:
    """Spikes [*] of a code with bits, exactly."""
    assert code.bits is not None
    parts = 8 // code.bits
    flat = spikes.detach().reshape(-1)
    whole = flat if code.unit == 1 else flat / code.unit
    values = whole.to(torch.int16 if code.bits == 8 else torch.int8).add_(code.offset).to(torch.uint8)
    values = F.pad(values, (0, -len(values) % parts)).view(parts, -1)
    data = values[0].clone()
    for part in range(1, parts):
        data |= values[part] << (code.bits * part)
    return StoredSpikes(data, spikes.shape, spikes.dtype, code)


def restore(stored: StoredSpikes) -> torch.Tensor:
    """The spikes that were stored, bit for bit."""
    code, data = stored.code, stored.data
    assert code.bits is not None
    parts, mask = 8 // code.bits, (1 << code.bits) - 1
    values = torch.empty((parts, len(data)), dtype=stored.dtype, device=data.device)
    for part in range(parts):
        values[part] = (data >> (code.bits * part)) & mask
    values.sub_(code.offset)
    if code.unit != 1:
        values.mul_(code.unit)
    return values.view(-1)[: stored.shape.numel()].view(stored.shape)


def linear(
    spikes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, code: SpikeCode | None
) -> torch.Tensor:
    """F.linear of spikes [*, in], whose backward keeps them as bits where that takes less; the gradients are the same.

    Left alone: what torch.compile traces, torch.func transforms, and where saved tensors have hooks of somebody else,
    as under activation checkpointing, which keeps nothing. Projections that get the same tensor share what is stored.
    """
    if torch.compiler.is_compiling():
        return F.linear(spikes, weight, bias)
    kind = spikes.device.type
    if not spikes.is_meta and torch.is_autocast_enabled(kind) and spikes.dtype != torch.float64:
        spikes = _shared_cast(spikes, torch.get_autocast_dtype(kind))
    if not _worth_it(spikes, weight, code):
        return F.linear(spikes, weight, bias)
    assert code is not None
    stored, place, elements, dtype = _shared_store(spikes, code), spikes.data_ptr(), spikes.numel(), spikes.dtype

    # Autograd keeps pack as long as the graph: it must not refer to the spikes, or they stay beside their bits.
    def pack(tensor: torch.Tensor) -> Any:
        is_spikes = tensor.data_ptr() == place and tensor.numel() == elements and tensor.dtype == dtype
        return (stored, tensor.shape) if is_spikes else tensor

    def unpack(kept: Any) -> torch.Tensor:
        return restore(kept[0]).view(kept[1]) if isinstance(kept, tuple) else kept

    with saved_tensors_hooks(pack, unpack):
        return F.linear(spikes, weight, bias)


def _shared_cast(spikes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast would make of spikes inside of the product; once for all projections that get them."""
    cast: torch.Tensor | None = spikes.__dict__.get("_cast")
    if cast is None or cast.dtype != dtype or cast.requires_grad != spikes.requires_grad:
        cast = spikes.__dict__["_cast"] = spikes.to(dtype)
    return cast


def _shared_store(spikes: torch.Tensor, code: SpikeCode) -> StoredSpikes:
    """The spikes as bits; once for all projections that get them."""
    if "_stored" not in spikes.__dict__:
        spikes.__dict__["_stored"] = store(spikes, code)
    stored: StoredSpikes = spikes.__dict__["_stored"]
    return stored


def _worth_it(spikes: torch.Tensor, weight: torch.Tensor, code: SpikeCode | None) -> bool:
    if not (torch.is_grad_enabled() and weight.requires_grad) or code is None or code.bits is None:
        return False
    if code.bits >= 8 * spikes.element_size() or not spikes.is_contiguous():
        return False
    hooks: Any = torch._C._autograd
    return bool(hooks._saved_tensors_hooks_is_enabled()) and hooks._top_saved_tensors_default_hooks(False) is None
