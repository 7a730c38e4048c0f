"""SpikingBert: spikes against the rate network, gradients, feedback, packing, loading."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import spikelm.models.spikingbert.modeling_spikingbert as modeling
from spikelm.data.embedded_classification import train_wordpiece
from spikelm.deploy import deploy
from spikelm.equilibrium import ConvergenceError, ConvergenceWarning
from spikelm.errors import SpikelmError
from spikelm.layers.bit_linear import BitLinear
from spikelm.models.spikingbert import (
    SpikingBertConfig,
    SpikingBertForSequenceClassification,
    from_bert,
    with_weights,
)
from spikelm.models.spikingbert.readings import Rates
from tests.small_models import bert, spikingbert

LABELS = torch.tensor([0, 1, 1])


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ---- spikes


def test_populations() -> None:
    """Six a layer, and the input's; every one fires."""
    with torch.no_grad():
        rates = spikingbert()(**tokens(), output_rates=True).firing_rates
    assert len(rates) == 13 and all(0 < rate < 1 for rate in rates.values())


@torch.no_grad()
def test_one_step_by_hand() -> None:
    """A layer at one time step, written out.

    Not from rest: where the values of all keys fire, softmax v is 1 but for rounding, which would be a tie.
    """
    layer, x = spikingbert(initial_membrane=0.25).double().bert.layers[0], torch.randint(0, 2, (1, 2, 5, 32)).double()

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(2, 5, 4, 8).transpose(1, 2)

    fire = lambda current: (current + 0.25 >= 1).double()  # noqa: E731
    k, v, q = heads(fire(layer.key(x[0]))), heads(fire(layer.value(x[0]))), heads(layer.query(x[0]))
    c = fire((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32)
    h = fire(layer.attention_norm(layer.attention_output(c) + x[0]))
    m = fire(torch.nn.functional.gelu(layer.intermediate(h)))
    expected = fire(layer.output_norm(layer.output(m) + h))
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    assert torch.equal(layer(x, mask, modeling.Spikes(True))[0], expected)


def test_spikes_tend_to_the_rate_network_where_every_step_is_alike() -> None:
    """Rates of populations whose inputs are constant, and a gap that falls with T everywhere."""
    model = spikingbert()
    with torch.no_grad():
        outputs = model.outputs_after((8, 32, 128), **tokens())
    for steps, output in outputs.items():
        assert output.rate_gaps["input_neuron"] <= 1 / steps
    gaps = [torch.stack(list(output.rate_gaps.values())).mean() for output in outputs.values()]
    assert gaps[0] > gaps[1] > gaps[2]


def test_outputs_after_are_those_of_separate_runs() -> None:
    model = spikingbert(steps_at_once=3)
    with torch.no_grad():
        together = model.outputs_after((8, 5), **tokens())
        for T, output in together.items():
            alone = model(**tokens(), T=T, output_rates=True)
            assert torch.equal(output.logits, alone.logits)
            assert output.firing_rates == alone.firing_rates


@pytest.mark.parametrize("mode", ["spiking", "rate"])
def test_padding_changes_nothing(mode: str) -> None:
    model, batch = spikingbert(), tokens()
    other = batch["input_ids"].clone()
    other[0, 6:] = 7
    with torch.no_grad():
        logits = model(**batch, mode=mode).logits
        assert torch.equal(logits, model(other, batch["attention_mask"], mode=mode).logits)
        alone = model(batch["input_ids"][:1, :6], mode=mode).logits
    torch.testing.assert_close(logits[:1], alone)


def test_initial_membrane_brings_spikes_nearer_to_the_rates() -> None:
    gaps = []
    for initial_membrane in (0.0, 0.5):
        with torch.no_grad():
            output = spikingbert(initial_membrane=initial_membrane).outputs_after((16,), **tokens())[16]
        gaps.append(torch.stack(list(output.rate_gaps.values())).mean())
    assert gaps[1] < gaps[0]


# ---- gradients


def test_training_has_the_spiking_values_and_the_rate_networks_gradient() -> None:
    """out = F + (asr - F).detach(), against the same network with the measured rates written in by hand."""
    model, batch = spikingbert(classifier_dropout=0.0).double().train(), tokens()
    output = model(**batch, labels=LABELS)
    with torch.no_grad():
        assert torch.equal(output.logits, model.eval()(**batch).logits)
    gradients = torch.autograd.grad(output.loss, list(model.bert.layers.parameters()))
    current, real = model.bert._input(batch["input_ids"], batch["attention_mask"], None, None, None)
    measured = model.bert.simulate(current, real, (8,))[8]

    class ByHand(Rates):
        def __call__(self, population, current):  # type: ignore[no-untyped-def]
            rate = current.clamp(0, 1)
            return rate + (measured[population] - rate).detach()

    hidden = model.bert._layers(current, real, ByHand())
    loss = torch.nn.functional.cross_entropy(model.classifier(model.bert.pooler(hidden[-1])), LABELS)
    for ours, by_hand in zip(gradients, torch.autograd.grad(loss, list(model.bert.layers.parameters())), strict=True):
        torch.testing.assert_close(ours, by_hand)


def test_gaps_are_logged_in_training() -> None:
    output = spikingbert().train()(**tokens(), labels=LABELS)
    assert set(output.rate_gaps) == set(output.firing_rates) and all(gap > 0 for gap in output.rate_gaps.values())
    assert spikingbert().train()(**tokens(), mode="rate").rate_gaps is None


def test_dropout_in_training_of_the_rate_network_alone() -> None:
    model = spikingbert(hidden_dropout_prob=0.5, classifier_dropout=0.0)
    with torch.no_grad():
        reference = model(**tokens(), mode="rate").logits
        model.train()
        assert not torch.equal(model(**tokens(), mode="rate").logits, reference)
        assert torch.equal(model(**tokens()).logits, model.eval()(**tokens()).logits)


# ---- feedback


def contraction(**arguments: object) -> SpikingBertForSequenceClassification:
    model = spikingbert(feedback=True, classifier_dropout=0.0, solver_tolerance=1e-10, **arguments).double()
    with torch.no_grad():
        model.bert.feedback.weight.normal_(std=0.03, generator=torch.Generator().manual_seed(0))
    return model


def test_without_feedback_no_fixed_point_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr(modeling, "equilibrium", refuse)
    model = spikingbert().train()
    for mode in ("rate", "spiking"):
        output = model(**tokens(), mode=mode, labels=LABELS, output_rates=True)
        output.loss.backward()
        assert output.solutions is None
    with pytest.raises(AssertionError, match="solved"):
        contraction().train()(**tokens(), mode="rate", labels=LABELS)


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point"])
def test_implicit_gradient_is_the_unrolled_one(method: str) -> None:
    model, batch = contraction(mode="rate", solver_method=method, solver_max_iterations=200), tokens()
    output = model(**batch, labels=LABELS, output_rates=True)
    parameters = {name: p for name, p in model.named_parameters() if "pooler" not in name and "classifier" not in name}
    implicit = torch.autograd.grad(output.loss, parameters.values())
    assert output.solutions["forward"].converged and output.solutions["backward"].converged
    current, real = model.bert._input(batch["input_ids"], batch["attention_mask"], None, None, None)
    z = torch.zeros_like(current)
    for _ in range(60):
        z = model.bert._layers(current + model.bert.feedback(z), real, Rates())[-1]
    loss = torch.nn.functional.cross_entropy(model.classifier(model.bert.pooler(z)), LABELS)
    torch.testing.assert_close(output.loss, loss, rtol=1e-8, atol=0)
    for name, ours, unrolled in zip(parameters, implicit, torch.autograd.grad(loss, parameters.values()), strict=True):
        assert (ours - unrolled).norm() <= 1e-6 * unrolled.norm(), name


def test_feedback_reaches_spikes_and_their_training() -> None:
    model = contraction(T=64)
    with torch.no_grad():
        fed = model(**tokens()).logits
        model.bert.feedback.weight.mul_(0)
        assert not torch.equal(fed, model(**tokens()).logits)
    model = contraction(T=8).train()
    output = model(**tokens(), labels=LABELS)
    output.loss.backward()
    assert model.bert.feedback.weight.grad.abs().sum() > 0
    assert list(output.solutions) == ["backward"]


def test_feedback_starts_at_nothing() -> None:
    with torch.no_grad():
        assert spikingbert(feedback=True).bert.feedback.weight.abs().max() == 0


def test_no_convergence_goes_on_or_stops_as_configured() -> None:
    def expanding(on_failure: str) -> SpikingBertForSequenceClassification:
        model = spikingbert(
            feedback=True, solver_max_iterations=3, solver_tolerance=1e-12, solver_on_failure=on_failure
        )
        with torch.no_grad():
            model.bert.feedback.weight.normal_(std=6.0, generator=torch.Generator().manual_seed(0))
        return model.train()

    with pytest.warns(ConvergenceWarning, match="residual"):
        output = expanding("warn")(**tokens(), mode="rate", labels=LABELS)
    assert not output.solutions["forward"].converged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        output.loss.backward()
    with pytest.raises(ConvergenceError, match="residual"):
        expanding("raise")(**tokens(), mode="rate", labels=LABELS)


# ---- weights


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_packed_is_bit_equal_and_comes_back(weights: str, per_row: bool, tmp_path: Path) -> None:
    model = spikingbert(weights=weights, per_row=per_row)
    with torch.no_grad():
        expected = model(**tokens())
        model.save_pretrained(tmp_path / "masters")
        deploy(model, form="packed").save_pretrained(tmp_path / "packed")
        for loaded in (
            model,
            SpikingBertForSequenceClassification.from_pretrained(tmp_path / "masters"),
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"),
        ):
            assert torch.equal(loaded(**tokens()).logits, expected.logits)
    assert model.config.packed and all(layer.packed for layer in model.modules() if isinstance(layer, BitLinear))
    torch.save(expected.logits, tmp_path / "expected.pt")
    torch.save(tokens(), tmp_path / "tokens.pt")
    code = f"""
import torch, spikelm.models
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "packed")!r}).eval()
with torch.no_grad():
    logits = model(**torch.load({str(tmp_path / "tokens.pt")!r})).logits
assert torch.equal(logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    if weights == "ternary":
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@torch.no_grad()
@pytest.mark.parametrize("per_row", [False, True])
def test_folded_scale_gives_the_same_spikes(per_row: bool) -> None:
    """In float64 no membrane lies within rounding of the threshold here."""
    model = spikingbert(weights="ternary", per_row=per_row).double()
    folded = model(**tokens())
    model.config.fold_scale = False
    assert torch.equal(model(**tokens()).logits, folded.logits)


def test_quantised_copy_keeps_the_masters() -> None:
    model = spikingbert()
    copy = with_weights(model, "ternary", per_row=True)
    assert copy.config.weights == "ternary" and copy.config.per_row and model.config.weights == "float"
    for name, value in model.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name])
    assert with_weights(copy, "binary").config.per_row, "what is not named stays"
    for settings in ({"num_hidden_layers": 1}, {"feedback": True}):
        with pytest.raises(SpikelmError, match="settings must leave the student's shape as it is"):
            with_weights(model, "ternary", **settings)
    with pytest.raises(SpikelmError, match="no float masters"):
        with_weights(deploy(copy, form="packed"), "binary")


# ---- from a BERT


def test_from_bert_takes_the_last_layer_of_each_block() -> None:
    teacher = bert()
    student = from_bert(teacher, num_hidden_layers=2, T=4)
    assert torch.equal(student.bert.layers[0].key.weight, teacher.bert.encoder.layer[1].attention.self.key.weight)
    assert torch.equal(student.bert.layers[1].output.weight, teacher.bert.encoder.layer[3].output.dense.weight)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    first = from_bert(teacher.bert, layers=[0])
    assert torch.equal(first.bert.layers[0].query.bias, teacher.bert.encoder.layer[0].attention.self.query.bias)


def test_from_bert_follows_its_source() -> None:
    student = from_bert(bert().train().double())
    assert student.training and student.dtype == torch.float64 and not from_bert(bert()).training
    names = {0: "bad", 1: "good", 2: "neither"}
    assert from_bert(bert().bert, id2label=names).classifier.out_features == 3


def test_from_bert_is_bert_but_for_the_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity in place of every population it computes what BERT computes."""
    teacher = bert()
    student = from_bert(teacher, mode="rate").eval()
    monkeypatch.setattr(modeling.EquilibriumIF, "rate", lambda self, current: current)
    with torch.no_grad():
        torch.testing.assert_close(student(**tokens()).logits, teacher(**tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is the checkpoint's 32; got 64"),
        ({"num_hidden_layers": 3}, "4 layers must be a multiple of num_hidden_layers; got 3"),
        ({"layers": [1, 4]}, r"layers must be within 0\.\.3; got \[1, 4\]"),
        ({"num_labels": 5}, "num_labels is the checkpoint's 2; got 5"),
        ({"layers": [1], "num_hidden_layers": 2}, "num_hidden_layers 2 does not go with 1 layers"),
    ],
)
def test_from_bert_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        from_bert(bert(), **settings)
    with pytest.raises(SpikelmError, match="takes a model of type 'bert'; got 'spikingbert'"):
        from_bert(spikingbert())


# ---- transformers


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(dtype: torch.dtype, packed: bool, tmp_path: Path) -> None:
    model = spikingbert(weights="ternary")
    if packed:
        deploy(model, form="packed")
    model.save_pretrained(tmp_path)
    for half in (model.to(dtype), SpikingBertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)):
        with torch.no_grad():
            assert half.eval()(**tokens()).logits.dtype == dtype
        if not packed:
            half.train()(**tokens(), labels=LABELS).loss.backward()
            assert half.bert.layers[0].key.weight.grad.isfinite().all()


def test_bf16_autocast_trains() -> None:
    model = spikingbert().train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**tokens(), labels=LABELS).loss.backward()
    assert model.bert.layers[0].key.weight.grad.abs().sum() > 0


def test_damaged_and_incomplete_packed_files(tmp_path: Path) -> None:
    model = deploy(spikingbert(weights="ternary"), form="packed")
    model.save_pretrained(tmp_path)
    assert not any(p.requires_grad for p in SpikingBertForSequenceClassification.from_pretrained(tmp_path).parameters())
    file = tmp_path / "model.safetensors"
    tensors, name = load_file(file), "bert.layers.1.key.packed_weight"
    save_file(tensors | {name: torch.full_like(tensors[name], 255)}, file, metadata={"format": "pt"})
    with pytest.raises(SpikelmError, match="the checkpoint is damaged: bert.layers.1.key"):
        SpikingBertForSequenceClassification.from_pretrained(tmp_path)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SpikelmError, match=f"the checkpoint has no {name}"):
        SpikingBertForSequenceClassification.from_pretrained(tmp_path)


def test_pipeline_in_batches(tmp_path: Path) -> None:
    model = spikingbert(vocab_size=300, max_position_embeddings=32, output_hidden_states=True)
    tokenizer = train_wordpiece(["a good film", "a bad film"] * 9, 300)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    alone = [classify(text)[0] for text in ("a good film", "bad")]
    for one, together in zip(alone, classify(["a good film", "bad"], batch_size=2), strict=True):
        assert one["label"] == together["label"] and one["score"] == pytest.approx(together["score"], abs=1e-5)


def test_plain_trainer(tmp_path: Path) -> None:
    """Accumulation does not scale the gradient, evaluation gets logits alone."""
    rows = [{"input_ids": [1, 2, 3 + i], "attention_mask": [1] * 3, "labels": i % 2} for i in range(8)]
    norms = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = spikingbert(classifier_dropout=0.0, mode="rate")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], logging_steps=1, **options)
        measure = lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}  # noqa: E731
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=measure)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
        assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_auto_classes(tmp_path: Path) -> None:
    model = spikingbert(weights="ternary")
    model.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**tokens(), output_hidden_states=True)
        assert torch.equal(encoder(**tokens()).last_hidden_state, expected.hidden_states[-1])
    assert not isinstance(encoder, BertModel) and len(expected.hidden_states) == 3


def test_tuples_and_scores() -> None:
    model = spikingbert()
    with torch.no_grad():
        output = model(**tokens(), output_attention_scores=True)
        assert torch.equal(model(**tokens(), return_dict=False)[0], model(**tokens()).logits)
    assert [tuple(scores.shape) for scores in output.attention_scores] == [(3, 4, 10, 10)] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("T", 0),
        ("mode", "both"),
        ("weights", "2-bit"),
        ("initial_membrane", 1.0),
        ("v_threshold", 0.0),
        ("num_attention_heads", 5),
        ("packed", True),
        ("solver_method", "newton"),
        ("steps_at_once", 0),
    ],
)
def test_bad_configuration(field: str, value: object) -> None:
    with pytest.raises(SpikelmError, match=field.removeprefix("solver_")):
        SpikingBertConfig(**{field: value})


def test_bad_inputs() -> None:
    model, batch = spikingbert(), tokens()
    for labels, given in (([0, 1, 2], "got 2"), ([0, -1, 1], "got -1")):
        with pytest.raises(SpikelmError, match=rf"labels must be within 0\.\.1 \(num_labels 2\); {given}"):
            model(**batch, labels=torch.tensor(labels))
    with pytest.raises(SpikelmError, match="labels must be classes"):
        model(**batch, labels=torch.rand(3))
    with pytest.raises(SpikelmError, match="T must be integers >= 1; got \\[0\\]"):
        model(**batch, T=0)
    with pytest.raises(SpikelmError, match="mode must be one of spiking, rate; got 'both'"):
        model(**batch, mode="both")
    with pytest.raises(SpikelmError, match="17 tokens are beyond the 16 positions"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(SpikelmError, match="either input_ids or inputs_embeds"):
        model(attention_mask=batch["attention_mask"])
