"""SpAD against its definition, with spiking students and attention teachers, and its projections in a training."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, TrainerCallback

import spikelm
from spikelm.distill import SpAD, spad
from spikelm.distill.callbacks import read_metrics
from spikelm.distill.losses import (
    attention_alignment,
    embedding_alignment,
    feature_alignment,
    hard_target,
    kl_divergence,
    loss_mask,
    next_tokens,
    row_max_scaled,
    teacher_rate,
    token_mean,
)
from spikelm.distill.parameters import projections_attached
from spikelm.distill.taps import Taps, decoder_layers
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.models.bispikclm import BiSpikCLMForCausalLM
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import bispikclm, llamba, mamba2

TERMS = ["embedding", "attention", "feature", "soft", "hard"]
OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "save_steps": 2, "logging_steps": 1}


def opt(layers: int = 2, width: int = 32, heads: int = 4) -> OPTForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=64,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=48,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=64,
            init_std=0.2,
        )
        return OPTForCausalLM(config).eval().requires_grad_(False)


def spiking_llamba(teacher: LlamaForCausalLM) -> LlambaForCausalLM:
    student = LlambaForCausalLM.from_llama(teacher).requires_grad_(True)
    spikelm.spikify(student, spikelm.Recipe.preset("mar"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if not name.endswith("neuron.a"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


def batch_of(rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))}


def uneven_batch() -> dict[str, Tensor]:
    """With padding on both sides, and labels of which some are ignored and none is the input."""
    batch = batch_of()
    batch["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    batch["attention_mask"][1, 4:] = 0
    batch["attention_mask"][2, :2] = 0
    batch["labels"] = (63 - batch["input_ids"]).masked_fill(batch["input_ids"] < 20, -100)
    return batch


def attach(student: nn.Module, teacher: nn.Module, objective: SpAD) -> Any:
    """Projections as train() attaches them, for good, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        student.distillation_projections = objective.build_projections(student, teacher)
    return student.distillation_projections


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def rows(count: int = 10, length: int = 6) -> Dataset:
    return Dataset.from_list([{"input_ids": row} for row in batch_of(count, length, seed=2)["input_ids"].tolist()])


@pytest.mark.parametrize("row_max", [True, False])
@pytest.mark.parametrize("kind", ["bispikclm", "llamba", "spiking llamba"])
def test_it_is_the_weighted_sum_of_its_five_terms(tiny_llama: LlamaForCausalLM, kind: str, row_max: bool) -> None:
    """By the outputs that the models give themselves, maps of state-space mixers from their own inputs."""
    if kind == "bispikclm":
        teacher, student = opt(), bispikclm()
    else:
        teacher = tiny_llama.requires_grad_(False)
        student = spiking_llamba(teacher) if kind == "spiking llamba" else LlambaForCausalLM.from_llama(teacher)
        student.requires_grad_(True)
    objective = SpAD(row_max=row_max, T=3, beta=0.8, v_threshold=0.5, gamma=0.3)
    projections = attach(student, teacher, objective)
    batch = uneven_batch()
    before = teacher.config._attn_implementation
    assert before == "sdpa"
    terms = objective(student, teacher, batch)
    assert list(terms) == ["loss", *TERMS] and teacher.config._attn_implementation == before

    mask = loss_mask(batch["input_ids"], batch["labels"], batch["attention_mask"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"output_hidden_states": True}
    teacher.set_attn_implementation("eager")
    of_teacher = teacher(**inputs, output_attentions=True)
    if kind == "bispikclm":
        of_student = student(**inputs, output_attentions=True)
        maps = of_student.attentions
    else:
        mixers = {str(i): layer.mixer for i, layer in enumerate(decoder_layers(student))}
        with Taps(mixers) as taps:
            of_student = student(**inputs)
        maps = [mixers[i].mixing_matrix(taps.inputs[i], batch["attention_mask"]) for i in mixers]

    def rate(values: Tensor) -> Tensor:
        return teacher_rate(values, 3, 0.8, 0.5)

    expected = dict.fromkeys(TERMS, torch.tensor(0.0))
    expected["embedding"] = embedding_alignment(of_teacher.hidden_states[0], of_student.hidden_states[0], mask)
    for layer in range(2):
        t, s = of_teacher.attentions[layer], maps[layer]
        scaled = row_max_scaled(t) if row_max else t
        expected["attention"] = expected["attention"] + 0.5 * attention_alignment(
            t, rate(scaled), s, mask, gamma=0.3, attention_mask=batch["attention_mask"]
        )
        t, s = of_teacher.hidden_states[layer + 1], of_student.hidden_states[layer + 1]
        projected = projections["features"][layer](s)
        expected["feature"] = expected["feature"] + 0.5 * feature_alignment(t, rate(t), projected, mask, gamma=0.3)
    expected["soft"] = token_mean(kl_divergence(of_teacher.logits, of_student.logits, 2.0), mask)
    expected["hard"] = hard_target(of_student.logits, next_tokens(batch["input_ids"], batch["labels"]), mask)
    for name in TERMS:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    weights = dict(zip(TERMS, (0.2, 0.1, 0.1, 0.3, 0.3), strict=True))
    loss = sum(weights[name] * expected[name] for name in TERMS)
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-5, atol=1e-6)
    found, wanted = gradients(student, terms["loss"]), gradients(student, loss)
    assert found.keys() == wanted.keys() == dict(student.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6, msg=name)
    if kind == "bispikclm":
        assert [name for name, value in found.items() if value.abs().sum() == 0] == []


@pytest.mark.parametrize("name", TERMS)
def test_a_term_without_weight_is_neither_computed_nor_given(name: str) -> None:
    teacher, student, batch = opt(), bispikclm(), uneven_batch()
    everything = SpAD()
    attach(student, teacher, everything)
    whole = everything(student, teacher, batch)
    alone = {f"{other}_weight": float(other == name) for other in TERMS}
    terms = SpAD(**alone)(student, teacher, batch)
    assert list(terms) == ["loss", name]
    torch.testing.assert_close(terms["loss"], whole[name])
    without = SpAD(**{f"{name}_weight": 0.0})
    assert list(without(student, teacher, batch)) == ["loss", *(other for other in TERMS if other != name)]
    if name == "attention":
        # no map is asked for: a teacher without any will do
        teacher = llamba().requires_grad_(False)
        del student.distillation_projections
        attach(student, teacher, without)
        assert "attention" not in without(student, teacher, batch)


def test_nothing_is_projected_without_need() -> None:
    student, objective = bispikclm(), SpAD(feature_weight=0)
    assert len(objective.build_projections(student, opt())) == 0
    assert objective(student, opt(), batch_of())["loss"].isfinite()


def test_projections_do_not_depend_on_dropout_and_keep_the_modes() -> None:
    student, teacher = bispikclm(), opt()
    expected = attach(student, teacher, SpAD())
    teacher.train()  # OPT has dropout, whose random numbers would be drawn first
    found = attach(bispikclm(), teacher, SpAD())
    assert teacher.training and teacher.model.training and not student.model.training
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["bispikclm", "llamba"])
def test_chunks_and_checkpoints_give_the_same_gradients(
    tiny_llama: LlamaForCausalLM, kind: str, checkpointing: bool
) -> None:
    """Padded on the right alone: transformers' eager attention gives NaN for left padding in float64."""
    teacher: Any = opt() if kind == "bispikclm" else tiny_llama
    student: Any = bispikclm() if kind == "bispikclm" else spiking_llamba(tiny_llama)
    teacher, student = teacher.double().requires_grad_(False), student.double()
    projections = attach(student, teacher, SpAD())
    assert all(parameter.dtype == torch.float64 for parameter in projections.parameters())
    batch = {name: value[:2] for name, value in uneven_batch().items()}
    plain = SpAD()(student, teacher, batch)
    plain_gradients = gradients(student, plain["loss"])
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()
    chunked = SpAD(chunk_size=2)(student, teacher, batch)
    torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)
    for name, value in gradients(student, chunked["loss"]).items():
        torch.testing.assert_close(value, plain_gradients.pop(name), rtol=0, atol=1e-10)
    assert not plain_gradients and all(parameter.grad is None for parameter in teacher.parameters())


def test_micro_batches_add_up_to_the_whole() -> None:
    teacher, student, batch = opt(), bispikclm(), uneven_batch()
    attach(student, teacher, SpAD())
    count = loss_mask(batch["input_ids"], batch["labels"], batch["attention_mask"]).sum()
    whole = SpAD()(student, teacher, batch)
    parts = [
        SpAD()(student, teacher, {name: value[where] for name, value in batch.items()}, count)
        for where in (slice(0, 2), slice(2, 3))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, msg=name)


@pytest.mark.parametrize("kind", ["bispikclm", "llamba"])
def test_left_padding_changes_nothing(tiny_llama: LlamaForCausalLM, kind: str) -> None:
    teacher: Any = opt() if kind == "bispikclm" else tiny_llama
    student: Any = bispikclm() if kind == "bispikclm" else LlambaForCausalLM.from_llama(tiny_llama)
    attach(student, teacher, SpAD())
    ids = batch_of(1, 9)["input_ids"]
    padded = {"input_ids": nn.functional.pad(ids, (4, 0)), "attention_mask": (torch.arange(13) >= 4).long()[None]}
    alone = SpAD()(student, teacher, {"input_ids": ids})
    torch.testing.assert_close(SpAD()(student, teacher, padded), alone, rtol=1e-4, atol=1e-5)


def test_16_bit_models() -> None:
    teacher, student = opt().bfloat16(), bispikclm().bfloat16()
    attach(student, teacher, SpAD())
    terms = SpAD()(student, teacher, uneven_batch())
    assert all(value.dtype == torch.float32 for value in terms.values())
    found = gradients(student, terms["loss"])
    assert all(bool(value.isfinite().all()) for value in found.values())
    wide_student = bispikclm()
    attach(wide_student, opt(), SpAD())
    torch.testing.assert_close(terms["loss"], SpAD()(wide_student, opt(), uneven_batch())["loss"], rtol=0.1, atol=0.02)


def test_projections_between_other_widths_heads_and_layers() -> None:
    teacher, student, batch = opt(layers=5, width=48, heads=6), bispikclm(), uneven_batch()
    objective = SpAD(project=True)
    projections = attach(student, teacher, objective)
    assert list(projections) == ["embedding", "heads", "features"]
    shapes = {name: tuple(value.shape) for name, value in projections.named_parameters()}
    assert shapes["embedding.weight"] == (48, 32) and shapes["heads.1.weight"] == (6, 4)
    assert shapes["features.0.0.weight"] == (32, 32) and shapes["features.0.2.weight"] == (48, 32)
    assert (projections["heads"][0].weight == 1 / 4).all() and len(projections["features"]) == 2
    terms = objective(student, teacher, batch)
    found = gradients(student, terms["loss"])
    assert all(found[f"distillation_projections.{name}"].abs().sum() > 0 for name in shapes)

    # layers 1 and 2 of the student's two against 3 and 5 of the teacher's five
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"output_hidden_states": True}
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        of_teacher, of_student = (m(**inputs, output_attentions=True) for m in (teacher, student))
        mask = loss_mask(batch["input_ids"], batch["labels"], batch["attention_mask"])
        features, maps = torch.zeros(()), torch.zeros(())
        for layer, other in ((0, 2), (1, 4)):
            t = of_teacher.hidden_states[other + 1]
            projected = projections["features"][layer](of_student.hidden_states[layer + 1])
            features = features + feature_alignment(t, teacher_rate(t, 4, 0.9, 1.0), projected, mask) / 2
            t = of_teacher.attentions[other]
            rate = teacher_rate(row_max_scaled(t), 4, 0.9, 1.0)
            mean = of_student.attentions[layer].mean(1, keepdim=True).expand(-1, 6, -1, -1)
            maps = maps + attention_alignment(t, rate, mean, mask, attention_mask=batch["attention_mask"]) / 2
        embedded = projections["embedding"](of_student.hidden_states[0])
        torch.testing.assert_close(
            terms["embedding"].detach(), embedding_alignment(of_teacher.hidden_states[0], embedded, mask)
        )
    torch.testing.assert_close(terms["feature"].detach(), features)
    torch.testing.assert_close(terms["attention"].detach(), maps)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"layers": 3}, "number of layers: 3 against 2"),
        ({"width": 48}, "width of the embeddings: 48 against 32"),
        ({"heads": 2}, "number of heads: 2 against 4"),
    ],
)
def test_another_shape_is_an_error_without_project(shape: dict[str, int], message: str, tmp_path: Path) -> None:
    student = bispikclm()
    with pytest.raises(SpikelmError, match=f"{message}; with project=True"):
        train(student, opt(**shape), rows(), SpAD(), output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists() and not hasattr(student, "distillation_projections")
    with pytest.raises(SpikelmError, match=f"{message}; with project=True"):
        SpAD(feature_weight=0)(student, opt(**shape), batch_of())


def test_missing_projections_are_named() -> None:
    with pytest.raises(SpikelmError, match=r"student.distillation_projections = objective.build_projections"):
        SpAD()(bispikclm(), opt(), batch_of())


@pytest.mark.parametrize("make", [mamba2, llamba])
def test_a_teacher_without_maps_is_refused(make: Any) -> None:
    with pytest.raises(
        SpikelmError, match=r"teacher \w+ForCausalLM gives no attention maps.*attention_weight=0 leaves"
    ):
        SpAD().build_projections(bispikclm(), make())


def test_a_teacher_that_stays_with_another_attention_is_told_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = opt()
    monkeypatch.setattr(type(teacher), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(SpikelmError, match="stays with 'sdpa': load it with attn_implementation=\"eager\"; at"):
        SpAD().build_projections(bispikclm(), teacher)


def test_a_student_without_maps_is_refused() -> None:
    with pytest.raises(SpikelmError, match="student Mamba2ForCausalLM gives no attention maps and its mixers have no"):
        SpAD().build_projections(mamba2(), opt())
    student = opt(width=16)
    with pytest.raises(SpikelmError, match='of a softmax student, give it attn_implementation="eager"'):
        SpAD(project=True).build_projections(student, opt())
    student.set_attn_implementation("eager")
    assert SpAD(project=True).build_projections(student, opt())["embedding"].weight.shape == (32, 16)


def test_the_switch_to_eager_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    spad._say_that_it_is_switched.cache_clear()
    teacher, student = opt(), bispikclm()
    with caplog.at_level(logging.WARNING, logger="spikelm.distill.spad"):
        attach(student, teacher, SpAD())
        SpAD()(student, teacher, batch_of())
    said = [record.getMessage() for record in caplog.records if record.name == "spikelm.distill.spad"]
    assert said == ["the attention of OPTForCausalLM is switched from sdpa to eager in each forward pass, for its maps"]


def test_a_student_wrapped_without_its_projections_is_refused() -> None:
    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # the real one wants other processes
            nn.Module.__init__(self)
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    teacher, student = opt(), bispikclm()
    attach(student, teacher, SpAD())
    with pytest.raises(SpikelmError, match="SpAD calls parts of the student by themselves"):
        SpAD()(Wrapper(student), teacher, batch_of())
    del student.distillation_projections
    assert SpAD(feature_weight=0)(Wrapper(student), teacher, batch_of())["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_weight": -1.0}, "embedding_weight, .* >= 0 and not all 0"),
        ({f"{name}_weight": 0.0 for name in TERMS}, "not all 0"),
        ({"soft_weight": float("nan")}, "must be finite"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], given 1.5"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"T": 0}, "T must be a whole number >= 1, given 0"),
        ({"T": 2.5}, "T must be a whole number"),
        ({"beta": 0.0}, "beta"),
        ({"v_threshold": -1.0}, "v_threshold"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_its_values_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        SpAD(**options)


def test_projections_leave_the_student_after_an_error_and_stay_where_they_were() -> None:
    teacher, student = opt(), bispikclm()
    with pytest.raises(RuntimeError, match="broken"), projections_attached(student, teacher, SpAD()):
        assert len(student.distillation_projections["features"]) == 2
        raise RuntimeError("broken")
    assert not hasattr(student, "distillation_projections")
    own = attach(student, teacher, SpAD())
    with projections_attached(student, teacher, SpAD()):
        assert student.distillation_projections is own
    assert student.distillation_projections is own


class Break(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("broken")


def trained(output_dir: Path, **more: Any) -> BiSpikCLMForCausalLM:
    student = bispikclm()
    torch.manual_seed(5)  # of the projections
    train(student, opt(layers=3), rows(), SpAD(project=True), output_dir=output_dir, **OPTIONS, **more)
    return student


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken"):
        trained(tmp_path / "broken", callbacks=[Break()])
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    torch.manual_seed(77)  # a checkpoint decides over new projections
    student = bispikclm()
    train(student, opt(layers=3), rows(), SpAD(project=True), output_dir=tmp_path / "broken", **OPTIONS)
    curves = [
        [{name: line[name] for name in ("step", "loss", "grad_norm", *TERMS)} for line in read_metrics(path)]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "broken" / "log.jsonl")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), whole.parameters(), strict=True))
    files = [load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in ("whole", "broken")]
    projections = [name for name in files[0] if name.startswith("distillation_projections.features.")]
    assert len(projections) == 2 * 6 and files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in projections)
    again = trained(tmp_path / "whole")  # finished: loaded, not repeated
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_projections_train_whatever_is_trainable_and_the_student_is_left_clean(tmp_path: Path) -> None:
    student = bispikclm()
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(5)
    train(student, opt(), rows(), SpAD(), output_dir=tmp_path / "run", trainable=["*.fc1.*"], **OPTIONS)
    after = student.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.fc1.{kind}" for i in range(2) for kind in ("weight", "bias")}
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    torch.manual_seed(5)
    fresh = SpAD().build_projections(bispikclm(), opt())
    assert all(
        not torch.equal(value, saved[f"distillation_projections.{name}"]) for name, value in fresh.named_parameters()
    )
    student.save_pretrained(tmp_path / "saved")
    assert not any("projections" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    assert BiSpikCLMForCausalLM.from_pretrained(tmp_path / "saved").num_parameters() == student.num_parameters()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    student = bispikclm(hidden_size=16, num_attention_heads=2, initializer_gain=0.577, initializer_range=0.02)
    teacher = opt(width=16, heads=2)
    train(
        student,
        teacher,
        rows(4),
        SpAD(),
        output_dir=tmp_path,
        steps=40,
        batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
    )
    lines = read_metrics(tmp_path / "log.jsonl")
    for name in ("loss", "embedding", "attention", "feature", "hard"):  # a random teacher's logits oppose the text
        first, last = (sum(line[name] for line in part) for part in (lines[:4], lines[-4:]))
        assert last < 0.97 * first, name
