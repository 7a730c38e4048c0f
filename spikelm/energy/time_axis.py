"""Whether the first axis of a network's input is time: [T, N, *], taken by a multi-step module or entry by entry.

Sizes alone do not say it: a batch [N, *] that is repeated T times within the network may have N = T. So the input's
first axis is followed through the operators, up to where time begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_RESHAPED = {"view", "_unsafe_view", "_reshape_alias", "reshape"}
_ONE_AXIS = {"select", "unbind", "unsqueeze"}  # which takes or adds the axis that its second argument names
_JOINED = {"cat", "stack"}
_MATRIX_ON_THE_RIGHT = {"mm": 1, "mv": 1, "dot": 1, "_int_mm": 1, "addmm": 2, "addmv": 2}


def keeps_first_axis(name: str, tensor: torch.Tensor, length: int, args: Sequence[Any], out: torch.Tensor) -> bool:
    """Whether the first axis of ``tensor``, alone or with others folded into it, is still the first one of ``out``.

    Args:
        name: of an operator of aten, e.g. "permute".
        tensor: one of its arguments, whose first axis is ``length`` long, or a multiple where others are folded in.
    """
    if out.dim() == 0 or tensor.dim() == 0:
        return False
    if name in _RESHAPED:
        return len(out) % length == 0
    if name == "embedding":
        return len(out) == len(tensor)
    if _moves_first_axis(name, tensor, args):
        return False
    grows = out.dim() > tensor.dim() + (name in {"unsqueeze", "stack"})
    return not grows and len(out) == len(tensor)


def _moves_first_axis(name: str, tensor: torch.Tensor, args: Sequence[Any]) -> bool:
    if name in _MATRIX_ON_THE_RIGHT:
        return tensor is args[_MATRIX_ON_THE_RIGHT[name]]
    along: Any = args[1] if len(args) > 1 else 0
    if name == "t":
        return tensor.dim() > 1
    if name == "permute":
        return bool(along[0] % tensor.dim() != 0)
    if name == "transpose":
        return 0 in {axis % tensor.dim() for axis in args[1:3]}
    if name in _ONE_AXIS | _JOINED:
        return bool(along % (tensor.dim() + (name in {"unsqueeze", "stack"})) == 0)
    if name in {"sum", "mean", "amax", "amin", "max", "min"}:
        axes = [along] if isinstance(along, int) else along
        return len(args) == 1 or not isinstance(axes, list) or not axes or 0 in {axis % tensor.dim() for axis in axes}
    return name == "index" and along[0] is not None


def entries_taken(name: str, tensor: torch.Tensor, args: Sequence[Any]) -> range:
    """Which entries of the first axis an operator takes out one by one: x[t] is one, "for x in x_seq" are all."""
    axis = {"select": 1, "slice": 1, "unbind": 1, "split": 2}.get(name)
    if axis is None or tensor.dim() == 0 or (len(args) > axis and args[axis] % tensor.dim()):
        return range(0)
    if name == "unbind" or (name == "split" and args[1] == 1):
        return range(len(tensor))
    if name == "select":
        entry = args[2] % len(tensor)
        return range(entry, entry + 1)
    taken = range(len(tensor))[slice(*args[2:])] if name == "slice" else range(0)
    return taken if len(taken) == 1 else range(0)
