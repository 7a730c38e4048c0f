"""Decoding with a deployed Llamba: a kernel's call for each block computes what the blocks' own forwards do."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikelm import Recipe, calibrate, deploy, spikify, use_backend
from spikelm.cpu import module as cpu_module
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM, decoding, modeling_llamba
from spikelm.neurons.base import set_backend
from tests.small_models import llamba

if reason := cpu_module.unavailable():
    pytest.skip(reason, allow_module_level=True)

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
CODES = {
    "counts": {"T": 4},
    "weighted": {"T": 4, "tau": 0.5, "frame_weight": 0.5},
    "integers": {"neuron": "TILIF", "D": 4},
}


class Used:
    """How often the kernels took a token."""

    def __init__(self) -> None:
        self.steps, self.allowed = 0, True

    def __call__(self, *arguments: Any) -> Any:
        found = decoding.steps_of(*arguments) if self.allowed else None
        self.steps += found is not None
        return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Used]:
    counter = Used()
    monkeypatch.setattr(modeling_llamba, "steps_of", counter)
    yield counter


def student(model: LlambaForCausalLM | None = None, weights: str = "float", **arguments: Any) -> LlambaForCausalLM:
    arguments = arguments or CODES["weighted"]
    found: Any = spikify(model or llamba(), Recipe.preset("mar", weights=weights, **arguments))
    calibrate(found, [{"input_ids": IDS}])
    return found.eval()


def unusual() -> LlambaForCausalLM:
    """Grouped heads, an activated convolution, biases everywhere, sizes that fill no vector."""
    torch.manual_seed(0)
    config = LlambaConfig(
        vocab_size=64, d_model=36, n_layer=2, initializer_range=0.2,
        mlp_cfg={"intermediate_size": 50, "bias": True},
        ssm_cfg={"d_state": 5, "n_v_heads": 6, "n_qk_heads": 2, "expand": 2, "d_conv": 3, "chunk_size": 8}
        | {"activation": "silu", "bias": True},
    )  # fmt: skip
    model = LlambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def stepwise(model: LlambaForCausalLM, ids: torch.Tensor = IDS, prompt: int = 5) -> torch.Tensor:
    """Logits of ids, the first ``prompt`` tokens at once and the others one by one."""
    outputs = model(ids[:, :prompt], use_cache=True)
    logits = [outputs.logits]
    for token in ids[:, prompt:].split(1, dim=1):
        outputs = model(token, use_cache=True, past_key_values=outputs.past_key_values)
        logits.append(outputs.logits)
    assert outputs.past_key_values.get_seq_length() == ids.shape[1]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("weights", ["float", "int8", "ternary", "binary"])
@pytest.mark.parametrize("code", CODES)
def test_it_is_the_training_form(used: Used, code: str, weights: str, tokens: int) -> None:
    model = student(weights="float" if weights == "int8" else weights, **CODES[code])
    deployed: Any = deploy(copy.deepcopy(model), weights="int8" if weights == "int8" else None)
    found = stepwise(deployed, IDS[:tokens])
    assert used.steps == 7
    used.allowed = False
    expected = stepwise(deployed if weights == "int8" else model, IDS[:tokens])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_grouped_heads_biases_and_odd_sizes(used: Used) -> None:
    model = student(unusual())
    found = stepwise(deploy(copy.deepcopy(model)))
    assert used.steps == 7
    expected = stepwise(model)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sixteen_bit(used: Used) -> None:
    """Between two banks nothing is rounded, so the float32 model of the same weights is what it is compared with."""
    model = student().to(torch.bfloat16)
    wide: Any = deploy(copy.deepcopy(model).float())
    deployed: Any = deploy(model)
    cache = wide(IDS[:, :5], use_cache=True).past_key_values
    wide_hidden = wide.backbone.embedding(IDS[:, 5:6]).detach().clone()
    half = copy.deepcopy(cache)
    layer = half.layers[0]
    layer.conv_states[0] = layer.conv_states[0].to(torch.bfloat16)
    cache.layers[0].conv_states[0].copy_(layer.conv_states[0])
    hidden = wide_hidden.to(torch.bfloat16)
    for one, states, seen in ((wide, cache, wide_hidden), (deployed, half, hidden)):
        step = decoding.BlockStep(one.backbone.layers[0])
        prepared = step.prepare(seen, states)
        assert prepared is not None
        step.run(prepared, seen, states)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), wide_hidden, rtol=1e-2, atol=1e-2)


def test_generation_and_beams(used: Used) -> None:
    model = student()
    deployed: Any = deploy(copy.deepcopy(model))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 2}):
        ids = IDS[:2] if more else IDS
        used.allowed, before = True, used.steps
        text = deployed.generate(ids, **settings, **more)
        assert used.steps - before == 11
        used.allowed = False
        assert torch.equal(text, deployed.generate(ids, **settings, **more))
        assert torch.equal(text, model.generate(ids, **settings, **more))


def test_int8_weights_and_head_come_back(used: Used, tmp_path: Any) -> None:
    model: Any = deploy(student(), weights="int8", head="int8")
    assert model.lm_head.packed_weight.dtype == torch.int8
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(stepwise(loaded), stepwise(model))
    assert used.steps == 14


def test_a_deployed_checkpoint_comes_back_laid_out(used: Used, tmp_path: Any) -> None:
    model: Any = deploy(student(weights="ternary"))
    model.save_pretrained(tmp_path / "ternary")
    plain: Any = deploy(student())
    plain.save_pretrained(tmp_path / "float")
    for name, saved in (("ternary", model), ("float", plain)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(stepwise(loaded), stepwise(saved))
        assert {key: tensor.shape for key, tensor in loaded.state_dict().items()} == {
            key: tensor.shape for key, tensor in saved.state_dict().items()
        }
    assert loaded.backbone.layers[0].mlp.up_proj.weight.t().is_contiguous()
    assert used.steps == 28


def test_changed_tensors_are_read_anew(used: Used) -> None:
    model: Any = deploy(student())
    before = stepwise(model)
    block = model.backbone.layers[0]
    with torch.no_grad():
        for tensor in (
            block.input_layernorm.weight,
            block.mixer.conv1d.weight,
            block.mixer.D,
            block.mlp.up_proj.weight,
        ):
            kept = tensor.clone()
            tensor.mul_(1.5)
            used.allowed = True
            found = stepwise(model)
            used.allowed = False
            assert not torch.allclose(found, before)
            torch.testing.assert_close(found, stepwise(model), rtol=1e-5, atol=1e-5)
            tensor.copy_(kept)
    used.allowed = True
    assert torch.equal(stepwise(model), before)


def change(model: Any, what: str) -> None:
    """Changes a model that has decoded a token before."""
    block, other = model.backbone.layers[0], deploy(student(unusual_seed()))
    with torch.no_grad():
        if what == "a projection":
            block.mlp.gate_proj = copy.deepcopy(other.backbone.layers[0].mlp.gate_proj)
        elif what == "no neurons":
            block.mlp.down_proj.spiking = False
        elif what == "a gate":
            block.mlp.act_fn = torch.nn.GELU()
        elif what == "a parameter":
            block.input_layernorm.weight = torch.nn.Parameter(2 * block.input_layernorm.weight)
        elif what == "a norm":
            block.post_attention_layernorm = torch.nn.Identity()
            block.post_attention_layernorm.weight = torch.ones(32)
        elif what == "a forward":
            block.mlp.forward = lambda x: 2 * x
        elif what == "assigned":
            model.load_state_dict(other.state_dict(), assign=True)
        elif what == "inference mode":
            with torch.inference_mode():
                model.load_state_dict(other.state_dict())
        elif what == "steps":
            for layer in model.backbone.layers:
                layer.mlp.down_proj.neuron.T = 2
        elif what == "fewer layers":
            model.backbone.layers = model.backbone.layers[:1]


def unusual_seed() -> LlambaForCausalLM:
    model = llamba()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    return model


CHANGES = (
    "a projection", "no neurons", "a gate", "a parameter", "a norm", "a forward", "assigned", "inference mode", "steps",
    "fewer layers",
)  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_changes_after_its_first_token(used: Used, what: str) -> None:
    model: Any = deploy(student())
    before = stepwise(model)
    change(model, what)
    found = stepwise(model)
    used.allowed = False
    expected = stepwise(model)
    assert not torch.allclose(expected, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_biases_and_copies(used: Used) -> None:
    model: Any = deploy(student(unusual()).to(torch.bfloat16))
    before = stepwise(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(stepwise(duplicate), before)
    with torch.no_grad():
        duplicate.backbone.layers[0].mlp.gate_proj.bias.add_(1)
    assert not torch.equal(stepwise(duplicate), before)
    assert torch.equal(stepwise(model), before)
    assert torch.equal(stepwise(copy.deepcopy(duplicate)), stepwise(duplicate))


def test_states_of_another_shape_are_not_handed_to_a_kernel(used: Used) -> None:
    model: Any = deploy(student())
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises(RuntimeError):
            model(inputs_embeds=torch.randn(3, 1, 4), past_key_values=cache)
        foreign = unusual()(IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises((RuntimeError, IndexError)):
            model(IDS[:, 5:6], past_key_values=foreign)
        model(IDS[:, 5:6], past_key_values=cache)
        calls = used.steps
        assert calls == 1
        cache.reset()
        model(IDS[:, :1], past_key_values=cache)
    assert used.steps == calls  # the first token after a reset is a prefill
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS[:, 1:2], past_key_values=model(IDS[:, :1], use_cache=True).past_key_values)
    assert used.steps == calls


@pytest.mark.parametrize("case", ["five sequences", "two tokens", "a hook", "the reference", "hidden states", "a gate"])
def test_when_the_blocks_run_themselves(used: Used, case: str) -> None:
    model: Any = deploy(student())
    ids, arguments = IDS[:2], {}
    if case == "five sequences":
        ids = IDS[[0, 1, 2, 0, 1]]
    seen = []
    if case == "a hook":
        model.backbone.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    if case == "hidden states":
        arguments = {"output_hidden_states": True}
    if case == "a gate":
        model.backbone.layers[1].mlp.act_fn = torch.nn.GELU()
    if case == "the reference":
        set_backend(model, "torch")
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        more = ids[:, 5:7] if case == "two tokens" else ids[:, 5:6]
        calls = len(seen)
        model(more, use_cache=True, past_key_values=cache, **arguments)
    assert used.steps == 0
    assert len(seen) - calls == (case == "a hook")


def test_left_padding(used: Used) -> None:
    model: Any = deploy(student())
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(IDS[:1], **settings)[:, 12:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1]], 1)
    mask = (torch.arange(16) >= 4).long().unsqueeze(0)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 16:], alone)


def test_two_threads(used: Used) -> None:
    model: Any = deploy(student())
    expected = [stepwise(model, IDS[i : i + 1]) for i in range(3)]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(20):
            if not torch.equal(stepwise(model, IDS[i : i + 1]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_backend_of_a_context(used: Used) -> None:
    model: Any = deploy(student())
    with use_backend("torch"):
        stepwise(model)
    assert used.steps == 0
    stepwise(model)
    assert used.steps == 7
