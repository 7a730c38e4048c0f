"""Tensors as the kernels of cuda/steps.cuh read them: dense rows under up to four outer axes, and one packed struct."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from spikelm.ops.kernel import Kernel

# struct Arguments of cuda/steps.cuh: up to T, from frame to grad_strides, from channels on.
_POINTERS, _PLACES, _NUMBERS = struct.Struct("=11Qq"), struct.Struct("=17q"), struct.Struct("=4q9d")
_MOST_AXES = 4
_NO_AXES = (0,) * _MOST_AXES


class Rows(NamedTuple):
    """A frame as ``rows`` dense rows of ``length`` elements, over outer axes of ``sizes``, padded to four with 0.

    ``strides`` has the outer axes' strides of each tensor, in elements.
    """

    length: int
    rows: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


class Places(NamedTuple):
    """Where the elements of x and of the spikes' gradient lie: ``rows`` of each step, and the strides of the step.

    ``packed`` has struct Arguments' members from ``frame`` to ``grad_strides``.
    """

    frame: int
    x_step: int
    grad_step: int
    rows: Rows
    packed: bytes


class Read(NamedTuple):
    """What a kernel reads through strides; keep it until the kernel has run, since a copy lives here."""

    x: torch.Tensor
    grad_spikes: torch.Tensor | None
    places: Places


@lru_cache(maxsize=4096)
def rows_of(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Rows | None:
    """Merges axes of a frame wherever every tensor allows it.

    Returns None if a tensor's last axis is not dense or more than four outer axes are left: it has to be copied.
    """
    merged: list[tuple[int, ...]] = []  # (size, a stride per tensor), innermost first
    for size, *steps in reversed(list(zip(shape, *strides, strict=True))):
        if size == 1:
            continue
        if merged and all(step == merged[-1][0] * inner for step, inner in zip(steps, merged[-1][1:], strict=True)):
            merged[-1] = (size * merged[-1][0], *merged[-1][1:])
        else:
            merged.append((size, *steps))
    innermost, outer = merged[:1], merged[:0:-1]
    if any(step != 1 for axis in innermost for step in axis[1:]) or len(outer) > _MOST_AXES:
        return None
    length = innermost[0][0] if innermost else 1
    columns = list(zip(*outer, strict=True)) if outer else [()] * (1 + len(strides))
    sizes, *steps_of = [tuple(column) + _NO_AXES[len(outer) :] for column in columns]
    return Rows(length, math.prod(axis[0] for axis in outer), sizes, tuple(steps_of))


def channels_of(threshold_shape: tuple[int, ...], frame_shape: tuple[int, ...]) -> tuple[int, int]:
    """(channels, inner) of a threshold that broadcasts over a frame: element i has threshold (i / inner) % channels."""
    return _channels_of(threshold_shape, frame_shape) if threshold_shape else (1, 1)


@lru_cache(maxsize=4096)
def _channels_of(threshold_shape: tuple[int, ...], frame_shape: tuple[int, ...]) -> tuple[int, int]:
    behind = list(threshold_shape)
    while behind and behind[0] == 1:
        behind.pop(0)
    if not behind:
        return 1, 1
    return behind[0], math.prod(frame_shape[len(frame_shape) - len(behind) + 1 :])


def read(x: torch.Tensor, grad_spikes: torch.Tensor | None, single: bool, single_grad: bool) -> Read:
    """How x, [frame] if ``single`` and else [T, frame], and the gradient of the spikes likewise, are read.

    Copies a tensor only if its last axis is not dense or its axes do not merge to four.
    """
    x = x.resolve_neg()
    grad_spikes = None if grad_spikes is None else grad_spikes.resolve_neg()
    if x.is_contiguous() and (grad_spikes is None or grad_spikes.is_contiguous()):
        return Read(x, grad_spikes, _one_row(x.numel() if single else x.numel() // x.shape[0]))
    shape = x.shape if single else x.shape[1:]
    x_step, x_strides = _strides(x, single)
    if rows_of(shape, x_strides) is None:
        return read(x.contiguous(), grad_spikes, single, single_grad)
    if grad_spikes is None:
        rows = rows_of(shape, x_strides, x_strides)
        assert rows is not None
        return Read(x, None, _places(rows, x_step, 0))
    grad_step, grad_strides = _strides(grad_spikes, single_grad)
    rows = rows_of(shape, x_strides, grad_strides)
    if rows is not None:
        return Read(x, grad_spikes, _places(rows, x_step, grad_step))
    if not grad_spikes.is_contiguous():
        return read(x, grad_spikes.contiguous(), single, single_grad)
    return read(x.contiguous(), grad_spikes, single, single_grad)


@lru_cache(maxsize=4096)
def _one_row(count: int) -> Places:
    return _places(Rows(count, 1, _NO_AXES, (_NO_AXES, _NO_AXES)), count, count)


def _places(rows: Rows, x_step: int, grad_step: int) -> Places:
    frame = rows.length * rows.rows
    members = (frame, x_step, grad_step, rows.length, rows.rows, *rows.sizes, *rows.strides[0], *rows.strides[1])
    return Places(frame, x_step, grad_step, rows, _PLACES.pack(*members))


def _strides(tensor: torch.Tensor, single: bool) -> tuple[int, tuple[int, ...]]:
    strides = tensor.stride()
    return (0, strides) if single else (strides[0], strides[1:])


def pack(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor | None],
    T: int,
    what: Read,
    channels: tuple[int, int],
    started: bool,
    start: float,
    frame_weight: float,
    sum_scale: float,
    threads: int,
) -> bytes:
    """struct Arguments. ``tensors`` in its order: x, v, threshold, spikes, v_last, grad_spikes, grad_v_last, grad_x,
    grad_v, grad_threshold, scratch; None is a null pointer."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    numbers = (*kernel.numbers, start, frame_weight, sum_scale)
    return _POINTERS.pack(*pointers, T) + what.places.packed + _NUMBERS.pack(*channels, started, threads, *numbers)
