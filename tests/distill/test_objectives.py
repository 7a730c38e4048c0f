"""Taps and objectives on a tiny Llama and its Llamba."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from spikelm.distill.losses import (
    feature_distance,
    kl_divergence,
    loss_mask,
    relative_hidden_error,
    sbds_divergence,
    token_mean,
)
from spikelm.distill.objectives import (
    SBDS,
    HiddenAlignment,
    HiddenMatch,
    LogitDistillation,
    MatrixOrientation,
    NextToken,
    last_hidden,
)
from spikelm.distill.taps import Taps, decoder_layers, mixer_modules, norm_modules, output_head
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import llamba, mamba2


def perturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    student = copy.deepcopy(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


def batch_of(rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_taps_record_and_leave_no_hook(tiny_llama: LlamaForCausalLM) -> None:
    layer = decoder_layers(tiny_llama)[0]
    with Taps({"norm": layer.input_layernorm, "mixer": layer.self_attn}) as taps:
        tiny_llama(**batch_of())
    assert torch.equal(taps.outputs["norm"], taps.inputs["mixer"])
    assert isinstance(taps.outputs["mixer"], tuple)
    assert not layer.self_attn._forward_hooks and not layer.input_layernorm._forward_hooks
    gone = weakref.ref(taps)
    gc.disable()
    try:
        del taps
        assert gone() is None  # freed by its count alone: no cycle keeps the recorded tensors
    finally:
        gc.enable()


def test_taps_refuse_ambiguous_and_missing_records(tiny_llama: LlamaForCausalLM) -> None:
    norm = decoder_layers(tiny_llama)[0].input_layernorm
    with pytest.raises(RuntimeError, match="ran twice"), Taps({"norm": norm}):
        tiny_llama(**batch_of())
        tiny_llama(**batch_of())
    assert not norm._forward_hooks
    with pytest.raises(RuntimeError, match="did not run"), Taps({"norm": norm}):
        pass


def test_module_finders(tiny_llama: LlamaForCausalLM) -> None:
    llamba = LlambaForCausalLM.from_llama(tiny_llama)
    assert list(norm_modules(llamba, "both")) == list(norm_modules(tiny_llama, "both"))
    assert list(norm_modules(tiny_llama, "post")) == ["0.post_attention_layernorm", "1.post_attention_layernorm"]
    assert mixer_modules(tiny_llama)["1"] is tiny_llama.model.layers[1].self_attn
    assert type(mixer_modules(llamba)["0"]).__name__ == "DiscreteMamba2"
    with pytest.raises(SpikelmError, match="Linear has no decoder layers at any of model.layers"):
        decoder_layers(nn.Linear(1, 1))
    with pytest.raises(SpikelmError, match="accepted: pre, post, both"):
        norm_modules(tiny_llama, "all")
    with pytest.raises(SpikelmError, match="not a causal language model"):
        output_head(tiny_llama.model)
    tiny_llama.config.final_logit_softcapping = 30.0
    with pytest.raises(SpikelmError, match="final_logit_softcapping"):
        output_head(tiny_llama)


@pytest.mark.parametrize("kind", ["llama", "llamba"])
def test_last_hidden_is_what_the_head_is_fed_and_no_logits_are_formed(tiny_llama: LlamaForCausalLM, kind: str) -> None:
    model = tiny_llama if kind == "llama" else LlambaForCausalLM.from_llama(tiny_llama).eval()
    batch = batch_of()
    with Taps({"head": output_head(model)}) as taps:
        hidden = last_hidden(model, batch)
    assert taps.outputs["head"].shape == (3, 0, 64)
    torch.testing.assert_close(output_head(model)(hidden), model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("taps", ["pre", "post", "both"])
def test_sbds_equals_its_definition_with_padding_and_labels(tiny_llama: LlamaForCausalLM, taps: str) -> None:
    student, batch = perturbed(tiny_llama), batch_of()
    batch["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    batch["attention_mask"][1, 4:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 20, -100)
    names = {"pre": ["input"], "post": ["post_attention"], "both": ["input", "post_attention"]}[taps]
    features: list[list[Tensor]] = []
    for model in (tiny_llama, student):
        found: list[Tensor] = []
        handles = [
            getattr(layer, f"{name}_layernorm").register_forward_hook(lambda m, a, out, into=found: into.append(out))
            for layer in model.model.layers
            for name in names
        ]
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        [handle.remove() for handle in handles]
        features.append(found)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = loss_mask(batch["input_ids"], batch["labels"], batch["attention_mask"])
    with torch.no_grad():
        divergence = token_mean(sbds_divergence(tiny_llama(**inputs).logits, student(**inputs).logits, 0.2, 0.7), mask)
        distance = feature_distance(*features, mask)
    result = SBDS(taps=taps, feature_weight=0.5)(student, tiny_llama.requires_grad_(False), batch)
    assert list(result) == ["loss", "divergence", "features"]
    torch.testing.assert_close(result["divergence"], divergence)
    torch.testing.assert_close(result["features"], distance)
    torch.testing.assert_close(result["loss"], divergence + 0.5 * distance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunked_and_checkpointed_objectives_give_the_same_gradients(
    tiny_llama: LlamaForCausalLM, checkpointing: bool
) -> None:
    student, teacher, batch = perturbed(tiny_llama.double()), tiny_llama.double().requires_grad_(False), batch_of()
    plain = SBDS(chunk_size=1000)(student, teacher, batch)
    plain_gradients = gradients(student, plain["loss"])
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()
    chunked = SBDS(chunk_size=5)(student, teacher, batch)
    torch.testing.assert_close(chunked["loss"], plain["loss"], rtol=0, atol=1e-12)
    for name, value in gradients(student, chunked["loss"]).items():
        torch.testing.assert_close(value, plain_gradients.pop(name), rtol=0, atol=1e-10)
    assert not plain_gradients
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_logit_distillation_is_the_token_mean_of_forward_kl(tiny_llama: LlamaForCausalLM) -> None:
    student, batch = perturbed(tiny_llama), batch_of()
    with torch.no_grad():
        slow = kl_divergence(tiny_llama(**batch).logits, student(**batch).logits)[:, :-1].mean()
        result = LogitDistillation()(student, tiny_llama, batch)
        same = SBDS(alpha=1.0, beta=0.0, feature_weight=0.0)(student, tiny_llama, batch)
    torch.testing.assert_close(result["loss"], slow)
    torch.testing.assert_close(same["loss"], slow)
    assert list(result) == ["loss"] and list(same) == ["loss", "divergence"]


def test_hidden_alignment_of_a_copy_is_zero_and_falls_short_for_a_llamba(tiny_llama: LlamaForCausalLM) -> None:
    llamba, batch = LlambaForCausalLM.from_llama(tiny_llama), batch_of()
    with torch.no_grad():
        slow = 0.0
        for teacher_layer, layer in zip(tiny_llama.model.layers, decoder_layers(llamba), strict=True):
            with Taps({"": teacher_layer.self_attn}) as taps:
                tiny_llama(**batch)
            gap = taps.outputs[""][0] - layer.mixer(taps.inputs[""])
            slow += gap.norm(dim=-1)[:, :-1].mean().item()
    loss = HiddenAlignment()(llamba, tiny_llama, batch)["loss"]
    assert loss.item() == pytest.approx(slow, rel=1e-5) and slow > 0
    found = gradients(llamba, loss)
    assert found and all(".mixer." in name for name in found)


def test_matrix_orientation_compares_teacher_maps_and_restores_the_attention(tiny_llama: LlamaForCausalLM) -> None:
    llamba, batch = LlambaForCausalLM.from_llama(tiny_llama), batch_of()
    before = tiny_llama.config._attn_implementation
    assert before != "eager"
    loss = MatrixOrientation()(llamba, tiny_llama, batch)["loss"]
    assert tiny_llama.config._attn_implementation == before
    tiny_llama.set_attn_implementation("eager")
    with torch.no_grad():
        output = tiny_llama(**batch, output_attentions=True, output_hidden_states=True)
        slow = 0.0
        for index, layer in enumerate(tiny_llama.model.layers):
            hidden = layer.input_layernorm(output.hidden_states[index])
            gap = output.attentions[index] - decoder_layers(llamba)[index].mixer.mixing_matrix(hidden)
            slow += gap[:, :, :-1].flatten(2).norm(dim=-1).mean().item()
    assert loss.item() == pytest.approx(slow, rel=1e-5) and math.isfinite(slow)
    assert gradients(llamba, loss)


def test_mixer_objectives_name_what_does_not_fit(tiny_llama: LlamaForCausalLM) -> None:
    llamba, batch = LlambaForCausalLM.from_llama(tiny_llama), batch_of()
    with pytest.raises(SpikelmError, match="no mixing_matrix"):
        MatrixOrientation()(tiny_llama, copy.deepcopy(tiny_llama), batch)
    with pytest.raises(SpikelmError, match="attention layers"):
        MatrixOrientation()(llamba, copy.deepcopy(llamba), batch)
    shorter = copy.deepcopy(llamba)
    del decoder_layers(shorter)[1]
    with pytest.raises(SpikelmError, match="2 against 1"):
        HiddenAlignment()(shorter, tiny_llama, batch)


@pytest.mark.parametrize("objective", [MatrixOrientation(), HiddenAlignment()])
def test_mixer_objectives_refuse_a_student_that_is_wrapped_without_them(
    tiny_llama: LlamaForCausalLM, objective: MatrixOrientation | HiddenAlignment
) -> None:
    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module) -> None:  # the real one wants other processes
            torch.nn.Module.__init__(self)
            self.module = module

    with pytest.raises(SpikelmError, match="give the bare student, wrapped together with the objective"):
        objective(Wrapper(tiny_llama), tiny_llama, batch_of())


def test_another_vocabulary_or_width_is_an_error(tiny_llama: LlamaForCausalLM) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.vocab_size = 60
    with pytest.raises(SpikelmError, match="vocabulary of 64, student of 60"):
        LogitDistillation()(LlamaForCausalLM(config), tiny_llama, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size = 16
    with pytest.raises(SpikelmError, match="hidden size: 32 against 16"):
        SBDS()(LlamaForCausalLM(config), tiny_llama, batch_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": 0.0, "beta": 0.0}, "not both 0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"taps": "all"}, "pre, post, both"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"feature_weight": -0.1}, "feature_weight"),
    ],
)
def test_objectives_are_validated(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        SBDS(**options)  # type: ignore[arg-type]


def test_next_token_is_the_language_modelling_loss(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = tiny_llama(ids, labels=ids).loss
    torch.testing.assert_close(NextToken()(tiny_llama, torch.nn.Identity(), {"input_ids": ids})["loss"], expected)
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 3)), "attention_mask": (torch.arange(12) < 9).expand(2, 12)}
    torch.testing.assert_close(NextToken()(tiny_llama, torch.nn.Identity(), padded)["loss"], expected)


@pytest.mark.parametrize("objective", [MatrixOrientation(), HiddenAlignment()])
def test_left_padding_changes_no_mixer_loss(tiny_llama: LlamaForCausalLM, objective: object) -> None:
    """The counted tokens of a padded row give what they give alone."""
    student = LlambaForCausalLM.from_llama(tiny_llama)
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": nn.functional.pad(ids, (4, 0)), "attention_mask": (torch.arange(13) >= 4).long()[None]}
    alone = objective(student, tiny_llama, {"input_ids": ids})["loss"]
    torch.testing.assert_close(objective(student, tiny_llama, padded)["loss"], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [mamba2, llamba])
def test_hidden_match_is_its_parts(make) -> None:  # type: ignore[no-untyped-def]
    """The residual stream after every block, as the models themselves give it, and the KL of their logits."""
    teacher = make().requires_grad_(False)
    student = perturbed(teacher)
    batch = batch_of(length=9) | {"attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][1, 6:] = 0
    mask = loss_mask(batch["input_ids"], None, batch["attention_mask"])
    outputs = []
    for model in (teacher, student):
        stream: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, inputs, output, stream=stream: stream.append(output))
            for layer in model.backbone.layers
        ]
        outputs.append((model(**batch).logits, stream))
        for handle in handles:
            handle.remove()
    kl = token_mean(kl_divergence(outputs[0][0], outputs[1][0], 2.0), mask)
    hidden = relative_hidden_error(outputs[0][1], outputs[1][1], mask)
    terms = HiddenMatch(0.5, 3.0, temperature=2.0)(student, teacher, batch)
    assert list(terms) == ["loss", "kl", "hidden"]
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["hidden"], hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["loss"], 0.5 * kl + 3 * hidden, rtol=1e-5, atol=1e-6)
    found, expected = gradients(student, terms["loss"]), gradients(student, 0.5 * kl + 3 * hidden)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    chunked = HiddenMatch(0.5, 3.0, temperature=2.0, chunk_size=4)(student, teacher, batch)
    torch.testing.assert_close(chunked["loss"], terms["loss"])


def test_hidden_match_leaves_out_what_has_no_weight() -> None:
    teacher = mamba2().requires_grad_(False)
    student = perturbed(teacher)
    assert list(HiddenMatch(hidden_weight=0)(student, teacher, batch_of())) == ["loss", "kl"]
    assert list(HiddenMatch(kl_weight=0)(student, teacher, batch_of())) == ["loss", "hidden"]
    for arguments in ({"kl_weight": 0, "hidden_weight": 0}, {"hidden_weight": -1}, {"kl_weight": math.inf}):
        with pytest.raises(SpikelmError, match="kl_weight and hidden_weight must be finite, >= 0 and not both 0"):
            HiddenMatch(**arguments)
    for temperature in (0, -1, math.nan):
        with pytest.raises(SpikelmError, match="temperature must be finite and > 0"):
            HiddenMatch(temperature=temperature)
    with pytest.raises(SpikelmError, match="chunk_size must be at least 1"):
        HiddenMatch(chunk_size=0)


def test_hidden_match_needs_equal_shapes(tiny_llama: LlamaForCausalLM) -> None:
    deeper = mamba2()
    deeper.backbone.layers.append(copy.deepcopy(deeper.backbone.layers[0]))
    with pytest.raises(SpikelmError, match="differ in tapped layers: 3 against 2"):
        HiddenMatch()(mamba2(), deeper, batch_of())


@pytest.mark.parametrize("make", [mamba2, llamba])
def test_hidden_match_on_16_bit_models(make) -> None:  # type: ignore[no-untyped-def]
    """A Mamba2ForCausalLM in bfloat16 keeps its residual stream in float32."""
    teacher = make().bfloat16().requires_grad_(False)
    student = perturbed(teacher)
    terms = HiddenMatch()(student, teacher, batch_of())
    terms["loss"].backward()
    wide = HiddenMatch()(perturbed(make()), make().requires_grad_(False), batch_of())
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms["loss"], wide["loss"], rtol=0.1, atol=0.02)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.backbone.layers.parameters())
