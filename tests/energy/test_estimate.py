"""estimate: the papers' figures for mamba2-1.3b, the counts of an executed model, and what it refuses."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from spikelm import Recipe, calibrate, deploy, spikify
from spikelm.convert import spike_sites
from spikelm.energy import COSTS, CostTable, OperationCounter, estimate
from spikelm.errors import SpikelmError
from spikelm.evaluate import firing_statistics
from spikelm.layers import TernaryLinear
from tests.small_models import llamba, mamba2

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row} for row in IDS.tolist()]


def firing(model: nn.Module, rate: float) -> dict[str, Any]:
    """The same rate at every site."""
    return {"sites": {name: {"sum_of_rates": rate} for name in spike_sites(model)}}


@pytest.fixture(scope="module")
def mamba2_1_3b() -> Mamba2ForCausalLM:
    """state-spaces/mamba2-1.3b without its weights."""
    config = Mamba2Config(
        hidden_size=2048,
        num_hidden_layers=48,
        state_size=128,
        num_heads=64,
        head_dim=64,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        vocab_size=50288,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    return spikify(model, "spikingmamba")


def test_the_terms_of_mamba2_1_3b(mamba2_1_3b: Mamba2ForCausalLM) -> None:
    terms = estimate(mamba2_1_3b, firing(mamba2_1_3b, 1.0))["terms"]
    giga = {name: term["mac"] / 1e9 for name, term in terms.items()}
    assert giga["spiking projections"] == pytest.approx(1.239, rel=0.01)
    assert giga["scan"] == pytest.approx(0.075, rel=0.01)
    assert giga["head"] == pytest.approx(0.103, rel=0.01)
    assert round(giga["convolutions"], 4) == 0.0008
    assert giga["dense projections"] == 0
    assert terms["spiking projections"]["accumulations"] == terms["spiking projections"]["mac"]
    assert all(term["accumulations"] is None for name, term in terms.items() if name != "spiking projections")


def test_the_rates_behind_the_published_benefit(mamba2_1_3b: Mamba2ForCausalLM) -> None:
    """4.76x needs a mean |s| of 1.07 where projections alone are counted, and 0.49 with everything."""
    alone = estimate(mamba2_1_3b, firing(mamba2_1_3b, 1.07))
    assert alone["projections"]["benefit"] == pytest.approx(4.76, rel=0.01)
    assert alone["projections"]["benefit"] == pytest.approx(4.6 / (0.9 * 1.07))
    assert alone["whole"]["benefit"] < 3.4
    assert estimate(mamba2_1_3b, firing(mamba2_1_3b, 0.49))["whole"]["benefit"] == pytest.approx(4.76, rel=0.01)


@pytest.mark.parametrize("name", ["mamba2", "llamba"])
def test_accumulations_are_those_that_run(name: str) -> None:
    model = spikify(mamba2(), "spikingmamba") if name == "mamba2" else spikify(llamba(), "mar")
    calibrate(model, [{"input_ids": IDS}])
    deployed = deploy(copy.deepcopy(model), "ternary")
    result = estimate(deployed, firing_statistics(deployed, ROWS))
    with torch.no_grad(), OperationCounter(deployed) as counter:
        deployed(IDS, use_cache=False)
    gathered = sum(
        counter.numbers[site, "aten::_embedding_bag_forward_only", "accumulation"]
        for site, layer in deployed.named_modules()
        if isinstance(layer, TernaryLinear)
    )
    assert result["projections"]["accumulations"] * IDS.numel() == pytest.approx(gathered, rel=1e-9)
    assert result == estimate(model, firing_statistics(model, ROWS))  # deployed or not
    dense = mamba2() if name == "mamba2" else llamba()
    with torch.no_grad(), OperationCounter(dense) as counter:
        dense(IDS, use_cache=False)
    matmuls = sum(
        counter.number("multiplication", site) for site, m in dense.named_modules() if isinstance(m, nn.Linear)
    )
    linears = ("spiking projections", "dense projections", "head")
    assert matmuls == IDS.numel() * sum(result["terms"][term]["mac"] for term in linears)


def test_every_projection_of_a_bank_and_every_dense_linear_counts() -> None:
    model = spikify(llamba(), Recipe({"ffn": ("*.mlp.gate_proj", "*.mlp.up_proj")}))
    rates = firing(model, 0.5)
    assert len(rates["sites"]) == 2
    terms = estimate(model, rates)["terms"]
    config = llamba().config
    assert terms["spiking projections"] == {
        "mac": 2 * 2 * 32 * 48,
        "accumulations": 2 * 32 * 48,
        "multiplications": 0,
    }
    mixer = model.backbone.layers[0].mixer
    assert terms["dense projections"]["mac"] == 2 * (32 * mixer.in_proj.out_features + 32 * 32 + 48 * 32)
    assert terms["head"]["mac"] == 32 * config.vocab_size
    assert terms["convolutions"]["mac"] == 2 * 4 * mixer.conv_dim
    assert terms["scan"]["mac"] == 2 * 3 * 32 * 8


def test_the_energies_add_up_and_are_json() -> None:
    model = spikify(mamba2(), "spikingmamba")
    result = json.loads(json.dumps(estimate(model, firing(model, 2.0), "45nm-fp16")))
    assert result["estimate"] == "not measured on hardware"
    assert result["costs"]["name"] == "45nm-fp16"
    assert "Horowitz" in result["costs"]["source"]
    terms = result["terms"]
    spiking = terms.pop("spiking projections")
    rest = 1.5 * sum(term["mac"] for term in terms.values())
    assert result["projections"]["dense_pj"] == pytest.approx(1.5 * spiking["mac"])
    assert result["projections"]["spiking_pj"] == pytest.approx(0.4 * 2 * spiking["mac"])
    assert result["projections"]["sum_of_rates"] == pytest.approx(2.0)
    assert result["whole"]["dense_pj"] == pytest.approx(result["projections"]["dense_pj"] + rest)
    assert result["whole"]["spiking_pj"] == pytest.approx(result["projections"]["spiking_pj"] + rest)
    assert 1 < result["whole"]["benefit"] < result["projections"]["benefit"]


def test_a_silent_model_has_no_benefit_to_name() -> None:
    model = spikify(mamba2(), "spikingmamba")
    result = estimate(model, firing(model, 0.0))
    assert result["projections"]["benefit"] is None
    assert result["whole"]["benefit"] > 1


def test_cost_tables() -> None:
    assert {name: (table.mac, table.accumulation) for name, table in COSTS.items()} == {
        "45nm-fp32": (4.6, 0.9),
        "45nm-fp16": (1.5, 0.4),
        "45nm-int8": (0.23, 0.03),
    }
    assert COSTS["45nm-fp32"].multiplication == 3.7
    assert math.isclose(COSTS["45nm-fp32"].multiplication + COSTS["45nm-fp32"].accumulation, COSTS["45nm-fp32"].mac)
    model = spikify(mamba2(), "spikingmamba")
    own = CostTable("own", mac=2.0, multiplication=None, accumulation=1.0, source="none")
    assert estimate(model, firing(model, 0.5), own)["projections"]["benefit"] == pytest.approx(4.0)


def test_what_it_refuses(tiny_llama: LlamaForCausalLM) -> None:
    model = spikify(mamba2(), "spikingmamba")
    rates = firing(model, 1.0)
    with pytest.raises(SpikelmError, match="costs must be a CostTable or one of 45nm-fp32, .*; got '7nm'"):
        estimate(model, rates, "7nm")
    with pytest.raises(
        SpikelmError, match=r"the model has the sites backbone.layers.0.mixer.in_proj, .*, firing has none"
    ):
        estimate(model, {})
    with pytest.raises(SpikelmError, match="the model has the sites none, firing has backbone"):
        estimate(mamba2(), rates)
    for rate in (math.nan, math.inf, -1.0):
        with pytest.raises(SpikelmError, match=r"every sum_of_rates must be finite and >= 0; got \["):
            estimate(model, firing(model, rate))
    attention = spikify(tiny_llama, "llama")
    with pytest.raises(SpikelmError, match=r"cannot count the mixing of tokens of model.layers.0.*Llama"):
        estimate(attention, firing(attention, 1.0))
    first = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    spikify(first, Recipe({"mixer_in": ("*.mixer.in_proj",)}))
    with pytest.raises(SpikelmError, match=r"cannot count .* of backbone.layers.0.*Mamba"):
        estimate(first, firing(first, 1.0))
    plain = spikify(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(1, 1, 3)}), Recipe({"a": ("a",)}))
    with pytest.raises(
        SpikelmError, match="cannot count the weights weight of b, a Conv2d; counted are nn.Linear, nn.Conv1d"
    ):
        estimate(plain, firing(plain, 1.0))


def test_weighed_frames_cost_multiplications() -> None:
    """MAR's default code: y = sum_t w^t W s_t needs T - 1 scalings per output; without a price for them, MACs."""
    sites = {"ffn": ("*.mlp.gate_proj", "*.mlp.up_proj")}
    plain, weighed = (
        spikify(llamba(), Recipe(sites, neuron_arguments={"T": 4, "frame_weight": weight})) for weight in (1.0, 0.5)
    )
    results = [estimate(model, firing(model, 0.5)) for model in (plain, weighed)]
    assert [r["projections"]["multiplications"] for r in results] == [0, 3 * 2 * 2 * 48]
    more = results[1]["projections"]["spiking_pj"] - results[0]["projections"]["spiking_pj"]
    assert more == pytest.approx(3.7 * 3 * 2 * 2 * 48)
    cheap = [
        estimate(model, firing(model, 0.5), "45nm-int8")["projections"]["spiking_pj"] for model in (plain, weighed)
    ]
    assert cheap[1] - cheap[0] == pytest.approx(0.23 * 3 * 2 * 2 * 48)
