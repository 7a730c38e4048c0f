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
    pairs = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    for row in train:
        first, second = _pairs(row)
        pairs.index_put_((first, second), torch.ones((), dtype=torch.float64), accumulate=True)
    unigram = pairs.sum(0) + 1
    unigram /= unigram.sum()
    prior = smoothing * vocab_size * unigram
    bigram = (pairs + prior) / (pairs.sum(1, keepdim=True) + prior.sum())
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    for row in held_out:
        first, second = _pairs(row)
        sums -= torch.stack([unigram[second].log().sum(), bigram[first, second].log().sum()])
        tokens += len(second)
    if not tokens:
        raise SpikelmError("the dataset holds no context to evaluate on")
    found: list[float] = (sums / tokens).tolist()
    return {"unigram": found[0], "bigram": found[1]}


def _pairs(row: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.as_tensor(row["input_ids"])
    return ids[:-1], ids[1:]
