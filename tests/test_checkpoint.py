"""Spiking models through save_pretrained and from_pretrained."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from spikelm import Recipe, calibrate, deploy, spikify
from spikelm.checkpoint import SpikingConfig
from spikelm.convert import recipe_of, spike_sites
from spikelm.errors import SpikelmError
from spikelm.layers import SpikingLinear, TernaryLinear
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import llamba, mamba2


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def spiking_llamba(**neuron_arguments: object) -> LlambaForCausalLM:
    """The arguments are those of Recipe.preset."""
    model = llamba()
    spikify(model, Recipe.preset("mar", **neuron_arguments))
    calibrate(model, [{"input_ids": tokens()}])
    return model


def spiking_mamba2(**arguments: object) -> PreTrainedModel:
    model = mamba2()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() == 2 else 1)  # so that its text varies
    spikify(model, Recipe.preset("spikingmamba", sgc="gradient", **arguments))
    calibrate(model, [{"input_ids": tokens()}])
    return model


def spiking_llama(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    for parameter in tiny_llama.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)  # so that its text varies
    spikify(tiny_llama, Recipe.preset("llama", tau=0.5, frame_weight=0.5))
    calibrate(tiny_llama, [{"input_ids": tokens()}])
    return tiny_llama


def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(tokens(), min_new_tokens=10, max_new_tokens=10, do_sample=False, pad_token_id=0)


LOAD = """
import sys, torch, spikelm
from transformers import AutoModelForCausalLM
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.load(sys.argv[1])
    out = model.generate(ids, min_new_tokens=10, max_new_tokens=10, do_sample=False, pad_token_id=0)
    print(type(model).__name__, out.tolist())
    torch.save(model(ids).logits, directory + "/logits.pt")
"""


def test_a_new_process_gives_the_same_greedy_tokens(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, repository: Path
) -> None:
    models = {
        "llamba": spiking_llamba(tau=0.5, frame_weight=0.5),
        "llama": spiking_llama(tiny_llama),
        "mamba2": spiking_mamba2(),
        "deployed": deploy(spiking_mamba2(), "ternary", torch.float64),
        "packed": deploy(spiking_llamba(weights="binary"), "packed"),
        "packed mamba2": deploy(spiking_mamba2(weights="ternary").to(torch.bfloat16), "packed"),
    }
    torch.save(tokens(), tmp_path / "tokens.pt")
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tokens.pt"), *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for line, model in zip(done.stdout.splitlines(), models.values(), strict=True):
        kind, _, generated = line.partition(" ")
        assert kind == type(model).__name__
        assert json.loads(generated) == greedy(model).tolist()
        assert len(greedy(model)[0, 12:].unique()) > 2
    for name in ("packed", "packed mamba2"):
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), models[name](tokens()).logits)


@pytest.mark.filterwarnings("ignore:.*no kernel for this surrogate")
@pytest.mark.parametrize("learn_threshold", [True, False])
def test_everything_comes_back(tmp_path: Path, learn_threshold: bool) -> None:
    model = spiking_llamba(
        tau=0.5,
        frame_weight=0.5,
        T=3,
        surrogate_function={"name": "Sigmoid", "alpha": 3.0},
        learn_threshold=learn_threshold,
    )
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert recipe_of(loaded).to_dict() == recipe_of(model).to_dict()
    assert recipe_of(loaded).calibrated
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    for name, owner in spike_sites(model).items():
        assert spike_sites(loaded)[name].neuron.extra_repr() == owner.neuron.extra_repr()
    mlp = loaded.backbone.layers[0].mlp
    assert mlp.up_proj.neuron is mlp.gate_proj.neuron


def test_a_second_round_trip(tmp_path: Path) -> None:
    model = spiking_llamba()
    model.save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(SpikelmError, match="calibrated or deployed already"):
        calibrate(again, [{"input_ids": tokens()}])


def test_a_deployed_model_comes_back_deployed(tmp_path: Path) -> None:
    model = deploy(spiking_mamba2(), "ternary", torch.float64)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers = [module for module in loaded.modules() if isinstance(module, SpikingLinear)]
    assert len(layers) == 4
    assert all(type(m) is TernaryLinear and m.accumulate_dtype == torch.float64 for m in layers)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert recipe_of(loaded).to_dict() == recipe_of(model).to_dict()
    assert not loaded.hf_quantizer.is_trainable
    with pytest.raises(SpikelmError, match="spikify takes the training form"):
        spikify(mamba2(), recipe_of(loaded))
    path = tmp_path / "config.json"
    for deployed, message in (
        ({"form": "ternary", "colour": "red"}, "deployed must name form, accumulate_dtype and head; got .*colour"),
        ({"form": "binary"}, "form must be one of gather, ternary, packed; got 'binary'"),
        ({"form": "ternary", "accumulate_dtype": "save"}, "accumulate_dtype must name a dtype of torch; got 'save'"),
    ):
        config = json.loads(path.read_text())
        config["quantization_config"]["recipe"]["deployed"] = deployed
        path.write_text(json.dumps(config))
        with pytest.raises(SpikelmError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_recipe_is_plain_json_in_the_configuration(tmp_path: Path) -> None:
    model = spiking_llamba(tau=0.5)
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "spikelm"
    assert entry["recipe"] == json.loads(json.dumps(recipe_of(model).to_dict()))
    assert entry["recipe"]["neuron_arguments"] == {"tau": 0.5}


def test_it_trains_after_loading(tmp_path: Path) -> None:
    spiking_llamba().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    Trainer(model, arguments, train_dataset=rows).train()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not unchanged


def saved(directory: Path) -> Path:
    spiking_llamba().save_pretrained(directory)
    return directory / "model.safetensors"


def test_missing_thresholds_are_an_error(tmp_path: Path) -> None:
    """Their memory would be uninitialised."""
    path = saved(tmp_path)
    state = load_file(path)
    del state["backbone.layers.1.mlp.gate_proj.neuron.a"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SpikelmError, match="no thresholds .* for backbone.layers.1.mlp.gate_proj$"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_weights_with_a_recipe_start_at_its_threshold(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.save_pretrained(tmp_path)
    recipe = Recipe.preset("llama", v_threshold=0.5)
    config = SpikingConfig(recipe.to_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = spikify(tiny_llama, recipe)
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    assert all(bool((owner.neuron.v_threshold == 0.5).all()) for owner in spike_sites(model).values())
    calibrate(model, [{"input_ids": tokens()}])


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "absent"])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "header": b"\xff" * 64 + content[64:], "empty": b""}
    path.unlink() if damage == "absent" else path.write_bytes(damaged[damage])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|model\.safetensors|deserializ"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neuron": "Unknown"}, "neuron must be one of .*got 'Unknown'"),
        ({"colour": "red"}, "recipe does not fit this version of spikelm: .*colour"),
        ({"sites": {"x": ["*.absent"]}}, r"pattern '\*.absent' matches no nn.Linear"),
        ({"neuron_arguments": {"tau": 0}}, "tau must be a finite number > 0"),
    ],
)
def test_a_recipe_that_does_not_fit_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["recipe"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(SpikelmError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_model_has_no_recipe(tiny_llama: LlamaForCausalLM) -> None:
    assert recipe_of(tiny_llama) is None
    assert recipe_of(torch.nn.Linear(2, 2)) is None


def test_loading_in_bfloat16(tmp_path: Path) -> None:
    model = spiking_llamba()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(module.weight.dtype == torch.bfloat16 for module in half.modules() if isinstance(module, SpikingLinear))
    assert half(tokens()).logits.dtype == torch.bfloat16
    assert greedy(half).shape == (2, 22)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weights", ["binary", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_model_comes_back_packed(tmp_path: Path, weights: str, per_row: bool, dtype: torch.dtype) -> None:
    trained = spiking_llamba(weights=weights, per_row=per_row).to(dtype)
    trained.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert recipe_of(again).to_dict() == recipe_of(trained).to_dict()
    assert torch.equal(again(tokens()).logits, trained(tokens()).logits) or dtype == torch.float64
    model = deploy(trained, "packed")
    model.save_pretrained(tmp_path / "packed")
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    name = "backbone.layers.0.mlp.up_proj"
    assert f"{name}.weight" not in saved and saved[f"{name}.packed_weight"].dtype == torch.uint8
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    layer = loaded.get_submodule(name)
    assert layer.packed and torch.equal(layer.weight_scale, saved[f"{name}.weight_scale"])
    assert layer.weight_scale.dtype == saved[f"{name}.weight_scale"].dtype != torch.bfloat16
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert recipe_of(loaded).to_dict() == recipe_of(model).to_dict()
    loaded.save_pretrained(tmp_path / "again")
    state = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())


def test_packed_weights_in_another_dtype(tmp_path: Path) -> None:
    model = deploy(spiking_mamba2(weights="ternary"), "packed")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer, full = (m.backbone.layers[0].mixer.in_proj for m in (half, model))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, full.weight_scale)
    assert torch.equal(layer.weight, full.weight.bfloat16())


def test_dense_weights_are_packed_on_the_way(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.save_pretrained(tmp_path)
    recipe = Recipe.preset("llama", weights="ternary")
    config = SpikingConfig(replace(recipe, deployed={"form": "packed"}).to_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = deploy(spikify(tiny_llama, recipe), "packed")
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_a_checkpoint_from_before_the_form_of_weights_loads(tmp_path: Path) -> None:
    model = spiking_llamba()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for field in ("weights", "per_row"):
        del config["quantization_config"]["recipe"][field]
    path.write_text(json.dumps(config))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("packed_weight", "the checkpoint has no packed_weight for backbone.layers.1.mlp.gate_proj"),
        ("weight_scale", "the checkpoint has no weight_scale for backbone.layers.1.mlp.gate_proj"),
        ("bits", r"the checkpoint is damaged: backbone.layers.1.mlp.gate_proj: .* bits that are no ternary code"),
        ("form", "mismatch"),
    ],
)
def test_packed_weights_that_are_not_whole(tmp_path: Path, change: str, message: str) -> None:
    deploy(spiking_llamba(weights="ternary"), "packed").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "backbone.layers.1.mlp.gate_proj."
    state = load_file(path)
    if change == "bits":
        state[name + "packed_weight"][3, 5] = 0xFF
    elif change == "form":
        state[name + "packed_weight"] = state[name + "packed_weight"].repeat(1, 2)
    else:
        del state[name + change]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises((SpikelmError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
