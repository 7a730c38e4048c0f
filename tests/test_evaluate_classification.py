"""Accuracy, rates and gaps of a SpikingBert over sentences of several lengths."""

import pytest
import torch

from spikelm.errors import SpikelmError
from spikelm.evaluate_classification import rate_accuracy, spiking_accuracy
from tests.small_models import bert, spikingbert


def rows() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(11):
        length = int(torch.randint(2, 14, (), generator=generator))
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": number % 2})
    return found


@torch.no_grad()
def test_against_one_sentence_at_a_time() -> None:
    model = spikingbert().train()
    found = spiking_accuracy(model, rows(), (4, 8), batch_size=3)
    assert model.training, "the mode is as it was"
    model.eval()
    right = tokens = 0
    rate = 0.0
    for row in rows():
        output = model(torch.tensor([row["input_ids"]]), T=4, output_rates=True)
        right += int(output.logits.argmax() == row["labels"])
        tokens += len(row["input_ids"])  # type: ignore[arg-type]
        rate += len(row["input_ids"]) * float(output.firing_rates["layers.1.output_neuron"])  # type: ignore[arg-type]
    assert list(found) == [4, 8] and found[4]["accuracy"] == right / 11
    assert found[4]["firing_rates"]["layers.1.output_neuron"] == pytest.approx(rate / tokens, rel=1e-5)
    assert set(found[8]["rate_gaps"]) == set(found[8]["firing_rates"]) and len(found[8]["rate_gaps"]) == 13


def test_rate_accuracy() -> None:
    model, right = bert(), 0
    with torch.no_grad():
        for row in rows():
            right += int(model(torch.tensor([row["input_ids"]])).logits.argmax() == row["labels"])
    assert rate_accuracy(model, rows(), batch_size=4) == right / 11


def test_an_empty_split() -> None:
    with pytest.raises(SpikelmError, match="no sentence to evaluate on: the split is empty"):
        rate_accuracy(bert(), [])
