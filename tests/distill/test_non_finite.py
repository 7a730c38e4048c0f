"""Updates whose loss or gradient is not finite: left out, counted and kept, up to a limit."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from spikelm import plot
from spikelm.distill.callbacks import read_metrics
from spikelm.distill.objectives import LogitDistillation
from spikelm.distill.trainer import DistillationTrainer, train
from spikelm.errors import SpikelmError
from tests.distill.small_training import OPTIONS, StopAt, curve, rows, student_of, weights


class NanAt:
    """The KL, not a number at some calls, whose batches are kept; with "gradient" only its gradient is not."""

    def __init__(self, *calls: int, where: str = "loss") -> None:
        self.calls, self.where, self.count = calls, where, 0
        self.batches: list[Tensor] = []

    def __call__(self, student: nn.Module, teacher: nn.Module, batch: Any, num_items: Any = None) -> dict[str, Tensor]:
        """The loss and a term."""
        self.count += 1
        loss = LogitDistillation()(student, teacher, batch, num_items)["loss"]
        if self.count in self.calls:
            self.batches.append(batch["input_ids"].clone())
            if self.where == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return {"loss": loss, "divergence": loss.detach()}


class WithoutStep(TrainerCallback):
    """The control: takes the gradients away before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the optimizer's step."""
        if state.global_step + 1 == self.step:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_bad_update_is_left_out_counted_and_its_batch_kept(
    where: str, logging_steps: int, tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective, student, control = NanAt(5, where=where), student_of(tiny_llama), student_of(tiny_llama)
    options = OPTIONS | {"logging_steps": logging_steps}
    result = train(student, tiny_llama, rows(), objective, output_dir=tmp_path / "bad", **options)
    train(control, tiny_llama, rows(), NanAt(), output_dir=tmp_path / "c", callbacks=[WithoutStep(5)], **options)
    assert result["skipped_updates"] == 1 and result["steps"] == 8
    assert all(torch.equal(value, weights(control)[name]) for name, value in student.named_parameters())
    path = tmp_path / "bad" / "non_finite" / "step-5.safetensors"
    assert "at step 5: this update is left out (1 of at most 3)" in caplog.text and str(path) in caplog.text
    with safetensors.safe_open(path, "pt") as saved:
        assert torch.equal(saved.get_tensor("micro_batch_0.input_ids"), objective.batches[0])
        assert saved.metadata()["step"] == "5" and "is" in saved.metadata()["problem"]
    check_logs(tmp_path, logging_steps, where)
    plot.loss_curves({"bad": tmp_path / "bad" / "log.jsonl"}, tmp_path / "curve.png")


def check_logs(directory: Path, logging_steps: int, where: str) -> None:
    """No NaN in them; a line without a finite loss has none, and means are over the others."""
    text = (directory / "bad" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    bad, good = curve(directory / "bad"), curve(directory / "c")
    assert [line["skipped_updates"] for line in bad] == [int(line["step"] >= 5) for line in bad]
    for line, control in zip(bad, good, strict=True):
        assert ("loss" in line) == ("divergence" in line)
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["divergence"])
        if line["step"] == 5:
            assert "grad_norm" not in line and ("loss" in line) == (where == "gradient")
        elif where == "gradient" or line["step"] < 5 or logging_steps == 1:
            assert line | {"skipped_updates": 0} == control


def test_beyond_the_limit_it_stops_and_says_where_everything_is(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    student = student_of(tiny_llama)
    with pytest.raises(SpikelmError) as caught:
        options = OPTIONS | {"max_skipped_updates": 2}
        train(student, tiny_llama, rows(), NanAt(2, 5, 7), output_dir=tmp_path, **options)
    message = str(caught.value)
    assert "the loss is nan at step 7, and 2 were left out before; its batch is in" in message
    assert f"{tmp_path}/non_finite/step-7.safetensors (last whole checkpoint: {tmp_path}/checkpoint-6)" in message
    assert "likely cause: " in message
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_none_is_left_out_where_none_may_be(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match=r"the loss is nan at step 5; its batch is in .*step-5.safetensors \(last"):
        options = OPTIONS | {"max_skipped_updates": 0}
        train(student_of(tiny_llama), tiny_llama, rows(), NanAt(5), output_dir=tmp_path, **options)


def test_a_resumed_training_still_counts_what_was_left_out_before(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        stop = StopAt(4, RuntimeError("broken"))
        train(student_of(tiny_llama), tiny_llama, rows(), NanAt(2), output_dir=tmp_path, callbacks=[stop], **OPTIONS)
    with pytest.raises(SpikelmError, match="at step 4, and 1 were left out before"):
        options = OPTIONS | {"max_skipped_updates": 1}
        train(student_of(tiny_llama), tiny_llama, rows(), NanAt(1), output_dir=tmp_path, **options)
    result = train(student_of(tiny_llama), tiny_llama, rows(), NanAt(1), output_dir=tmp_path, **OPTIONS)
    assert result["skipped_updates"] == 2
    assert [line["skipped_updates"] for line in read_metrics(tmp_path / "log.jsonl")] == [0, 1, 1, 2, 2, 2, 2, 2]


def test_all_micro_batches_of_an_update_are_kept(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    objective = NanAt(3)
    options = OPTIONS | {"gradient_accumulation": 2, "batch_size": 1}
    result = train(student_of(tiny_llama), tiny_llama, rows(), objective, output_dir=tmp_path, **options)
    assert result["skipped_updates"] == 1
    with safetensors.safe_open(tmp_path / "non_finite" / "step-2.safetensors", "pt") as saved:
        assert sorted(saved.keys()) == ["micro_batch_0.input_ids", "micro_batch_1.input_ids"]
        assert torch.equal(saved.get_tensor("micro_batch_0.input_ids"), objective.batches[0])


@pytest.mark.parametrize("bad", [3, 4])
def test_the_other_micro_batches_of_a_bad_update_are_not_in_the_logged_loss(
    bad: int, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    options = OPTIONS | {"gradient_accumulation": 2, "logging_steps": 4, "save_steps": 4}
    train(student_of(tiny_llama), tiny_llama, rows(), NanAt(bad), output_dir=tmp_path, **options)
    for line in read_metrics(tmp_path / "log.jsonl"):
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)


def test_a_batch_of_strided_tensors_is_kept_too(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    def strided(found: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in found]).t().contiguous().t()}

    options = OPTIONS | {"data_collator": strided}
    result = train(student_of(tiny_llama), tiny_llama, rows(), NanAt(2), output_dir=tmp_path, **options)
    assert result["skipped_updates"] == 1


def test_a_training_without_one_update_is_an_error(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match="none of the 3 updates had a finite loss and gradient"):
        options = OPTIONS | {"steps": 3}
        train(student_of(tiny_llama), tiny_llama, rows(), NanAt(1, 2, 3), output_dir=tmp_path, **options)


def test_a_term_that_is_not_finite_is_no_number_of_the_log(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    def objective(*given: Any) -> dict[str, Tensor]:
        loss = LogitDistillation()(*given)["loss"]
        return {"loss": loss, "ratio": loss.detach() / 0}

    result = train(student_of(tiny_llama), tiny_llama, rows(), objective, output_dir=tmp_path, **OPTIONS)
    assert "ratio" not in result and "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_a_trainer_of_ones_own_counts_on_after_a_checkpoint_between_two_logs(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    def trainer(*calls: int) -> DistillationTrainer:
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, max_steps=8, save_steps=2, logging_steps=5, report_to=[],
            logging_nan_inf_filter=False, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        student = student_of(tiny_llama)
        return DistillationTrainer(student, tiny_llama, NanAt(*calls), arguments, train_dataset=rows())

    trainer(3).train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # 6 and 8 are written again
    assert again.skipped_updates == 1 and again.state.log_history[-2]["skipped_updates"] == 1


def test_a_log_with_a_damaged_line_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(json.dumps({"step": 1}).encode() + b"\n\xff{\n")
    with pytest.raises(SpikelmError, match="log.jsonl is damaged in line 2"):
        read_metrics(log)
