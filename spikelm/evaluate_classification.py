"""How a SpikingBert classifies held-out sentences, after how many steps, at which rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spikelm.data.classification import collate_classification
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode

Rows = Sequence[dict[str, Any]]


@torch.no_grad()
def rate_accuracy(model: Any, rows: Rows, batch_size: int = 64, **forward: Any) -> float:
    """Share of encoded rows that a classifier of transformers is right about; ``forward``: e.g. mode="rate"."""
    right = 0
    with evaluation_mode(model):
        for batch, labels in sentence_batches(model, rows, batch_size):
            right += int((model(**batch, **forward).logits.argmax(-1) == labels).sum())
    return right / len(rows)


@torch.no_grad()
def spiking_accuracy(student: Any, rows: Rows, T: Sequence[int], batch_size: int = 64) -> dict[int, dict[str, Any]]:
    """Accuracy, rates and gaps of a SpikingBert after each number of steps in T, from one run of max(T) of them.

    Returns {steps: {"accuracy", "firing_rates" and "rate_gaps": population -> mean over tokens and channels}}; a gap is
    \\|asr - F\\|, F the clamp network at the measured rates of the population's inputs.
    """
    right: dict[int, int] = defaultdict(int)
    sums: dict[int, dict[str, dict[str, torch.Tensor]]] = defaultdict(lambda: {"firing_rates": {}, "rate_gaps": {}})
    tokens = 0
    with evaluation_mode(student):
        for batch, labels in tqdm(list(sentence_batches(student, rows, batch_size)), desc=f"T = {max(T)}", leave=False):
            count = int(batch["attention_mask"].sum())
            tokens += count
            for steps, output in student.outputs_after(T, **batch).items():
                right[steps] += int((output.logits.argmax(-1) == labels).sum())
                for name, totals in sums[steps].items():
                    for population, mean in output[name].items():
                        totals[population] = totals.get(population, 0) + count * mean.double()
    return {
        steps: {"accuracy": right[steps] / len(rows)}
        | {name: {p: float(total) / tokens for p, total in totals.items()} for name, totals in sums[steps].items()}
        for steps in sorted(right)
    }


def sentence_batches(
    model: nn.Module, rows: Rows, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Inputs and labels on the model's device, sentences of like length together."""
    if not rows:
        raise SpikelmError("there is no sentence to evaluate on: the split is empty")
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collate_classification(ordered[start : start + batch_size])
        batch = {name: value.to(device) for name, value in batch.items()}
        yield batch, batch.pop("labels")
