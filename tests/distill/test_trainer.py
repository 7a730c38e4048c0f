"""The trainer: accumulation, logs, parameter groups, checkpoints, resuming after every kind of end."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from spikelm.distill.callbacks import read_metrics
from spikelm.distill.checkpoints import checkpoints, latest_checkpoint
from spikelm.distill.objectives import SBDS
from spikelm.distill.parameters import parameter_groups
from spikelm.distill.trainer import DistillationTrainer, collate, train
from spikelm.errors import SpikelmError
from tests.distill.small_training import OPTIONS, StopAt, curve, rows, student_of, weights

KILLED_SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
sys.path.insert(0, sys.argv[2])
import test_trainer_models as models
from spikelm.distill.objectives import SBDS
from spikelm.distill.trainer import train

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

teacher = models.llama()
train(models.student_of(teacher), teacher, models.rows(), SBDS(), output_dir=sys.argv[1], callbacks=[Kill()],
      **models.OPTIONS)
"""


def test_training_lowers_the_loss_and_logs_every_term(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    student = student_of(tiny_llama).eval()
    before = weights(tiny_llama)
    result = train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, steps=60, batch_size=4, learning_rate=3e-3)
    lines = read_metrics(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["divergence"] < 0.6 * lines[0]["divergence"] and lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["divergence"] + line["features"], rel=1e-4)
        assert line["tokens_per_second"] > 0
    assert result["steps"] == 60 and result["features"] == lines[-1]["features"] and result["wall_s"] > 0
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-60"]
    assert not student.training and "forward" not in vars(student)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.named_parameters())


def test_gradient_accumulation_equals_one_big_batch(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    # Rows of unequal length: a mean of micro-batch means would weigh their tokens differently.
    lengths = [3, 9, 4, 8, 2, 7, 5, 6]
    ids = torch.randint(0, 64, (8, 9), generator=torch.Generator().manual_seed(3)).tolist()
    dataset = Dataset.from_list([{"input_ids": row[:n]} for row, n in zip(ids, lengths, strict=True)])
    options: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "schedule": "constant"}
    students = []
    for name, batch, accumulation in (("big", 4, 1), ("small", 2, 2)):
        student = student_of(tiny_llama)
        train(
            student,
            tiny_llama,
            dataset,
            SBDS(),
            output_dir=tmp_path / name,
            batch_size=batch,
            gradient_accumulation=accumulation,
            **options,
        )
        students.append(student)
    for big, small in zip(curve(tmp_path / "big"), curve(tmp_path / "small"), strict=True):
        assert small == pytest.approx(big, rel=1e-4)
    for (name, big_value), small_value in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(small_value, big_value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Tensor]], how: str
) -> None:
    output_dir = tmp_path / "broken"
    kind: type[BaseException] = RuntimeError if how == "error" else KeyboardInterrupt
    stop = StopAt(5, RuntimeError("broken") if how == "error" else None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(kind):
        train(student_of(tiny_llama), tiny_llama, rows(), SBDS(), output_dir=output_dir, callbacks=[stop], **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is before
    latest = latest_checkpoint(output_dir)
    # An error leaves the last regular checkpoint; Ctrl-C makes one after the step that it fell into or the next.
    assert latest is not None and latest.name in (
        ["checkpoint-3"] if how == "error" else ["checkpoint-5", "checkpoint-6"]
    )
    student = student_of(tiny_llama)
    train(student, tiny_llama, rows(), SBDS(), output_dir=output_dir, **OPTIONS)
    whole, expected = uninterrupted
    assert curve(output_dir) == curve(whole)
    assert all(torch.equal(value, expected[name]) for name, value in student.named_parameters())


def test_a_killed_process_resumes_to_the_same_curve(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Tensor]], repository: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "teacher")
    (tmp_path / "test_trainer_models.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from tests.distill.small_training import OPTIONS, rows, student_of\n"
        f"llama = lambda: LlamaForCausalLM.from_pretrained({str(tmp_path / 'teacher')!r}).eval()\n"
    )
    output_dir = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_SCRIPT, str(output_dir), str(tmp_path)], cwd=repository, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    latest = latest_checkpoint(output_dir)
    assert latest is not None and latest.name == "checkpoint-3"
    student = student_of(tiny_llama)
    train(student, tiny_llama, rows(), SBDS(), output_dir=output_dir, **OPTIONS)
    whole, expected = uninterrupted
    resumed, uncut = curve(output_dir), curve(whole)
    assert [line["step"] for line in resumed] == [line["step"] for line in uncut]
    for found, wanted in zip(resumed, uncut, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_finished_run_is_loaded_not_repeated(
    tiny_llama: LlamaForCausalLM, uninterrupted: tuple[Path, dict[str, Tensor]]
) -> None:
    whole, expected = uninterrupted
    lines = read_metrics(whole / "log.jsonl")
    student = student_of(tiny_llama)
    result = train(student, tiny_llama, rows(), SBDS(), output_dir=whole, **OPTIONS)
    assert all(torch.equal(value, expected[name]) for name, value in student.named_parameters())
    assert read_metrics(whole / "log.jsonl") == lines and result["loss"] == lines[-1]["loss"]
    with pytest.raises(SpikelmError, match="beyond the 4 steps"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=whole, **{**OPTIONS, "steps": 4})
    with pytest.raises(SpikelmError, match="already holds checkpoints"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=whole, **OPTIONS, resume=False)


def test_a_checkpoint_of_another_model_is_an_error(
    tiny_llama: LlamaForCausalLM, uninterrupted: tuple[Path, dict[str, Tensor]]
) -> None:
    student = student_of(tiny_llama)
    student.model.layers[0].self_attn.extra = nn.Linear(2, 2)
    with pytest.raises(SpikelmError, match="of another model: model.layers.0.self_attn.extra.weight and 1 more"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=uninterrupted[0], **OPTIONS)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))


class Thresholds(nn.Module):
    """Two projections that share a bank, as spikify makes them, and a two-dimensional parameter with a similar name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(3, 2), nn.Linear(3, 2)
        self.gate.neuron = self.up.neuron = Bank()
        self.alpha = nn.Parameter(torch.zeros(2, 2))


def test_parameter_groups_spare_vectors_and_give_thresholds_their_rate() -> None:
    model = Thresholds()
    matrices, vectors, thresholds = parameter_groups(model, 0.1, 0.5)
    assert [id(p) for p in matrices["params"]] == [id(model.alpha), id(model.gate.weight), id(model.up.weight)]
    assert [id(p) for p in vectors["params"]] == [id(model.gate.bias), id(model.up.bias)]
    assert [id(p) for p in thresholds["params"]] == [id(model.gate.neuron.a)]
    assert (matrices["weight_decay"], vectors["weight_decay"], thresholds["weight_decay"]) == (0.1, 0.0, 0.0)
    assert thresholds["lr"] == 0.5 and "lr" not in matrices and "lr" not in vectors
    assert "lr" not in parameter_groups(model, 0.1)[2]
    model.gate.neuron.requires_grad_(False)
    with pytest.raises(SpikelmError, match="no trainable threshold"):
        parameter_groups(model, 0.1, 0.5)
    with pytest.raises(SpikelmError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)


def test_only_the_named_parameters_train(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    student = student_of(tiny_llama)
    student.lm_head.requires_grad_(False)
    before = weights(student)
    train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, trainable=["*.self_attn.*", "lm_head.*"], **OPTIONS)
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".self_attn." in name or name == "lm_head.weight"}
    assert not student.lm_head.weight.requires_grad and student.model.norm.weight.requires_grad
    with pytest.raises(SpikelmError, match=r"'\*.mixer.\*' matches no parameter"):
        train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path, trainable=["*.mixer.*"], **OPTIONS)


def test_bf16_and_gradient_checkpointing_leave_no_trace(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    student = student_of(tiny_llama)
    full = train(student_of(tiny_llama), tiny_llama, rows(), SBDS(), output_dir=tmp_path / "full", **OPTIONS)
    result = train(
        student,
        tiny_llama,
        rows(),
        SBDS(chunk_size=4),
        output_dir=tmp_path / "half",
        bf16=True,
        gradient_checkpointing=True,
        **OPTIONS,
    )
    assert result["loss"] == pytest.approx(full["loss"], rel=0.05) and result["loss"] != full["loss"]
    assert not student.is_activation_checkpointing and student.config.use_cache
    assert student(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.float32
    assert "autocast" not in repr(student.forward)


def test_a_streamed_dataset_goes_on_from_its_start_when_it_ends(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    dataset = IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 2, 3]}] * 5))
    result = train(student_of(tiny_llama), tiny_llama, dataset, SBDS(), output_dir=tmp_path, **OPTIONS)
    assert result["steps"] == 8


def test_a_run_that_a_callback_ends_early_is_an_error(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    with pytest.raises(SpikelmError, match="stopped at step 2 of 8"):
        train(student_of(tiny_llama), tiny_llama, rows(), SBDS(), output_dir=tmp_path, callbacks=[Stop()], **OPTIONS)


def test_collate_pads_on_the_right_and_masks() -> None:
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "x": 1}, {"input_ids": [8], "labels": [8], "x": 2}]
    )
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert list(collate([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}])) == ["input_ids"]
    with pytest.raises(SpikelmError, match="no input_ids; it has text"):
        collate([{"text": "a"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, given 0"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0"),
        ({"threshold_learning_rate": -1.0}, "threshold_learning_rate"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"schedule": "step"}, "one of cosine, linear, constant"),
        ({"trainable": "*"}, "list of patterns"),
        ({"logging_steps": 0}, "logging_steps"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpikelmError, match=message):
        train(student_of(tiny_llama), tiny_llama, rows(), SBDS(), output_dir=tmp_path / "run", **{**OPTIONS, **options})
    assert not (tmp_path / "run").exists()


def test_teacher_and_student_must_be_two_models(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match="same object"):
        train(tiny_llama, tiny_llama, rows(), SBDS(), output_dir=tmp_path, **OPTIONS)


def test_the_wrapper_of_a_launchers_only_process_is_looked_through(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """torchrun --nproc-per-node 1: some objectives call parts of the student, which the wrapper has not."""
    seen: list[nn.Module] = []

    def objective(student: nn.Module, teacher: nn.Module, batch: Any, num_items: Any) -> dict[str, Tensor]:
        seen.append(student)
        return SBDS()(student, teacher, batch, num_items)

    student = student_of(tiny_llama)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        trainer = DistillationTrainer(student, tiny_llama, objective, arguments)
        wrapper = nn.parallel.DistributedDataParallel(student)
        trainer.compute_loss(wrapper, collate([rows()[0], rows()[1]]))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [student]
