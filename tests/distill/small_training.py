"""A training of eight steps on a tiny Llama, for the tests of trainers and checkpoints."""

import copy
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback

from spikelm.distill.callbacks import read_metrics

OPTIONS: dict[str, Any] = {"steps": 8, "batch_size": 2, "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 1}
NOT_REPEATABLE = ("wall_s", "tokens_per_second")


def student_of(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    student = copy.deepcopy(teacher).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student


def rows(count: int = 10, length: int = 6) -> Dataset:
    ids = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(2))
    return Dataset.from_list([{"input_ids": row} for row in ids.tolist()])


def curve(output_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(output_dir / "log.jsonl")
    return [{name: value for name, value in line.items() if name not in NOT_REPEATABLE} for line in lines]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class StopAt(TrainerCallback):
    """Raises, or presses Ctrl-C, at the end of a step."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)
