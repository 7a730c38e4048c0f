"""The estimate for a SpikingBert against a count by hand."""

import pytest
import torch

from spikelm.energy import estimate_encoder
from spikelm.errors import SpikelmError
from tests.small_models import spikingbert


def rates(value: float) -> dict[str, float]:
    return dict.fromkeys(spikingbert().bert.populations().values(), value)


def test_terms_by_hand() -> None:
    """2 layers, d 32, MLP 64, 4 heads; 10 tokens, T = 5, every rate 0.1."""
    found = estimate_encoder(spikingbert().config, rates(0.1), 5, 10.0)
    terms = found["terms"]
    macs = {name: term["mac"] for name, term in terms.items() if term["mac"]}
    assert macs == {
        "query, key and value": 2 * 3 * 32 * 32,
        "query k^T": 2 * 10 * 32,
        "softmax v": 2 * 10 * 32,
        "attention output": 2 * 32 * 32,
        "intermediate": 2 * 32 * 64,
        "output": 2 * 64 * 32,
    }
    for name, mac in macs.items():
        assert terms[name]["accumulations"] == pytest.approx(mac * 5 * 0.1)
    real = 2 * (4 * 10 + 6 * 32 + 64)
    assert sum(terms[name]["dense_multiplications"] for name in ("softmax", "LayerNorm", "GELU")) == real
    neurons = 2 * (5 * 32 + 64) + 32
    assert terms["neurons"]["accumulations"] == pytest.approx(5 * neurons * 1.1)
    total, added = sum(macs.values()), 2 * (7 * 32 + 64)
    assert terms["biases and sums"]["dense_additions"] == added
    assert found["dense_pj"] == pytest.approx(4.6 * total + 0.9 * added + 3.7 * real)
    assert found["spiking_pj"] == pytest.approx(0.9 * (0.5 * total + 5 * (neurons * 1.1 + added)) + 3.7 * 5 * real)
    assert found["projections_benefit"] == pytest.approx(4.6 / (0.9 * 0.5))
    assert found["break_even"] == pytest.approx(5.11, abs=0.01) and found["T_times_rate"]["input_neuron"] == 0.5


def test_scales_of_quantised_weights_are_multiplied_at_every_step() -> None:
    """Of all projections but key and value, or of all six where nothing is folded."""
    plain = estimate_encoder(spikingbert().config, rates(0.1), 5, 10.0)
    for fold_scale, scaled in ((True, 3 * 32 + 64), (False, 5 * 32 + 64)):
        config = spikingbert(weights="ternary", fold_scale=fold_scale).config
        found = estimate_encoder(config, rates(0.1), 5, 10.0)
        assert found["spiking_pj"] - plain["spiking_pj"] == pytest.approx(3.7 * 5 * 2 * scaled)
        assert found["dense_pj"] == plain["dense_pj"]


def test_the_honest_total_says_when_it_is_worse() -> None:
    config = spikingbert().config
    assert estimate_encoder(config, rates(0.01), 2, 10.0)["verdict"] == "better than dense"
    many = estimate_encoder(config, rates(0.02), 100, 10.0)
    assert many["projections_benefit"] > 1 > many["benefit"] and many["verdict"] == "worse than dense"


def test_rates_of_a_model_fit() -> None:
    model = spikingbert()
    with torch.no_grad():
        measured = model(torch.ones(1, 5, dtype=torch.long), output_rates=True).firing_rates
    assert estimate_encoder(model.config, {name: float(rate) for name, rate in measured.items()}, 8, 5.0)["benefit"] > 0


def test_bad_input() -> None:
    config = spikingbert().config
    with pytest.raises(SpikelmError, match="firing_rates has no population 'layers.0.key_neuron'"):
        estimate_encoder(config, {"input_neuron": 0.1}, 4, 10.0)
    with pytest.raises(SpikelmError, match=r"firing rates must be within \[0, 1\]; layers.0.key_neuron has 1.5"):
        estimate_encoder(config, rates(1.5), 4, 10.0)
    with pytest.raises(SpikelmError, match="T must be >= 1 and length > 0; got 0 and 10"):
        estimate_encoder(config, rates(0.1), 0, 10.0)
