"""torch.vmap over the operators: one call over a batch axis of the frame; the backward, whose threshold gradient sums a
frame, in a loop. Importing it registers the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spikelm.errors import SpikelmError
from spikelm.ops import operators


def _to_axis(tensor: torch.Tensor | None, axis: int | None, to: int, size: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    if axis is not None:
        return tensor.movedim(axis, to)
    return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])


def _one_threshold(axis: int | None) -> None:
    if axis is not None:
        raise SpikelmError("no kernel for a threshold that vmap maps over; use backend='torch'")


def _map_multi_step(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x, v, threshold, definitions, numbers, *rest = arguments
    _one_threshold(in_dims[2])
    inject_first = operators._kernel(definitions, numbers).inject_first
    x = _to_axis(x, in_dims[0], 0 if inject_first else 1, info.batch_size)
    v = _to_axis(v, in_dims[1], 0, info.batch_size)
    outputs = operators._multi_step_op(x, v, threshold, definitions, numbers, *rest)
    return outputs, (1, 0 if rest[-1] else None)


def _map_encode_sum(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x, threshold, *rest = arguments
    _one_threshold(in_dims[1])
    return operators._encode_sum_op(_to_axis(x, in_dims[0], 0, info.batch_size), threshold, *rest), 0


def _map_in_a_loop(operator: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    def mapped(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        pairs = list(zip(arguments, in_dims, strict=True))
        results = [
            operator(*(value.select(axis, i) if isinstance(axis, int) else value for value, axis in pairs))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return mapped


operators._multi_step_op.register_vmap(_map_multi_step)
operators._encode_sum_op.register_vmap(_map_encode_sum)
operators._multi_step_backward_op.register_vmap(_map_in_a_loop(operators._multi_step_backward_op))
operators._encode_sum_backward_op.register_vmap(_map_in_a_loop(operators._encode_sum_backward_op))
