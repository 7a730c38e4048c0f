"""CompensationWeight: what it sets and what it logs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from spikelm import Recipe, spikify
from spikelm.distill.callbacks import CompensationWeight
from spikelm.distill.objectives import HiddenMatch
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from tests.small_models import mamba2


class Interrupt(TrainerCallback):
    """Stops a training after step 6, beyond its first checkpoint."""

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


def logged(output_dir: Path, sgc: str | None, end: float | None, *more: TrainerCallback) -> dict[int, float]:
    """Step -> sgc_weight of a training of 12 steps."""
    student = spikify(mamba2(), Recipe.preset("spikingmamba", sgc=sgc, sgc_weight=0.4))
    rows = [{"input_ids": row} for row in torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0))]
    options = {"steps": 12, "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 5}
    callbacks = [CompensationWeight(student, end), *more]
    record = train(student, mamba2(), rows, HiddenMatch(), output_dir=output_dir, callbacks=callbacks, **options)
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert record["sgc_weight"] == lines[-1]["sgc_weight"]
    return {line["step"]: line["sgc_weight"] for line in lines}


def test_the_gradient_forms_weight_stays(tmp_path: Path) -> None:
    assert logged(tmp_path, "gradient", None) == dict.fromkeys(range(1, 13), 0.4)
    assert set(logged(tmp_path / "none", None, None).values()) == {0.0}, "without compensation it is 0"


@pytest.mark.filterwarnings("ignore:no kernel for sgc='blend'")
def test_the_blend_forms_weight_falls_linearly_and_ends_at_0(tmp_path: Path) -> None:
    weights = logged(tmp_path, "blend", 0.5)
    expected = {step: 0.4 * max(0.0, 1 - (step - 1) / 11 / 0.5) for step in range(1, 13)}
    assert weights == pytest.approx(expected)
    assert weights[1] == 0.4 and weights[7] == 0


@pytest.mark.filterwarnings("ignore:no kernel for sgc='blend'")
def test_a_resumed_training_goes_on_where_the_weight_was(tmp_path: Path) -> None:
    whole = logged(tmp_path / "whole", "blend", 0.9)
    with pytest.raises(KeyboardInterrupt):
        logged(tmp_path / "part", "blend", 0.9, Interrupt())
    assert logged(tmp_path / "part", "blend", 0.9) == whole


def test_a_student_without_the_neuron_is_refused() -> None:
    with pytest.raises(SpikelmError, match="Linear has no TILIF neuron, hence no sgc_weight"):
        CompensationWeight(nn.Linear(1, 1), None)
