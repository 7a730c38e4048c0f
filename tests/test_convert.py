"""spikify: what it replaces, what it refuses, and that the spiking model converges to the dense one."""

import copy
import json
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from spikelm import Recipe, spikify
from spikelm.convert import PRESETS, fold_threshold, projections_of, spike_sites
from spikelm.errors import SpikelmError
from spikelm.layers import BitLinear, SpikingLinear
from spikelm.neurons import ATMN
from tests.small_models import llamba


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))


def test_mar_puts_neurons_before_every_projection_of_a_block() -> None:
    model = spikify(llamba(), "mar")
    names = [f"backbone.layers.{i}.{name}" for i in range(2) for name in ("mixer.in_proj", "mixer.out_proj")]
    names += [f"backbone.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "down_proj")]
    assert sorted(spike_sites(model)) == sorted(names)
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert dense == {"lm_head"}
    for owner in spike_sites(model).values():
        assert owner.neuron.num_channels == owner.in_features
    gate = model.backbone.layers[0].mlp.gate_proj
    assert projections_of(model, gate) == [gate, model.backbone.layers[0].mlp.up_proj]


def test_llama_keeps_its_attention(tiny_llama: LlamaForCausalLM) -> None:
    before = tiny_llama(tokens()).logits
    model = spikify(tiny_llama, "llama")
    assert model is tiny_llama
    assert len(spike_sites(model)) == 8
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.neuron is attention.k_proj.neuron is attention.v_proj.neuron
    assert attention.o_proj.owns_neuron
    for layer in model.modules():
        if isinstance(layer, SpikingLinear):
            layer.spiking = False
    assert torch.equal(model(tokens()).logits, before)


def test_neuron_arguments_reach_every_bank() -> None:
    recipe = Recipe.preset(
        "mar",
        tau=0.5,
        frame_weight=0.5,
        T=3,
        v_threshold=0.25,
        detach_reset=True,
        surrogate_function={"name": "Sigmoid", "alpha": 3.0},
    )
    for owner in spike_sites(spikify(llamba(), recipe)).values():
        neuron = owner.neuron
        assert (neuron.tau, neuron.frame_weight, neuron.T, neuron.detach_reset) == (0.5, 0.5, 3, True)
        torch.testing.assert_close(neuron.v_threshold, torch.full((owner.in_features,), 0.25))
        assert type(neuron.surrogate_function).__name__ == "Sigmoid"
        assert neuron.surrogate_function.alpha == 3.0


def test_a_plain_torch_model() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    spikify(model, Recipe({"first": ["0"]}))
    assert [type(module) for module in model] == [SpikingLinear, nn.ReLU, nn.Linear]
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].neuron.a.grad.shape == (4,)


def test_recipe_survives_json() -> None:
    recipe = Recipe.preset("mar", tau=0.5, surrogate_function="ATan")
    again = Recipe(**json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()
    assert sorted(spike_sites(spikify(llamba(), again))) == sorted(spike_sites(spikify(llamba(), recipe)))


REFUSED = {
    "matches nothing": (
        Recipe({"a": ["*.mixer.in_proj"], "b": ["*.mixer.q_proj"]}),
        r"site 'b': pattern '\*.mixer.q_proj' matches no nn.Linear; the model has .*in_proj",
    ),
    "no Linear": (Recipe({"a": ["*.mixer.conv1d"]}), "matches no nn.Linear"),
    "claimed twice": (
        Recipe({"a": ["*.in_proj"], "b": ["*.1.mixer.*_proj"]}),
        "sites 'a' and 'b' both claim backbone.layers.1.mixer.in_proj",
    ),
    "no common size": (Recipe({"a": ["*.mlp.*_proj"]}), r"site 'a': .*no common input size: \[32, 48\]"),
    "neuron argument": (Recipe.preset("mar", beta=0.9), "neuron_arguments .*'beta': 0.9.* do not fit ATMN"),
    "neuron range": (Recipe.preset("mar", tau=-1.0), "tau must be a finite number > 0; got -1.0"),
    "surrogate": (
        Recipe.preset("mar", surrogate_function="Heaviside"),
        "spikingjelly's surrogate module; got 'Heaviside'",
    ),
    "surrogate argument": (
        Recipe.preset("mar", surrogate_function={"name": "ATan", "slope": 1}),
        "do not fit ATMN.*slope",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_recipe_leaves_the_model_unchanged(case: str) -> None:
    recipe, message = REFUSED[case]
    model = llamba()
    before, modules = model(tokens()).logits, dict(model.named_modules())
    with pytest.raises(SpikelmError, match=message):
        spikify(model, recipe)
    assert dict(model.named_modules()) == modules
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(model(tokens()).logits, before)


def test_recipes_that_cannot_be() -> None:
    with pytest.raises(SpikelmError, match="the recipe presets are mar, llama, spikingmamba; got 'rwkv'"):
        spikify(llamba(), "rwkv")
    with pytest.raises(SpikelmError, match="neuron must be one of .*ATMN.*; got 'LIF'"):
        Recipe.preset("mar", neuron="LIF")
    for sites in ({}, {"a": []}, {"a": "*.in_proj"}):
        with pytest.raises(SpikelmError, match="sites must map at least one site name to a non-empty list"):
            Recipe(sites)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_quantised_weights(weights: str, per_row: bool) -> None:
    dense = llamba()
    recipe = Recipe.preset("mar", weights=weights, per_row=per_row, v_threshold=0.1)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))).to_dict() == recipe.to_dict()
    model = spikify(copy.deepcopy(dense), recipe)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}
    assert len(layers) == 10
    assert all((layer.weights, layer.per_row) == (weights, per_row) for layer in layers.values())
    assert list(model.state_dict().keys()) == list(spikify(copy.deepcopy(dense), "mar").state_dict().keys())
    assert all(torch.equal(layer.weight, dense.get_submodule(name).weight) for name, layer in layers.items())
    model(tokens(), labels=tokens()).loss.backward()
    assert all(bool(layer.weight.grad.abs().sum() > 0) for layer in layers.values())


def test_recipes_of_weights_that_cannot_be() -> None:
    with pytest.raises(SpikelmError, match="weights must be one of float, binary, ternary, int8; got 'int4'"):
        Recipe.preset("mar", weights="int4")
    for per_row in (True, 1):
        with pytest.raises(SpikelmError, match=f"per_row must be a bool, .*; got {per_row} with float weights"):
            Recipe.preset("mar", per_row=per_row)


def test_bit_linears_that_are_there_already() -> None:
    recipe = Recipe({"first": ["0"]}, weights="ternary")
    model = nn.Sequential(BitLinear(4, 5, weights="ternary"), nn.Linear(5, 3))
    weight = model[0].weight
    assert spikify(model, recipe)[0].weight is weight
    for layer in (BitLinear(4, 5, weights="binary"), BitLinear(4, 5, weights="ternary")):
        if layer.weights == "ternary":
            layer.pack()
        model = nn.Sequential(layer, nn.Linear(5, 3))
        with pytest.raises(SpikelmError, match="0 is a BitLinear, .*; the recipe wants ternary, per_row=False"):
            spikify(model, recipe)
        assert model[0] is layer


def test_twice_is_refused() -> None:
    model = spikify(llamba(), "mar")
    sites = spike_sites(model)
    with pytest.raises(SpikelmError, match="spiking already"):
        spikify(model, "mar")
    assert spike_sites(model) == sites


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_bank_is_computed_once(duplicate: object, checkpointing: bool) -> None:
    model = duplicate(spikify(llamba(), "mar"))
    if checkpointing:
        model.train().activation_checkpointing_enable()
    banks = [owner.neuron for owner in spike_sites(model).values()]
    with mock.patch.object(ATMN, "encode_sum", autospec=True, side_effect=ATMN.encode_sum) as encode_sum:
        loss = model(tokens(), labels=tokens()).loss
        called = [call.args[0] for call in encode_sum.call_args_list]
        loss.backward()
    assert sorted(map(id, called)) == sorted(map(id, banks))
    most = 2 if checkpointing else 1
    assert all(sum(call.args[0] is bank for call in encode_sum.call_args_list) <= most for bank in banks)
    assert all(bool(bank.a.grad.abs().sum() > 0) for bank in banks)


def test_a_copy_is_independent() -> None:
    model = spikify(llamba(), "mar")
    other = copy.deepcopy(model)
    for owner in spike_sites(other).values():
        owner.neuron.v_threshold = 0.1
    torch.testing.assert_close(model.backbone.layers[0].mlp.up_proj.neuron.v_threshold, torch.ones(32))
    torch.testing.assert_close(other.backbone.layers[0].mlp.up_proj.neuron.v_threshold, torch.full((32,), 0.1))


def test_folding_moves_the_threshold_into_the_weights() -> None:
    model = spikify(llamba(), "mar")
    mlp, other = model.backbone.layers[0].mlp, model.backbone.layers[1].mlp.gate_proj.weight.clone()
    V = torch.linspace(0.1, 2.0, 32)
    before = [layer.weight.detach().clone() for layer in (mlp.gate_proj, mlp.up_proj)]
    down = mlp.down_proj.weight.clone()
    fold_threshold(model, mlp.gate_proj, V)
    torch.testing.assert_close(mlp.gate_proj.neuron.v_threshold, V)
    assert torch.equal(mlp.gate_proj.weight, before[0] * V)
    assert torch.equal(mlp.up_proj.weight, before[1] * V)
    assert torch.equal(mlp.down_proj.weight, down)
    assert torch.equal(model.backbone.layers[1].mlp.gate_proj.weight, other)


def test_no_threshold_is_folded_into_packed_weights() -> None:
    model = spikify(llamba(), Recipe.preset("mar", weights="ternary"))
    owner = model.backbone.layers[0].mlp.gate_proj
    model.backbone.layers[0].mlp.up_proj.pack()
    with pytest.raises(SpikelmError, match="are packed: no threshold can be folded"):
        fold_threshold(model, owner, torch.ones(32))


def largest_inputs(model: nn.Module, ids: torch.Tensor) -> float:
    """The largest |x| before any projection of a block, in the dense model."""
    largest = []
    handles = [
        module.register_forward_pre_hook(lambda module, arguments: largest.append(arguments[0].abs().max().item()))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return max(largest)


@torch.no_grad()
def test_conversion_converges() -> None:
    """With T V above the largest input the code is V floor(|x| / V), so the logits' error is of the order of V."""
    dense = llamba().double()
    ids = tokens(4, 24)
    exact, top = dense(ids).logits, largest_inputs(dense, ids)
    sizes, distances = [2.0**-k for k in range(3, 8)], []
    for V in sizes:
        model = spikify(copy.deepcopy(dense), "mar").double()
        for owner in spike_sites(model).values():
            owner.neuron.T = math.ceil(2 * top / V) + 1  # twice, for what the coding error adds downstream
            fold_threshold(model, owner, torch.full((owner.in_features,), V, dtype=torch.float64))
        distances.append((model(ids).logits - exact).norm().item())
    assert distances == sorted(distances, reverse=True)
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, distances))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 0.8 < slope.item() < 1.2


def test_presets_have_their_papers_neurons_and_survive_json() -> None:
    neurons = {"mar": ("ATMN", 4), "llama": ("ATMN", 4), "spikingmamba": ("TILIF", 2)}
    assert {name: (recipe.neuron, len(recipe.sites)) for name, recipe in PRESETS.items()} == neurons
    for recipe in PRESETS.values():
        assert Recipe(**recipe.to_dict()) == replace(recipe, sites=recipe.to_dict()["sites"])
