"""What is not finite stops a run before it does harm, and the message says where and why."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback

from spikelm.data import train_tokenizer
from spikelm.distill.checkpoints import checkpoints, finish_checkpoint, unfinished
from spikelm.distill.diagnosis import last_good_checkpoint, likely_cause, non_finite_tensor
from spikelm.distill.objectives import LogitDistillation
from spikelm.distill.preference import train_preferences
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import llamba

OPTIONS: dict[str, Any] = {"steps": 8, "batch_size": 2, "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 1}
Training = Callable[..., Any]


class At(TrainerCallback):
    """Does something to the student at the end of a step."""

    def __init__(self, step: int, action: Callable[[Any], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(kwargs["model"])


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[1, 2] = float("nan")


def explode(model: nn.Module) -> None:
    model.get_parameter("lm_head.weight").register_hook(lambda gradient: gradient * float("inf"))


@pytest.fixture(params=["distillation", "preference"])
def training(request: pytest.FixtureRequest, tiny_llama: LlamaForCausalLM) -> tuple[Training, Any, Any, str]:
    """(start(output_dir, **options), student, frozen model, the latter's name) of both trainers."""
    if request.param == "distillation":
        student = copy.deepcopy(tiny_llama).requires_grad_(True)
        ids = torch.randint(0, 64, (10, 6), generator=torch.Generator().manual_seed(2)).tolist()
        rows = Dataset.from_list([{"input_ids": row} for row in ids])

        def distil(output_dir: Path, **more: Any) -> Any:
            return train(student, tiny_llama, rows, LogitDistillation(), output_dir=output_dir, **(OPTIONS | more))

        return distil, student, tiny_llama, "teacher"
    config = llamba().config
    config.vocab_size, config.tie_word_embeddings = 260, False
    model = LlambaForCausalLM(config)
    reference = copy.deepcopy(model)
    tokenizer = train_tokenizer("abc " * 100, 260)
    pairs = [{"prompt": f"{n}", "chosen": "abc", "rejected": "xyz"} for n in range(10)]

    def prefer(output_dir: Path, **more: Any) -> Any:
        options = OPTIONS | {"beta": 0.1} | more
        return train_preferences(model, reference, pairs, pairs, tokenizer, output_dir=output_dir, **options)

    return prefer, model, reference, "reference"


def test_a_bad_student_names_step_checkpoint_and_cause(training: Any, tmp_path: Path) -> None:
    start = training[0]
    with pytest.raises(SpikelmError) as caught:
        start(tmp_path, callbacks=[At(5, poison)], learning_rate=0.002, max_grad_norm=0.5)
    message = str(caught.value)
    batch = tmp_path / "non_finite" / "step-6.safetensors"
    assert message.startswith(
        f"the loss is nan at step 6; its batch is in {batch} (last whole checkpoint: {tmp_path / 'checkpoint-3'})"
    )
    assert "student's parameter lm_head.weight is not finite: the update before blew up" in message
    assert "learning_rate (0.002)" in message and "max_grad_norm (0.5" in message
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_a_bad_student_is_not_saved(training: Any, tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match=r"after step 3 and is not saved \(no checkpoint yet\).*lm_head.weight"):
        training[0](tmp_path, callbacks=[At(3, poison)])
    assert not checkpoints(tmp_path)


def test_a_gradient_that_is_not_finite_is_not_stepped_with(training: Any, tmp_path: Path) -> None:
    start, student, _, _ = training
    with pytest.raises(SpikelmError) as caught:
        start(tmp_path, callbacks=[At(4, explode)])
    message = str(caught.value)
    assert "the gradient's norm is" in message and "at step 8, and 3 were left out before; its batch is in" in message
    assert "the gradient of" in message and "backward pass overflows" in message
    assert all(torch.isfinite(value).all() for value in student.parameters()), "stopped before the update"


def test_a_bad_frozen_model_is_named(training: Any, tmp_path: Path) -> None:
    start, _, frozen, role = training

    def damage(model: Any) -> None:
        with torch.no_grad():
            frozen.get_parameter("lm_head.weight").fill_(float("inf"))

    with pytest.raises(SpikelmError) as caught:
        start(tmp_path, callbacks=[At(1, damage)])
    assert "at step 2; its batch is in" in str(caught.value) and "(no checkpoint yet)" in str(caught.value)
    assert f"the {role}'s parameter lm_head.weight is not finite: its weights are damaged" in str(caught.value)


def test_a_student_that_came_bad_is_told_from_one_that_blew_up(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    student = copy.deepcopy(tiny_llama).requires_grad_(True)
    poison(student)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}] * 4)
    with pytest.raises(SpikelmError, match="at step 1; .*lm_head.weight is not finite.*before the first update"):
        train(student, tiny_llama, rows, LogitDistillation(), output_dir=tmp_path, **OPTIONS)


def test_the_bad_term_of_an_objective_is_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    def objective(student: nn.Module, teacher: nn.Module, batch: Any, num_items: Any = None) -> dict[str, Tensor]:
        loss = LogitDistillation()(student, teacher, batch, num_items)["loss"]
        return {"loss": loss * float("inf"), "good": loss, "bad": loss * float("inf")}

    student = copy.deepcopy(tiny_llama).requires_grad_(True)
    student.lm_head.weight.data *= 2
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}] * 4)
    with pytest.raises(
        SpikelmError, match="term bad of the loss is not finite.*try bf16=false, or lower learning_rate"
    ):
        train(student, tiny_llama, rows, objective, output_dir=tmp_path, **OPTIONS, bf16=True)


def test_likely_cause_looks_in_order() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("scale", torch.ones(2))
            self.register_buffer("count", torch.zeros(2, dtype=torch.long))

    student, teacher = Model(), Model()
    settings: dict[str, Any] = {"updates": 3, "learning_rate": 0.1, "max_grad_norm": 1.0, "reduced_precision": None}

    def cause(loss_is_finite: bool = False) -> str:
        return likely_cause(student, {"teacher": teacher}, {"kl": 1.0}, loss_is_finite=loss_is_finite, **settings)[1]

    assert "the gradient as a whole is not finite" in cause(loss_is_finite=True)
    assert cause().startswith("the loss is not finite though all parameters are")
    student.weight.grad = torch.tensor([1.0, float("nan")])
    assert cause(loss_is_finite=True).startswith("the gradient of weight is not finite")
    student.weight.data[0] = float("inf")
    assert cause().startswith("the student's parameter weight")
    teacher.scale[1] = float("nan")  # type: ignore[index, operator]
    assert non_finite_tensor(teacher) == "buffer scale" and cause().startswith("the teacher's buffer scale")


def test_the_last_good_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    assert last_good_checkpoint(tmp_path / "absent") == "no checkpoint yet"
    for step in (3, 6, 9):
        (unfinished(tmp_path) / f"checkpoint-{step}").mkdir(parents=True)
        finish_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / "manifest.json").unlink()
    assert last_good_checkpoint(tmp_path) == f"last whole checkpoint: {tmp_path / 'checkpoint-6'}"
    assert (tmp_path / "checkpoint-9").is_dir(), "looking deletes nothing"
