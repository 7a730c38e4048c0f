"""Unigram and bigram models of the training text: what a language model has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from spikelm.errors import SpikelmError

Rows = Iterable[Mapping[str, Any]]


def ngram_cross_entropies(train: Rows, held_out: Rows, vocab_size: int, smoothing: float = 0.03) -> dict[str, float]:
    """Nats per token of {"unigram", "bigram"} counted on ``train``, over the tokens of ``held_out`` but the first ones.

    Rows are {"input_ids": [ids]}. The unigram adds 1 to every count; the bigram adds ``smoothing`` * vocab_size counts
    in the unigram's proportions to every row, so that a pair never seen falls back to it.
    """
    if smoothing <= 0:
        raise SpikelmError(f"smoothing must be > 0; got {smoothing}")
    first, second = _pairs(train)
    unigram = torch.bincount(second, minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    before = torch.bincount(first, minlength=vocab_size).double()  # how often a token had a next one
    seen, counts = torch.unique(first * vocab_size + second, return_counts=True)  # V^2 counts would not fit
    first, second = _pairs(held_out)
    if not len(second):
        raise SpikelmError("the dataset holds no context to evaluate on")
    pair = first * vocab_size + second
    place = torch.searchsorted(seen, pair).clamp(max=len(seen) - 1)
    count = torch.where(seen[place] == pair, counts[place], 0)
    bigram = (count + smoothing * vocab_size * unigram[second]) / (before[first] + smoothing * vocab_size)
    return {"unigram": -unigram[second].log().mean().item(), "bigram": -bigram.log().mean().item()}


def _pairs(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token that has a next one in its row, and that one."""
    contexts = [torch.as_tensor(row["input_ids"]) for row in rows]
    nothing = torch.empty(0, dtype=torch.long)
    return (
        torch.cat([nothing, *(ids[:-1] for ids in contexts)]),
        torch.cat([nothing, *(ids[1:] for ids in contexts)]),
    )
