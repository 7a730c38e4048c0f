"""InternalKD: its terms against slow loops, its stages, and its training on the shared trainer."""

import json
from pathlib import Path

import pytest
import torch

from spikelm.data.classification import collate_classification
from spikelm.distill import InternalKD
from spikelm.distill.internal_kd import hidden_error, score_error, soft_error, teacher_outputs
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.models.spikingbert import from_bert
from tests.small_models import bert, spikingbert

REAL = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def batch(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "input_ids": torch.randint(
                1, 64, (int(torch.randint(3, 12, (), generator=generator)),), generator=generator
            ),
            "labels": number % 2,
        }
        for number in range(count)
    ]
    return collate_classification([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])


def states(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 3, generator=generator) for _ in range(count)]


def test_hidden_error_against_a_loop() -> None:
    """Student {0, 1, 2} against teacher {0, 2, 4}: the mean over a sentence's own tokens, added over sentences."""
    teacher, student = states(5, 0), states(3, 1)
    expected = 0.0
    for sentence, length in enumerate((3, 4)):
        errors = [
            ((student[layer][sentence, token] - teacher[2 * layer][sentence, token]) ** 2).mean().item()
            for layer in range(3)
            for token in range(length)
        ]
        expected += sum(errors) / len(errors)
    assert hidden_error(teacher, student, torch.nn.Identity(), REAL).item() == pytest.approx(expected, rel=1e-5)


def test_score_error_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = ([torch.randn(2, 2, 4, 4, generator=generator) for _ in range(n)] for n in (4, 2))
    expected = 0.0
    for sentence, length in enumerate((3, 4)):
        errors = [
            ((student[layer] - teacher[2 * layer + 1])[sentence, :, query, key] ** 2).mean().item()
            for layer in range(2)
            for query in range(length)
            for key in range(length)
        ]
        expected += sum(errors) / len(errors)
    assert score_error(teacher, student, REAL).item() == pytest.approx(expected, rel=1e-5)


def test_soft_error_is_cross_entropy() -> None:
    teacher, student = torch.randn(2, 5, 3, dtype=torch.float64).float()
    expected = torch.nn.functional.cross_entropy(student / 2, (teacher / 2).softmax(-1), reduction="sum") * 4
    torch.testing.assert_close(soft_error(teacher, student, 2.0), expected)


def test_teacher_scores_are_those_before_its_softmax() -> None:
    teacher, inputs = bert(), batch()
    inputs.pop("labels")
    teacher.set_attn_implementation("eager")
    _, scores = teacher_outputs(teacher, inputs, True)
    with torch.no_grad():
        maps = teacher(**inputs, output_attentions=True).attentions
    mask = torch.zeros(scores[0].shape).masked_fill(inputs["attention_mask"][:, None, None, :] == 0, -torch.inf)
    assert len(scores) == 4
    for score, expected in zip(scores, maps, strict=True):
        torch.testing.assert_close((score + mask).softmax(-1), expected)


def with_projection(kd: InternalKD, student: torch.nn.Module, teacher: torch.nn.Module) -> torch.nn.Module:
    student.add_module("distillation_projections", kd.build_projections(student, teacher))
    return student


@pytest.mark.parametrize("mode", ["rate", "spiking"])
@pytest.mark.parametrize("stage", ["general", "internal", "prediction"])
def test_stages_and_micro_batches(stage: str, mode: str) -> None:
    """Two halves, each over the sentences of both, are the whole; the terms are the weighted loss."""
    kd, teacher = InternalKD.stage(stage, hard_weight=0.5), bert()
    student = with_projection(
        kd, from_bert(teacher, num_hidden_layers=2, mode=mode, T=8, classifier_dropout=0.0), teacher
    )
    student.train()
    whole = batch()
    whole["attention_mask"][:] = 1  # so that sentences weigh alike in means over tokens, as the gaps are
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 3), slice(3, 6))]
    total = kd(student, teacher, whole)
    parts = [kd(student, teacher, half, torch.tensor(6)) for half in halves]
    for name, value in total.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)
    terms = {name for name in total if "." not in name}
    assert ("rate_gap.layers.1" in total) == (mode == "spiking")
    assert terms - {"loss"} == {"hard"} | ({"soft"} if stage == "prediction" else {"hidden", "attention"})
    weighted = sum(getattr(kd, f"{name}_weight") * value for name, value in total.items() if name in terms - {"loss"})
    torch.testing.assert_close(total["loss"], weighted)


def test_widths_may_differ() -> None:
    kd, teacher = InternalKD(attention_weight=0.0), bert(hidden_size=48)
    student = with_projection(kd, spikingbert(mode="rate"), teacher)
    kd(student, teacher, batch())["loss"].backward()
    assert student.distillation_projections.weight.shape == (48, 32)
    assert student.distillation_projections.weight.grad.abs().sum() > 0


def test_gap_and_residual_are_logged() -> None:
    kd, teacher = InternalKD.stage("prediction"), bert()
    terms = kd(spikingbert().train(), teacher, batch())
    assert all(terms[f"rate_gap.{layer}"] > 0 for layer in ("input", "layers.0", "layers.1"))
    fed = spikingbert(feedback=True, mode="rate", solver_max_iterations=100).train()
    with torch.no_grad():
        fed.bert.feedback.weight.normal_(std=0.03, generator=torch.Generator().manual_seed(0))
    assert 0 <= kd(fed, teacher, batch())["residual"] <= 1e-4


def test_training_on_the_shared_trainer(tmp_path: Path) -> None:
    """Loss falls, sentences are counted, the projection is taken off, the same seed gives the same student."""
    teacher, rows = bert(), []
    for seed in range(8):
        part = batch(8, seed)
        for ids, mask, label in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            length = int(mask.sum())
            rows.append({"input_ids": ids[:length].tolist(), "attention_mask": [1] * length, "labels": int(label)})
    students = []
    for run in ("first", "second"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = from_bert(teacher, num_hidden_layers=2, mode="rate", weights="ternary", classifier_dropout=0.0)
        train(
            student, teacher, rows, InternalKD(), output_dir=tmp_path / run, steps=40, batch_size=8,
            learning_rate=3e-3, data_collator=collate_classification, group_by_length=True, save_steps=1000,
        )  # fmt: skip
        assert not hasattr(student, "distillation_projections")
        students.append(student)
    log = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["sentences_per_second"] > 0
    for first, second in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight must be finite and >= 0, given -1"),
        ({"hidden_weight": 0.0, "attention_weight": 0.0}, "at least one of hidden_weight, .* must be > 0"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, given 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        InternalKD(**arguments)


def test_bad_pairs() -> None:
    with pytest.raises(SpikelmError, match="stage must be one of general, internal, prediction; got 'last'"):
        InternalKD.stage("last")
    kd = InternalKD()
    for teacher, message in (
        (bert(num_attention_heads=2), "their heads must agree, or attention_weight be 0"),
        (bert(num_hidden_layers=3), "the teacher's 3 layers must be a multiple of the student's 2"),
    ):
        with pytest.raises(SpikelmError, match=message):
            kd(with_projection(kd, spikingbert(mode="rate"), teacher), teacher, batch())
    with pytest.raises(SpikelmError, match="the teacher has 3 classes, the student 2"):
        InternalKD.stage("prediction")(spikingbert(mode="rate"), bert(num_labels=3), batch())
    with pytest.raises(SpikelmError, match="the teacher must be a BERT of transformers; got a SpikingBert"):
        kd(with_projection(kd, spikingbert(mode="rate"), bert()), spikingbert(), batch())
    unlabelled = batch()
    unlabelled.pop("labels")
    with pytest.raises(SpikelmError, match="hard_weight takes a batch with labels"):
        InternalKD(0, 0, 0, 1.0)(spikingbert(mode="rate"), bert(), unlabelled)
