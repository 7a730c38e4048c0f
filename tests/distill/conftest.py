"""Settings of the distillation tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from spikelm.distill.objectives import SBDS
from spikelm.distill.trainer import train
from tests.distill.small_training import OPTIONS, rows, student_of, weights


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other, for seconds where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uninterrupted(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The directory and the trained weights of eight steps."""
    student = student_of(tiny_llama)
    train(student, tiny_llama, rows(), SBDS(), output_dir=tmp_path / "whole", **OPTIONS)
    return tmp_path / "whole", weights(student)
