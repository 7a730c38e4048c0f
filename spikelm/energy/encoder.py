"""An estimate of what one token costs a SpikingBert, with everything that runs at every step, against a dense BERT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spikelm.energy.costs import CostTable, cost_table
from spikelm.errors import SpikelmError


def estimate_encoder(
    config: Any, firing_rates: Mapping[str, float], T: int, length: float, costs: str | CostTable = "45nm-fp32"
) -> dict[str, Any]:
    """Energy of one token of a sentence of ``length`` tokens in the layers of a SpikingBert, against the same BERT.

    A projection of in * out multiply-accumulates (MAC) takes MAC * T * rate accumulations, rate that of its inputs;
    query k^T and softmax(.) v likewise, for k and v spike. What stays real runs T times: softmax, LayerNorm and GELU,
    counted as 1 multiplication a score, 3 an element and 1 an element (a lower bound: exp and erf take more), and so
    do biases and residual sums; the scale of quantised weights is multiplied at every step, but for key and value,
    whose neurons take it in. Every neuron adds once, and once more where it fires. Embedding, pooler, classifier,
    feedback and moving data are left out on both sides.

    Args:
        firing_rates: population -> spikes per neuron, token and step, e.g. of `spiking_accuracy`.
        length: mean tokens of a sentence, > 0.

    Returns:
        JSON types: "terms" by name (dense mac, additions and multiplications; spiking accumulations, which are
        additions too, and multiplications);
        "T_times_rate" by population (an accumulation pays below mac / accumulation of the table, "break_even");
        "dense_pj", "spiking_pj", "benefit" (dense over spiking), "projections_benefit" (the products alone, as the
        papers count) and "verdict".
    """
    table = cost_table(costs)
    if T < 1 or not length > 0:
        raise SpikelmError(f"T must be >= 1 and length > 0; got {T} and {length}")
    terms = _terms(config, _by_place(config, firing_rates), T, length)
    multiplication = table.mac if table.multiplication is None else table.multiplication
    products = [term for term in terms.values() if term["mac"]]
    dense = sum(
        table.mac * term["mac"]
        + table.accumulation * term["dense_additions"]
        + multiplication * term["dense_multiplications"]
        for term in terms.values()
    )
    spiking = sum(
        table.accumulation * term["accumulations"] + multiplication * term["multiplications"] for term in terms.values()
    )
    added = table.accumulation * sum(term["accumulations"] for term in products)
    return {
        "estimate": "not measured on hardware",
        "per": f"token of a sentence of {length:.1f} tokens",
        "T": T,
        "costs": asdict(table),
        "terms": terms,
        "T_times_rate": {name: T * rate for name, rate in firing_rates.items()},
        "break_even": table.mac / table.accumulation,
        "dense_pj": dense,
        "spiking_pj": spiking,
        "benefit": dense / spiking,
        "projections_benefit": table.mac * sum(term["mac"] for term in products) / added if added else None,
        "verdict": "better than dense" if spiking < dense else "worse than dense",
    }


def _by_place(config: Any, firing_rates: Mapping[str, float]) -> dict[str, list[float]]:
    """Rates of each place of a layer, a layer each; "input" is the population that enters the layer."""
    places = ("key", "value", "context", "attention", "intermediate", "output")
    layers = range(config.num_hidden_layers)
    try:
        rates = {p: [_rate(firing_rates, f"layers.{layer}.{p}_neuron") for layer in layers] for p in places}
        entering = _rate(firing_rates, "input_neuron")
    except KeyError as error:
        raise SpikelmError(f"firing_rates has no population {error}; it has {', '.join(firing_rates)}") from error
    return rates | {"input": [entering, *rates["output"][:-1]]}


def _rate(firing_rates: Mapping[str, float], name: str) -> float:
    rate = firing_rates[name]
    if not 0 <= rate <= 1:
        raise SpikelmError(f"firing rates must be within [0, 1]; {name} has {rate}")
    return rate


def _terms(config: Any, rates: Mapping[str, list[float]], T: int, length: float) -> dict[str, dict[str, float]]:
    size, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    layers = config.num_hidden_layers
    products = {  # name: (MAC of a layer, the spikes that enter)
        "query, key and value": (3 * size * size, "input"),
        "query k^T": (length * size, "key"),
        "softmax v": (length * size, "value"),
        "attention output": (size * size, "context"),
        "intermediate": (size * wide, "attention"),
        "output": (wide * size, "intermediate"),
    }
    terms = {
        name: _term(mac=layers * mac, accumulations=mac * T * sum(rates[place]))
        for name, (mac, place) in products.items()
    }
    every_step = {"softmax": heads * length, "LayerNorm": 2 * 3 * size, "GELU": wide}
    for name, count in every_step.items():
        terms[name] = _term(dense_multiplications=layers * count, multiplications=layers * count * T)
    added = layers * (5 * size + wide + 2 * size)  # biases of six projections, two residual sums
    terms["biases and sums"] = _term(dense_additions=added, accumulations=added * T)
    if config.weights != "float":
        scaled = 3 * size + wide + (0 if config.fold_scale else 2 * size)
        terms["scales of the weights"] = _term(multiplications=layers * scaled * T)
    width = {place: wide if place == "intermediate" else size for place in rates}
    fired = sum(width[place] * rate for place, found in rates.items() if place != "input" for rate in found)
    neurons = layers * sum(width[place] for place in rates if place != "input") + size  # and the input's own
    terms["neurons"] = _term(accumulations=T * (neurons + fired + size * rates["input"][0]))
    return terms


def _term(
    mac: float = 0,
    dense_additions: float = 0,
    dense_multiplications: float = 0,
    accumulations: float = 0,
    multiplications: float = 0,
) -> dict[str, float]:
    return {
        "mac": mac,
        "dense_additions": dense_additions,
        "dense_multiplications": dense_multiplications,
        "accumulations": accumulations,
        "multiplications": multiplications,
    }
