"""Llamba as a transformers model: names, loading, generation, training, and what it takes over from a Llama."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM, LlambaModel

MLP = {"intermediate_size": 48, "bias": False, "act_fn": "silu"}
SSM = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "d_conv": 4, "expand": 1, "chunk_size": 8}

LAYER_NAMES = [
    *(f"mixer.{name}" for name in ("z_bias", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight")),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]


def config(**arguments: object) -> LlambaConfig:
    fields = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "mlp_cfg": MLP, "ssm_cfg": SSM} | arguments
    return LlambaConfig(**fields)


def llamba(**arguments: object) -> LlambaForCausalLM:
    """Random, with weights large enough that its greedy text is not one token repeated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlambaForCausalLM(config(initializer_range=0.2, **arguments)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("mixer.D", "mixer.z_bias", "conv1d.weight")):
                torch.nn.init.normal_(parameter)
        return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: LlambaForCausalLM, ids: torch.Tensor, **arguments: object) -> torch.Tensor:
    return model.generate(ids, do_sample=False, pad_token_id=0, **{"max_new_tokens": 12} | arguments)


def test_auto_classes() -> None:
    assert isinstance(AutoModel.from_config(config()), LlambaModel)
    assert isinstance(AutoModelForCausalLM.from_config(config()), LlambaForCausalLM)
    assert AutoConfig.for_model("llamba").d_model == 2048


def test_config_round_trip(tmp_path: Path) -> None:
    before = config(tie_embeddings=False, ssm_cfg=SSM | {"activation": "silu"}, eos_token_id=2)
    before.save_pretrained(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path)
    assert after.to_dict() | {"_name_or_path": ""} == before.to_dict()
    assert (after.hidden_size, after.num_hidden_layers, after.tie_word_embeddings) == (32, 2, False)
    assert after.ssm_cfg["activation"] == "silu"


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_the_published_ones(tmp_path: Path, tied: bool) -> None:
    from safetensors import safe_open

    llamba(tie_embeddings=tied).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    expected = {"backbone.embedding.weight", "backbone.final_layernorm.weight"}
    expected |= {f"backbone.layers.{i}.{name}" for i in range(2) for name in LAYER_NAMES}
    assert names == expected | (set() if tied else {"lm_head.weight"})


def test_llamba_1b_has_its_published_size() -> None:
    with torch.device("meta"):
        model = LlambaForCausalLM(LlambaConfig())
    assert model.num_parameters() == pytest.approx(1.405e9, rel=5e-4)
    assert model.backbone.layers[0].mixer.in_proj.weight.shape == (8224, 2048)
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_loads_a_directory_of_the_published_style(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = llamba()
    published = {
        "vocab_size": 64,
        "d_model": 32,
        "n_layer": 2,
        "tie_embeddings": True,
        "pad_vocab_size_multiple": 8,
        "lm_head_bias": False,
        "lm_head_prenorm": "rms",
        "resid_dropout": 0.0,
        "norm_epsilon": 1e-5,
        "mlp_cfg": MLP,
        "ssm_cfg": SSM | {"activation": "identity", "bias": False, "conv_bias": True},
        "initializer_cfg": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = LlambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(tmp_path: Path, tied: bool) -> None:
    model = llamba(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlambaForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_generation_equals_uncached(length: int, num_beams: int) -> None:
    model, ids = llamba(), tokens(2, length)
    cached = generate(model, ids, num_beams=num_beams)
    assert torch.equal(cached, generate(model, ids, num_beams=num_beams, use_cache=False))
    assert len(cached[0, length:].unique()) > 3


def test_cached_logits_equal_the_whole() -> None:
    model, ids = llamba().double(), tokens(2, 20)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :11], use_cache=True)
    logits = [out.logits]
    for cut in ids[:, 11:].split([1, 4, 1, 3], 1):
        out = model(cut, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)
    assert out.past_key_values.get_seq_length() == 20


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_left_padded_batch_equals_each_alone(num_beams: int) -> None:
    model = llamba()
    lines = [tokens(1, length)[0] for length in (2, 9, 17)]
    ids = torch.stack([torch.nn.functional.pad(line, (17 - len(line), 0)) for line in lines])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(line), (17 - len(line), 0)) for line in lines])
    logits = model(ids, attention_mask=mask).logits
    together = generate(model, ids, attention_mask=mask, num_beams=num_beams)
    for i, line in enumerate(lines):
        torch.testing.assert_close(logits[i, 17 - len(line) :], model(line[None]).logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(together[i, 17:], generate(model, line[None], num_beams=num_beams)[0, len(line) :])


def test_bfloat16_generates() -> None:
    assert generate(llamba().bfloat16(), tokens(2, 9)).shape == (2, 21)


def test_a_cache_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_implementation must be None or 'dynamic'; got 'static'"):
        generate(llamba(), tokens(1, 4), cache_implementation="static")


def test_hidden_states_end_with_the_heads_input() -> None:
    model = llamba()
    out = model(tokens(2, 9), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.backbone.embedding(tokens(2, 9)))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(model(tokens(2, 9), logits_to_keep=2).logits, out.logits[:, -2:])
    empty = model(tokens(2, 9), logits_to_keep=torch.empty(0, dtype=torch.long)).logits
    assert empty.shape == (2, 0, 64)


def test_inputs_embeds_equal_input_ids() -> None:
    model, ids = llamba(), tokens(2, 9)
    assert torch.equal(model(inputs_embeds=model.backbone.embedding(ids)).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.backbone.embedding(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_loss_is_that_of_a_llama(tiny_llama: LlamaForCausalLM) -> None:
    model, ids = llamba(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    for items in (None, 5):
        theirs = tiny_llama.loss_function(logits=out.logits, labels=labels, vocab_size=64, num_items_in_batch=items)
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=items).loss, theirs)
    assert isinstance(model(ids, labels=labels, return_dict=False), tuple)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, ids = llamba().train(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_trains() -> None:
    model, ids = llamba().train(), tokens(2, 9)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def trainer(model: torch.nn.Module, directory: Path, **arguments: object) -> Trainer:
    options = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **arguments,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    return Trainer(model, options, train_dataset=rows)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_trainer_takes_steps(tmp_path: Path, activation_checkpointing: bool) -> None:
    model, ids = llamba(), tokens(8, 12)
    before = float(model(ids, labels=ids).loss.detach())
    trainer(model, tmp_path, activation_checkpointing=activation_checkpointing).train()
    assert float(model.eval()(ids, labels=ids).loss.detach()) < before


# --- from_llama ---------------------------------------------------------------------------------------------------


def llama(tiny: LlamaForCausalLM, tied: bool, key_value_heads: int = 2) -> LlamaForCausalLM:
    fields = tiny.config.to_dict() | {"tie_word_embeddings": tied, "num_key_value_heads": key_value_heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**fields)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_from_llama_copies_what_both_have(tiny_llama: LlamaForCausalLM, tied: bool, key_value_heads: int) -> None:
    teacher = llama(tiny_llama, tied, key_value_heads)
    student = LlambaForCausalLM.from_llama(teacher)
    assert torch.equal(student.backbone.embedding.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.backbone.final_layernorm.weight, teacher.model.norm.weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert (student.lm_head.weight is student.backbone.embedding.weight) == tied
    for block, layer in zip(student.backbone.layers, teacher.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            for key, tensor in getattr(layer, name).state_dict().items():
                assert torch.equal(getattr(block, name).state_dict()[key], tensor), (name, key)
        mixer, attention = block.mixer, layer.self_attn
        value, key, query = mixer.in_proj.weight[:96].view(3, 4, 8, 32)
        for head in range(4):
            shared = head // (4 // key_value_heads)
            assert torch.equal(value[head], attention.v_proj.weight.view(-1, 8, 32)[shared])
            assert torch.equal(key[head], attention.k_proj.weight.view(-1, 8, 32)[shared])
            torch.testing.assert_close(query[head], attention.q_proj.weight.view(-1, 8, 32)[head] / 8**0.5)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    teacher.model.embed_tokens.weight.data.zero_()
    assert bool((student.backbone.embedding.weight != 0).any())  # copies, not the teacher's own tensors
    assert (student.config.bos_token_id, student.config.eos_token_id) == (1, 2)


def test_one_token_gives_the_attentions_value_times_its_score(tiny_llama: LlamaForCausalLM) -> None:
    """For one token the mixer is out_proj(v (q . k / sqrt d)), where attention would give out_proj(v)."""
    teacher = tiny_llama.double()
    student = LlambaForCausalLM.from_llama(teacher)
    u = torch.randn(3, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention, mixer = teacher.model.layers[1].self_attn, student.backbone.layers[1].mixer
    q = attention.q_proj(u).view(3, 4, 8)
    k, v = (m(u).view(3, 2, 8).repeat_interleave(2, dim=1) for m in (attention.k_proj, attention.v_proj))
    expected = attention.o_proj((v * ((q * k).sum(-1, keepdim=True) / 8**0.5)).view(3, 1, 32))
    torch.testing.assert_close(mixer(u), expected, rtol=1e-6, atol=1e-9)  # SILU_ONE has eight digits


def test_mixing_matrix_starts_at_the_unnormalised_attention(tiny_llama: LlamaForCausalLM) -> None:
    student = LlambaForCausalLM.from_llama(tiny_llama)
    u = torch.randn(1, 6, 32)
    mixer, attention = student.backbone.layers[0].mixer, tiny_llama.model.layers[0].self_attn
    q = attention.q_proj(u).view(1, 6, 4, 8).transpose(1, 2)
    k = attention.k_proj(u).view(1, 6, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
    scores = (q @ k.transpose(-1, -2)) / 8**0.5
    diagonal = mixer.mixing_matrix(u).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, scores.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-6)


def test_from_llama_takes_another_geometry(tiny_llama: LlamaForCausalLM) -> None:
    student = LlambaForCausalLM.from_llama(tiny_llama, d_state=16, n_qk_heads=2, activation="silu")
    mixer = student.backbone.layers[0].mixer
    assert (mixer.d_state, mixer.n_qk_heads, mixer.activation) == (16, 2, "silu")
    assert student(tokens(1, 5)).logits.shape == (1, 5, 64)


def test_from_llama_keeps_dtype_and_mode(tiny_llama: LlamaForCausalLM) -> None:
    student = LlambaForCausalLM.from_llama(tiny_llama.bfloat16().train())
    assert student.dtype == torch.bfloat16
    assert student.training


def test_from_llama_refuses_other_models(tiny_llama: LlamaForCausalLM) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    for other in (gpt2, LlamaModel(tiny_llama.config), torch.nn.Linear(2, 2)):
        with pytest.raises(SpikelmError, match=f"takes a LlamaForCausalLM; got .*{type(other).__name__}"):
            LlambaForCausalLM.from_llama(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "got 4 \\* 16 for 32"),
        ({"attention_bias": True}, "no attention_bias; got .*attention_bias=True"),
    ],
)
def test_from_llama_refuses_a_geometry_it_cannot_copy(
    tiny_llama: LlamaForCausalLM, changes: dict, message: str
) -> None:
    teacher = LlamaForCausalLM(LlamaConfig(**tiny_llama.config.to_dict() | changes))
    with pytest.raises(SpikelmError, match=message):
        LlambaForCausalLM.from_llama(teacher)


def test_norms_are_llamas_own() -> None:
    assert all(isinstance(block.input_layernorm, LlamaRMSNorm) for block in llamba().backbone.layers)


# --- the real teacher ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(teacher_path: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(teacher_path).eval()


def test_golden_text_of_the_real_teacher(teacher: LlamaForCausalLM, teacher_path: Path) -> None:
    text = pipeline("text-generation", model=teacher, tokenizer=AutoTokenizer.from_pretrained(teacher_path))(
        "Once upon a time", max_new_tokens=30, max_length=None, do_sample=False, pad_token_id=0
    )[0]["generated_text"]
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play ")


def test_pipeline_of_its_student(teacher: LlamaForCausalLM, teacher_path: Path) -> None:
    student = LlambaForCausalLM.from_llama(copy.deepcopy(teacher))
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    generator = pipeline("text-generation", model=student, tokenizer=tokenizer)
    arguments = {"max_new_tokens": 5, "max_length": None, "do_sample": False, "pad_token_id": 0}
    (out,) = generator("Once upon a time", return_full_text=False, **arguments)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    new = generate(student, ids, max_new_tokens=5)[0, ids.shape[1] :]
    assert out["generated_text"].strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
