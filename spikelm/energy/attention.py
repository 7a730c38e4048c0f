"""Fused attention as the products that it stands for, so that they can be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """Within it, torch's scaled_dot_product_attention is :func:`attend`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(query key^T scale + mask) value, no dropout: query [*, H, L, d], key [*, G, S, d], value [*, G, S, e].

    Heads that share keys (G divides H) are one product with them, which are not repeated.
    """
    length, size = query.shape[-2:]
    query = query * (size**-0.5 if scale is None else scale)
    shared = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if shared > 1:
        query = query.unflatten(-3, (-1, shared)).flatten(-3, -2)
    scores = query @ key.transpose(-1, -2)
    if shared > 1:
        scores = scores.unflatten(-2, (shared, length)).flatten(-4, -3)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        added = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if added else scores.masked_fill(~attn_mask, float("-inf"))
    weights = torch.ops.aten._safe_softmax(scores, -1)  # 0 where everything is masked, as the fused operator
    if shared > 1:
        weights = weights.unflatten(-3, (-1, shared)).flatten(-3, -2)
    mixed: torch.Tensor = weights @ value
    return mixed.unflatten(-2, (shared, length)).flatten(-4, -3) if shared > 1 else mixed
