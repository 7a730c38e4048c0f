"""deploy: the model computes what it computed, without a multiplication behind its neurons."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spikelm import Recipe, calibrate, deploy, spikify
from spikelm.convert import recipe_of, spike_sites
from spikelm.deploy import FORMS, packed_storage, storage_line
from spikelm.energy import OperationCounter
from spikelm.errors import SpikelmError
from spikelm.evaluate import firing_statistics
from spikelm.layers import BitLinear, GatherLinear, SpikingLinear, TernaryLinear
from spikelm.neurons import ATMN, TILIF
from tests.small_models import llamba, mamba2

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Recipe]] = {
    "mamba2-TILIF": (mamba2, Recipe.preset("spikingmamba", D=4)),
    "mamba2-ATMN": (mamba2, Recipe.preset("spikingmamba", neuron="ATMN", T=4)),
    "llamba-ATMN": (llamba, Recipe.preset("mar", T=4)),
    "llamba-TILIF": (llamba, Recipe.preset("mar", neuron="TILIF", D=4, sgc="gradient", learn_threshold=True)),
}
LAYERS = {"gather": GatherLinear, "ternary": TernaryLinear}
each_form = pytest.mark.parametrize("form", LAYERS)
IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def calibrated(name: str) -> PreTrainedModel:
    make, recipe = MODELS[name]
    model = spikify(make(), recipe)
    calibrate(model, [{"input_ids": IDS}])
    return model


def cached_logits(model: PreTrainedModel, prompt: int) -> torch.Tensor:
    """Logits of IDS, the first ``prompt`` tokens at once and the others one by one from the cache."""
    outputs = model(IDS[:, :prompt], use_cache=True)
    logits = [outputs.logits]
    cache = "cache_params" if hasattr(outputs, "cache_params") else "past_key_values"
    for token in IDS[:, prompt:].split(1, dim=1):
        outputs = model(token, use_cache=True, **{cache: outputs[cache]})
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_training_form_does(name: str) -> None:
    model = calibrated(name)
    rates = firing_statistics(model, [{"input_ids": row} for row in IDS.tolist()])["sites"]
    assert all(site["sum_of_rates"] > 0.1 for site in rates.values())
    with torch.no_grad():
        expected = model(IDS).logits
    scale = expected.abs().max()
    for form, accumulate_dtype in (("gather", None), ("ternary", None), ("ternary", torch.float64)):
        deployed = deploy(copy.deepcopy(model), form, accumulate_dtype)
        logits = deployed(IDS).logits  # asks for no gradient, and needs no torch.no_grad
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < 1e-5 * scale
        assert (cached_logits(deployed, 5) - logits).abs().max() < 1e-5 * scale
    model = model.double()  # but transformers' Mamba2 keeps its scan in float32
    with torch.no_grad():
        expected = model(IDS).logits
    for form in LAYERS:
        logits = deploy(copy.deepcopy(model), form)(IDS).logits
        assert (logits - expected).abs().max() < (1e-5 if "mamba2" in name else 1e-13) * scale


@each_form
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_the_same(name: str, form: str) -> None:
    model = calibrated(name)
    deployed = deploy(copy.deepcopy(model), form)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text, expected = deployed.generate(IDS, **settings), model.generate(IDS, **settings)
    assert torch.equal(text, expected)
    assert text.shape == (3, 28)
    assert len({tuple(row.tolist()) for row in text[:, 12:]}) > 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_multiplication_behind_a_neuron(name: str, context: Callable[[], object]) -> None:
    model = calibrated(name)
    deployed = deploy(copy.deepcopy(model), "ternary")
    for tokens in ("prefill", "decode"):
        with context():
            cache = deployed(IDS, use_cache=True)
            arguments = {key: cache[key] for key in ("cache_params", "past_key_values") if key in cache}
            with OperationCounter(deployed) as counter:
                deployed(IDS) if tokens == "prefill" else deployed(IDS[:, :1], use_cache=True, **arguments)
        assert counter.operators("unknown") == {}
        assert counter.number("multiplication") > 0  # the scan
        for site, layer in deployed.named_modules():
            if isinstance(layer, TernaryLinear):
                for kind in ("multiplication", "function", "neuron"):
                    assert counter.operators(kind, site, below=False) == {}
                assert counter.number("accumulation", site, below=False) > 0
    with context(), OperationCounter(model) as counter:
        model(IDS)
    site = next(iter(spike_sites(model)))
    assert counter.operators("multiplication", site, below=False) == {"aten::mm": 1}


@each_form
def test_every_projection_is_replaced_and_nothing_trains(form: str) -> None:
    model = calibrated("llamba-TILIF").train()
    tensors = copy.deepcopy(model.state_dict())
    shapes = {name: layer.weight.shape for name, layer in model.named_modules() if isinstance(layer, SpikingLinear)}
    deployed = deploy(model, form)
    assert deployed is model
    assert {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, LAYERS[form])} == shapes
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    neurons = [module for module in model.modules() if isinstance(module, TILIF)]
    assert len(neurons) == len(spike_sites(model)) == 8
    assert all(neuron.sgc is None for neuron in neurons)
    assert model.backbone.layers[0].mlp.up_proj.neuron is model.backbone.layers[0].mlp.gate_proj.neuron
    state = model.state_dict()
    assert list(state) == list(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@each_form
def test_it_takes_the_tensors_of_a_training_checkpoint(form: str) -> None:
    trained = calibrated("mamba2-TILIF")
    deployed = deploy(spikify(mamba2(), MODELS["mamba2-TILIF"][1]), form)  # not calibrated
    expected = trained(IDS).logits.detach()
    assert not torch.allclose(deployed(IDS).logits, expected, atol=1e-3)
    deployed.load_state_dict(trained.state_dict())
    torch.testing.assert_close(deployed(IDS).logits, expected)


@each_form
@pytest.mark.parametrize("name", ["mamba2-TILIF", "llamba-ATMN"])
def test_an_empty_batch(name: str, form: str) -> None:
    deployed = deploy(calibrated(name), form)
    site = next(layer for layer in deployed.modules() if isinstance(layer, LAYERS[form]))
    assert site(torch.zeros(0, 12, 32)).shape == (0, 12, site.out_features)


@each_form
def test_a_silent_model_runs(form: str) -> None:
    model = calibrated("mamba2-TILIF")
    for owner in spike_sites(model).values():
        owner.neuron.v_threshold = 1e6
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(deploy(model, form)(IDS).logits, expected)


@each_form
def test_firing_statistics_are_those_of_the_training_form(form: str) -> None:
    rows, model = [{"input_ids": row} for row in IDS.tolist()], calibrated("llamba-ATMN")
    expected = firing_statistics(model, rows)
    assert firing_statistics(deploy(model, form), rows) == expected


@each_form
def test_a_projection_under_two_names_stays_one(form: str) -> None:
    block = nn.Module()
    block.first = SpikingLinear.from_linear(nn.Linear(6, 6), ATMN(num_channels=6))
    block.second = block.first
    deploy(block, form)
    assert isinstance(block.first, LAYERS[form])
    assert block.second is block.first


@each_form
def test_an_owner_that_comes_after_those_it_shares_with(form: str) -> None:
    recipe = Recipe({"mlp": ("*.mlp.up_proj", "*.mlp.gate_proj")})
    model = spikify(llamba(), recipe)
    assert model.backbone.layers[0].mlp.up_proj.owns_neuron
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(deploy(model, form)(IDS).logits, expected)
    assert model.backbone.layers[0].mlp.gate_proj.neuron is model.backbone.layers[0].mlp.up_proj.neuron


@each_form
def test_calibration_comes_before(form: str) -> None:
    deployed = deploy(spikify(mamba2(), "spikingmamba"), form)
    expected = deployed(IDS).logits
    with pytest.raises(SpikelmError, match="this one is calibrated or deployed already"):
        calibrate(deployed, [{"input_ids": IDS}])
    assert torch.equal(deployed(IDS).logits, expected)


def refused(model: nn.Module, message: str, **arguments: object) -> None:
    """deploy raises, and has changed nothing."""
    before = {name: (module, module.training) for name, module in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(SpikelmError, match=message):
        deploy(model, **arguments)
    assert {name: (module, module.training) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_what_it_refuses() -> None:
    refused(llamba().train(), "deploy takes a spiking model: spikify")
    model = spikify(llamba(), "mar").train()
    refused(model, f"form must be one of {', '.join(FORMS)}; got 'int8'", form="int8")
    refused(
        model,
        "layers.0.mixer.in_proj: accumulate_dtype must be None or .* got torch.int64",
        form="ternary",
        accumulate_dtype=torch.int64,
    )
    refused(model.backbone.layers[0].mlp.up_proj, "shares the neurons of a projection outside of the model")
    binary = spikify(llamba(), Recipe.preset("mar", tau=0.5, frame_weight=0.5)).train()
    refused(
        binary,
        "layers.0.mixer.in_proj: .* frame_weight 1; got 0.5, by which every frame would have to be multiplied",
        form="ternary",
    )
    last = list(spike_sites(model).values())[-1]
    last.neuron.frame_weight = 0.5  # found before anything is replaced
    refused(model, "layers.1.mlp.down_proj: .* frame_weight 1; got 0.5", form="ternary")
    last.neuron.frame_weight = 1.0
    last.spiking = False
    refused(model, r"layers.1.mlp.down_proj passes its input through \(spiking is False\)")
    last.spiking = True
    refused(model, 'accumulate_dtype is of form="ternary"', accumulate_dtype=torch.float64)
    refused(model, """weights must be None or, with form="gather", "int8"; got 'int4'""", weights="int4")
    refused(
        model,
        """head must be None or, with form="gather", "int8"; got 'int8' with 'ternary'""",
        form="ternary",
        head="int8",
    )
    refused(deploy(model), "deployed already: backbone.layers.0.mixer.in_proj is a GatherLinear", form="ternary")


def quantised(name: str, weights: str = "ternary", per_row: bool = False) -> PreTrainedModel:
    make, recipe = MODELS[name]
    model = spikify(make(), replace(recipe, weights=weights, per_row=per_row))
    calibrate(model, [{"input_ids": IDS}])
    return model


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weights", ["binary", "ternary"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_change_nothing(name: str, weights: str, per_row: bool) -> None:
    model = quantised(name, weights, per_row)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        stepwise = cached_logits(model, 5)
    packed = deploy(copy.deepcopy(model), "packed")
    layers = [module for module in packed.modules() if isinstance(module, SpikingLinear)]
    assert all(type(layer) is SpikingLinear and layer.packed for layer in layers)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert recipe_of(packed).deployed == {"form": "packed"}
    assert torch.equal(packed(IDS).logits, expected)
    assert torch.equal(cached_logits(packed, 5), stepwise)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(packed.generate(IDS, **settings), model.generate(IDS, **settings))
    half, packed = model.to(torch.bfloat16), deploy(copy.deepcopy(model).to(torch.bfloat16), "packed")
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, half(IDS).logits)


def test_bit_linears_without_neurons_are_packed_too() -> None:
    model = nn.Sequential(BitLinear(6, 70), nn.ReLU(), nn.Linear(70, 3))
    model.config = SimpleNamespace(packed=False)
    model.append(model[0])  # under two names
    expected = model[:3](torch.ones(2, 6)).detach()
    assert deploy(model, "packed") is model
    assert model[0].packed and model[3] is model[0] and model.config.packed
    assert torch.equal(model[:3](torch.ones(2, 6)), expected)
    plain = nn.Sequential(BitLinear(6, 70))
    plain.config = SimpleNamespace()
    deploy(plain, "packed")
    assert not hasattr(plain.config, "packed")


@pytest.mark.parametrize("per_row", [False, True])
def test_students_of_eight_bit_keep_their_scales(per_row: bool, tmp_path: Path) -> None:
    model = quantised("llamba-ATMN", "int8", per_row)
    with torch.no_grad():
        expected = model(IDS).logits
    for form in ({}, {"weights": "int8"}):
        deployed = deploy(copy.deepcopy(model), **form)
        torch.testing.assert_close(deployed(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert recipe_of(deployed).per_row is per_row
    deployed = deploy(deploy(copy.deepcopy(model), "packed"), weights="int8")
    deployed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, deployed(IDS).logits)


def test_what_packing_refuses() -> None:
    none = 'form="packed" takes binary or ternary weights, of which the model has none: spikify'
    refused(llamba().train(), none, form="packed")
    refused(spikify(llamba(), "mar").train(), none, form="packed")
    model = quantised("llamba-ATMN").train()
    message = "accumulate_dtype is of form=\"ternary\"; got torch.float64 with form='packed'"
    refused(model, message, form="packed", accumulate_dtype=torch.float64)
    refused(
        model,
        'layers.0.mixer.in_proj: the ternary form takes float weights; got ternary ones, .* form="packed"',
        form="ternary",
    )
    refused(model, "in_proj: weights='int8' takes float weights; these are ternary", weights="int8")
    deploy(model, "packed")
    refused(model, "the model is deployed already: backbone.layers.0.mixer.in_proj is packed", form="packed")
    refused(model, "in_proj: the model is deployed already: its weights are packed", form="ternary")
    with pytest.raises(SpikelmError, match="this one is calibrated or deployed already"):
        calibrate(model, [{"input_ids": IDS}])


def test_what_a_packed_model_takes_on_the_disk() -> None:
    model = quantised("llamba-ATMN").train()
    storage = packed_storage(model)
    layers = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    assert storage["trained"]["matrices"] == sum(4 * layer.in_features * layer.out_features for layer in layers)
    packed = sum(16 * layer.in_features * -(-layer.out_features // 64) + 4 for layer in layers)
    assert storage["packed"]["matrices"] == packed
    saved = storage["trained"]["matrices"] - packed
    assert abs(storage["trained"]["file"] - storage["packed"]["file"] - saved) < 4096  # the names of the tensors
    assert model.training and not layers[0].packed
    assert f"{storage['packed']['file']:,}" in storage_line(storage)
    assert packed_storage(calibrated("llamba-ATMN")) == {}
