"""The papers' estimate of a spiking model's energy, and the same for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from spikelm.convert import spike_sites
from spikelm.energy.costs import CostTable, cost_table
from spikelm.errors import SpikelmError
from spikelm.layers.discrete_mamba2 import DiscreteMamba2
from spikelm.layers.spiking_linear import SpikingLinear


def estimate(model: nn.Module, firing: Mapping[str, Any], costs: str | CostTable = "45nm-fp32") -> dict[str, Any]:
    """Energy of one token in decode of a spikified (or deployed) Mamba2ForCausalLM or Llamba, against the dense model.

    A projection of in * out multiply-accumulates (MAC) takes MAC * mean sum_t |s_t| accumulations behind its neurons,
    and where frames are weighed (ATMN's frame_weight) one multiplication per output and frame but the first.
    The rest stays dense: other nn.Linear, the head, convolutions, and the scan by its recurrence, 3 MAC per channel
    and state (decay, input, output). Elementwise work is not counted, neither norms, gates and activations nor the
    neurons' own encoding; nor is moving data.

    Args:
        firing: what :func:`spikelm.evaluate.firing_statistics` gives for this model.
        costs: a name in ``spikelm.energy.COSTS``, or a table.

    Returns:
        JSON types: "terms" by name, with "mac" of the dense model and the "accumulations" and "multiplications" that
        replace them (None where the term stays dense); "projections", the spiking ones alone, as the papers count;
        "whole", all terms. "benefit" is the dense energy over the spiking one, None if nothing ever spikes.

    Raises:
        SpikelmError: sites of ``firing`` and model differ, or the model has a token mixer or weights that it cannot
            count.
    """
    table = cost_table(costs)
    terms = _terms(model, _rates(model, firing))
    spiking = terms["spiking projections"]
    return {
        "estimate": "not measured on hardware",
        "per": "token in decode",
        "costs": asdict(table),
        "terms": terms,
        "projections": {
            **spiking,
            "sum_of_rates": spiking["accumulations"] / spiking["mac"],
            **_compare([spiking], table),
        },
        "whole": _compare(list(terms.values()), table),
    }


def _terms(model: nn.Module, rates: dict[nn.Module, float]) -> dict[str, dict[str, Any]]:
    spiking: dict[str, Any] = {"mac": 0, "accumulations": 0.0, "multiplications": 0}
    terms = {"spiking projections": spiking}
    for name in ("dense projections", "head", "convolutions", "scan"):
        terms[name] = {"mac": 0, "accumulations": None, "multiplications": None}
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear):
            mac = module.in_features * module.out_features
            spiking["mac"] += mac
            spiking["accumulations"] += mac * rates[module.neuron]
            if getattr(module.neuron, "frame_weight", 1) != 1:
                spiking["multiplications"] += (module.neuron.T - 1) * module.out_features
        elif isinstance(module, nn.Linear):
            term = "head" if module is output_embeddings else "dense projections"
            terms[term]["mac"] += module.in_features * module.out_features
        elif isinstance(module, nn.Conv1d):  # causal: one output per channel and token
            terms["convolutions"]["mac"] += module.weight.numel()
        elif (size := _state_size(module)) is not None:
            terms["scan"]["mac"] += 3 * size
        else:
            _refuse_what_is_not_counted(name, module)
    return terms


def _rates(model: nn.Module, firing: Mapping[str, Any]) -> dict[nn.Module, float]:
    """The bank of neurons -> mean sum_t |s_t|."""
    sites, measured = spike_sites(model), firing.get("sites", {})
    if not sites or set(sites) != set(measured):
        raise SpikelmError(
            "firing must be firing_statistics of this spiking model; the model has the sites "
            f"{', '.join(sites) or 'none'}, firing has {', '.join(measured) or 'none'}"
        )
    rates: dict[nn.Module, float] = {
        owner.neuron: float(measured[name]["sum_of_rates"]) for name, owner in sites.items()
    }
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates.values()):
        raise SpikelmError(f"every sum_of_rates must be finite and >= 0; got {sorted(rates.values())}")
    return rates


def _state_size(module: nn.Module) -> int | None:
    """Numbers in the recurrent state of a mixer that is known here; else None."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    if isinstance(module, Mamba2Mixer):
        return module.intermediate_size * module.ssm_state_size
    return module.d_inner * module.d_state if isinstance(module, DiscreteMamba2) else None


def _refuse_what_is_not_counted(name: str, module: nn.Module) -> None:
    """A module with a place in the cache must be, or hold, a mixer; weights of two axes multiply something."""
    mixes = hasattr(module, "layer_idx") and all(_state_size(part) is None for part in module.modules())
    matrices = [key for key, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
    if mixes or (matrices and not isinstance(module, nn.Embedding)):
        what = f"the weights {', '.join(matrices)}" if matrices else "the mixing of tokens"
        raise SpikelmError(
            f"cannot count {what} of {name or 'the model'}, a {type(module).__name__}; counted are nn.Linear, "
            "nn.Conv1d and the scans of transformers' Mamba2Mixer and of DiscreteMamba2"
        )


def _compare(terms: list[dict[str, Any]], table: CostTable) -> dict[str, float | None]:
    multiplication = table.mac if table.multiplication is None else table.multiplication
    dense = sum(table.mac * term["mac"] for term in terms)
    spiking = sum(
        table.mac * term["mac"]
        if term["accumulations"] is None
        else table.accumulation * term["accumulations"] + multiplication * term["multiplications"]
        for term in terms
    )
    return {"dense_pj": dense, "spiking_pj": spiking, "benefit": dense / spiking if spiking else None}
