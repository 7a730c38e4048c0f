"""BiSpikCLM as a transformers model: binary products, causality, generation on bits, loading, training."""

import subprocess
import sys
from pathlib import Path

import pytest
import snntorch
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from spikelm.energy import BinaryOperands
from spikelm.errors import SpikelmError
from spikelm.layers.spiking_attention import StatelessBinaryIF
from spikelm.models.bispikclm import BiSpikCLMCache, BiSpikCLMConfig, BiSpikCLMForCausalLM, BiSpikCLMModel
from tests.small_models import bispikclm

RESIDUALS = ("integer", "binary")


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: BiSpikCLMForCausalLM, ids: torch.Tensor, **arguments: object) -> torch.Tensor:
    return model.generate(ids, do_sample=False, pad_token_id=0, **{"max_new_tokens": 40} | arguments)


# ---- the neuron

GOLDEN = [
    *(
        (1.0, current, *rates)
        for current, *rates in ((0.3, 0, 0.25), (0.5, 0, 0.25), (0.7, 0.5, 0.5), (1.0, 0.5, 0.75))
    ),
    *((1.0, current, 1, 1) for current in (2.0, 3.5)),
    *(
        (0.7, current, *rates)
        for current, *rates in ((0.25, 0, 0.25), (0.4, 0.5, 0.5), (0.5, 0.5, 0.5), (0.7, 0.5, 0.75))
    ),
    *((0.7, current, 1, 1) for current in (1.0, 2.0)),
]


@pytest.mark.parametrize(("v_threshold", "current", "rate_2", "rate_4"), GOLDEN)
def test_golden_rates(v_threshold: float, current: float, rate_2: float, rate_4: float) -> None:
    neuron = bispikclm(v_threshold=v_threshold).model.input_neuron
    for T, rate in ((2, rate_2), (4, rate_4)):
        assert neuron(torch.full((T, 1), current)).mean().item() == rate


@pytest.mark.parametrize(("T", "divisor"), [(2, 1.9), (4, 3.439)])
def test_smallest_current_that_fires(T: int, divisor: float) -> None:
    neuron = bispikclm().model.input_neuron
    assert neuron(torch.full((T, 1), 1.0001 / divisor)).sum() == 1
    assert neuron(torch.full((T, 1), 0.9999 / divisor)).sum() == 0


def test_populations_equal_snntorch() -> None:
    """A stack of every population of a block against Leaky(subtract), which fires at > and not >=: no ties here."""
    model = bispikclm()
    populations = {n: p for n, p in model.named_modules() if isinstance(p, StatelessBinaryIF) and ".layers.0." in n}
    assert len(populations) == 10
    x = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(0)) * 2
    for name, population in populations.items():
        leaky = snntorch.Leaky(beta=0.9, threshold=1.0, reset_mechanism="subtract", reset_delay=True)
        membrane = leaky.init_leaky()
        steps = []
        for current in x:
            spikes, membrane = leaky(current, membrane)
            steps.append(spikes)
        expected = torch.stack(steps)
        assert torch.equal(population(x), expected), name
        x = expected * torch.rand(x.shape, generator=torch.Generator().manual_seed(len(name))) * 3


# ---- what is computed


@torch.no_grad()
@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_product_is_binary(residual: str) -> None:
    model = bispikclm(residual=residual)
    with BinaryOperands(model) as operands:
        model(tokens(2, 9), output_attentions=True)
    layers = model.config.num_hidden_layers
    assert operands.checked == {"aten::addmm": 6 * layers, "aten::bmm": 2 * layers}


@torch.no_grad()
def test_a_real_operand_is_found() -> None:
    model = bispikclm()
    model.model.layers[1].fc1_neuron = torch.nn.ReLU()
    with pytest.raises(SpikelmError, match=r"addmm in model\.layers\.1\.fc2 of .* must have an operand in \{0, 1\}"):
        with BinaryOperands(model):
            model(tokens(1, 5), output_attentions=True)
    model = bispikclm()
    model.model.layers[0].self_attn.value_neuron = torch.nn.Sigmoid()
    with pytest.raises(SpikelmError, match=r"bmm in model\.layers\.0\.self_attn of .* must have both operands"):
        with BinaryOperands(model):
            model(tokens(1, 5), output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("residual", RESIDUALS)
def test_stream_between_the_blocks(residual: str) -> None:
    """Integers, growing by two a block; or spikes."""
    model, seen = bispikclm(residual=residual), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model(tokens(2, 30))
    largest = [1 + 2 * (i + 1) if residual == "integer" else 1 for i in range(len(seen))]
    for stream, most in zip(seen, largest, strict=True):
        assert torch.equal(stream, stream.round()) and stream.min() == 0 and 0 < stream.max() <= most


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("T", [1, 2, 4])
def test_the_future_changes_no_past_logit(residual: str, T: int) -> None:
    model, ids = bispikclm(residual=residual, T=T), tokens(3, 24)
    other = ids.clone()
    other[:, 13:] = torch.flip(ids[:, 13:], dims=(1,))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before, after = model(ids).logits, model(other).logits
        assert torch.equal(before[:, :13], after[:, :13])
        assert not torch.equal(before[:, 13:], after[:, 13:])


@torch.no_grad()
def test_hidden_states_and_attentions() -> None:
    model, ids = bispikclm(), tokens(2, 12)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert len(output.hidden_states) == layers + 1 and len(output.attentions) == layers
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert output.attentions[0].shape == (2, heads, 12, 12)
    assert all(0 < maps.mean() < 1 for maps in output.attentions)
    spikes = output.hidden_states[0] * model.config.T
    assert torch.equal(spikes, spikes.round()) and 0 < spikes.mean() < model.config.T
    assert torch.equal(model(ids).logits, output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    assert isinstance(model.model(ids, return_dict=False), tuple)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, ids = bispikclm().train(), tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids, output_attentions=True, use_cache=True).loss.backward()  # the layers leave the cache alone
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
        assert parameter.grad.abs().sum() > 0, name


# ---- generation


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("length", [1, 3, 33])
def test_cached_generation_equals_uncached(residual: str, length: int) -> None:
    model, ids = bispikclm(residual=residual, tie_word_embeddings=False), tokens(2, length)
    cached = generate(model, ids)
    assert torch.equal(cached, generate(model, ids, use_cache=False))
    assert len(cached[0, length:].unique()) > 3


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beam_search_uses_the_cache(arguments: dict[str, int]) -> None:
    model, ids = bispikclm(), tokens(2, 5)
    cached = generate(model, ids, max_new_tokens=12, **arguments)
    assert torch.equal(cached, generate(model, ids, max_new_tokens=12, use_cache=False, **arguments))


@torch.no_grad()
def test_left_padding() -> None:
    model, ids = bispikclm(), tokens(1, 7)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    assert torch.equal(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits)
    both = torch.cat((padded, tokens(1, 11)))
    masks = torch.cat((mask, torch.ones_like(mask)))
    generated = generate(model, both, attention_mask=masks)
    assert torch.equal(generated[0, 4:], generate(model, ids)[0])
    assert torch.equal(generated[1], generate(model, both[1:])[0])


@torch.no_grad()
def test_cache_holds_a_bit_per_element_and_step() -> None:
    model = bispikclm(hidden_size=128, num_attention_heads=2, max_position_embeddings=512)
    cache = model(tokens(1, 256), use_cache=True).past_key_values
    layer, config = cache.layers[0], model.config
    bits = 8 * (layer.keys.nbytes + layer.values.nbytes)
    assert bits == 2 * 256 * config.hidden_size * config.T
    as_bfloat16 = 2 * torch.empty(config.T, 1, 256, config.hidden_size, dtype=torch.bfloat16).nbytes
    assert as_bfloat16 == 16 * (layer.keys.nbytes + layer.values.nbytes)


@torch.no_grad()
def test_cropped_cache_goes_on_as_if_never_longer() -> None:
    model, ids = bispikclm(), tokens(2, 50)
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.crop(-13)
    assert cache.get_seq_length() == 37
    again = model(ids[:, 37:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(again, model(ids).logits[:, 37:])
    with pytest.raises(ValueError, match="0 or less"):
        cache.layers[0].crop(5)


@torch.no_grad()
def test_cache_can_be_reset_and_rearranged() -> None:
    model, ids = bispikclm(), tokens(2, 20)
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    following = tokens(2, 4)
    logits = model(following, past_key_values=cache, use_cache=True).logits
    assert torch.equal(logits, model(torch.cat((ids.flip(0), following), dim=1)).logits[:, 20:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, model(ids).logits)


# ---- loading and training


def test_auto_classes() -> None:
    config = bispikclm().config
    assert isinstance(AutoModel.from_config(config), BiSpikCLMModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), BiSpikCLMForCausalLM)
    assert AutoConfig.for_model("bispikclm").hidden_size == 768


@pytest.mark.parametrize(
    "arguments", [{}, {"learn_threshold": True, "residual": "binary", "map_threshold": 2.0, "T": 2}]
)
def test_save_and_load_in_a_new_process(tmp_path: Path, arguments: dict[str, object]) -> None:
    model, ids = bispikclm(**arguments), tokens(2, 9)
    torch.nn.init.normal_(model.model.embed_positions.weight)  # they start as sinusoids, and must not come back as such
    model.save_pretrained(tmp_path)
    torch.save((ids, model(ids).logits.detach(), generate(model, ids)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, spikelm; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids, logits, generated = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(ids).logits, logits)\n"
        "assert torch.equal(model.generate(ids, do_sample=False, pad_token_id=0, max_new_tokens=40), generated)\n"
        "assert model.lm_head.weight is model.model.embed_tokens.weight\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path)], check=True)


@pytest.mark.parametrize(("size", "parameters"), [("125m", 125.2e6), ("350m", 356e6), ("1.3b", 1.316e9)])
def test_sizes_are_opts(size: str, parameters: float) -> None:
    """OPT's own have no more than its norms besides."""
    with torch.device("meta"):
        model = BiSpikCLMForCausalLM(BiSpikCLMConfig.opt(size))
    assert model.num_parameters() == pytest.approx(parameters, rel=0.01)


def test_positions_start_as_sinusoids_beside_the_normalised_embedding() -> None:
    """Neighbours are alike, whatever the embedding's scale."""
    for scale in (0.02, 5.0):
        model = bispikclm(initializer_range=scale, initializer_position=0.5)
        table = model.model.embed_positions.weight
        assert table.square().mean().item() == pytest.approx(0.25, rel=0.05)
        assert model.model.layers[1].fc2.weight.std().item() == pytest.approx(2.0 / 128**0.5, rel=0.1)
        closeness = [torch.nn.functional.cosine_similarity(table[50], table[50 + k], dim=0).item() for k in (1, 4, 16)]
        assert 1 > closeness[0] > closeness[1] > closeness[2]
    quiet = bispikclm(initializer_position=0.0).model(tokens(1, 1).expand(1, 6), output_hidden_states=True)
    assert torch.equal(quiet.hidden_states[0][:, :1].expand(-1, 6, -1), quiet.hidden_states[0])


def test_learned_thresholds_are_parameters_of_every_population() -> None:
    model = bispikclm(learn_threshold=True)
    names = {name for name, _ in model.named_parameters() if name.endswith("neuron.a")}
    assert len(names) == 1 + 10 * model.config.num_hidden_layers
    assert model.model.layers[0].self_attn.map_neuron.a.shape == ()
    assert model.model.layers[0].fc1_neuron.a.shape == (model.config.ffn_dim,)


def test_trains_with_trainer(tmp_path: Path) -> None:
    model = bispikclm().train()
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 16).expand(16, -1)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=1e-2, report_to=[], logging_steps=1, use_cpu=True,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, "T must be an integer >= 1; got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1; got 0"),
        ({"ffn_dim": 0}, "ffn_dim must be an integer >= 1; got 0"),
        ({"T": 2.0}, "T must be an integer >= 1; got 2.0"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads; got 32 and 5"),
        ({"beta": 1.5}, "beta must be within"),
        ({"v_threshold": 0.0}, "v_threshold must be a finite number > 0; got 0.0"),
        ({"map_threshold": -1.0}, "map_threshold must be a finite number > 0; got -1.0"),
        ({"surrogate_alpha": -1.0}, "surrogate_alpha must be a finite number > 0; got -1.0"),
    ],
)
def test_refuses_configurations(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        bispikclm(**arguments)


def test_refuses_other_residuals_and_sizes() -> None:
    with pytest.raises(SpikelmError, match="residual must be 'integer' or 'binary'; got 'float'"):
        bispikclm(residual="float")
    with pytest.raises(SpikelmError, match="size must be one of 125m, 350m, 1.3b; got '66b'"):
        BiSpikCLMConfig.opt("66b")


@torch.no_grad()
def test_refuses_a_context_beyond_the_table_of_positions() -> None:
    model = bispikclm(max_position_embeddings=20)
    with pytest.raises(SpikelmError, match="the context has 21 tokens; this model's table of positions .* ends at 20"):
        model(tokens(1, 21))
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    with pytest.raises(SpikelmError, match="has 21 tokens"):
        model(tokens(1, 1), past_key_values=cache)
    padded, mask = torch.zeros(1, 25, dtype=torch.long), (torch.arange(25) >= 5).long()[None]
    assert model(padded, attention_mask=mask).logits.shape == (1, 25, 64)


@torch.no_grad()
def test_refuses_other_masks_and_caches() -> None:
    model, ids = bispikclm(), tokens(2, 5)
    with pytest.raises(
        SpikelmError, match=r"attention_mask must be \[2, 5\], over 0 cached and 5 new tokens; got \(2, 4\)"
    ):
        model(ids, attention_mask=torch.ones(2, 4))
    for cache in (DynamicCache(), DynamicCache(config=model.config), BiSpikCLMCache(1), ((ids, ids),)):
        with pytest.raises(SpikelmError, match=r"past_key_values must be a BiSpikCLMCache\(2\).*; got a "):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation must be None or 'dynamic'; got 'static'"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    assert model(ids, past_key_values=BiSpikCLMCache(2)).logits.shape == (2, 5, 64)
