"""Everything a run of train.py depends on; the fields of the presets and of the command line."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

from spikelm.distill import InternalKD
from spikelm.distill.parallel import Parallel
from spikelm.errors import SpikelmError
from spikelm.experiment import Optimisation
from spikelm.models.spikingbert import SpikingBertConfig

Form = Literal["float", "ternary", "binary"]


@dataclass(frozen=True)
class EmbeddedBert:
    """The BERT classifier trained on the spot on the task's sentences for teacher=embedded."""

    steps: int = 2500
    vocab_size: int = 8000
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    batch_size: int = 64
    learning_rate: float = 1e-3
    dropout: float = 0.1


@dataclass(frozen=True)
class Student:
    """The spiking student; see SpikingBertConfig. num_hidden_layers null is the teacher's.

    training_T: time steps of the stage that trains through spikes.
    """

    num_hidden_layers: int | None = None
    v_threshold: float = 1.0
    initial_membrane: float = 0.5
    per_row: bool = False
    feedback: bool = False
    hidden_dropout_prob: float = 0.0
    training_T: int = 16


@dataclass(frozen=True)
class Stages:
    """The stages of one student, in this order; one of 0 steps is left out.

    general: hidden states and attention scores on general_text. internal: the same on the task's sentences.
    prediction: the teacher's classes. All three train the rate network. spiking: the prediction once more, through the
    spiking rates. [ours: the paper's code trains every stage through them]
    """

    general: Optimisation = Optimisation(batch_size=64, learning_rate=1e-3)
    internal: Optimisation = Optimisation(batch_size=64, learning_rate=1e-3)
    prediction: Optimisation = Optimisation(batch_size=64, learning_rate=1e-3)
    spiking: Optimisation = Optimisation(batch_size=64, learning_rate=3e-4)

    def by_name(self) -> dict[str, Optimisation]:
        """The stages that are run."""
        stages = {name: getattr(self, name) for name in ("general", "internal", "prediction", "spiking")}
        return {name: optimisation for name, optimisation in stages.items() if optimisation.steps}


@dataclass(frozen=True)
class Config:
    """Everything a run depends on.

    teacher: a BertForSequenceClassification, directory or Hub id, or "embedded".
    data: rows with a text and a label, see spikelm.data.load_classification; "embedded" is Python's docstrings.
    held_out: whole sentences held out of data (spikelm.data.hold_out_sentences), unless held_out_data names a set.
    held_out_seed: which ones; apart from seed, so that runs of several seeds are compared on the same sentences.
    general_text: a text file or more for the general stage, a sentence a line; null takes the task's sentences.
    weights: the students, one each. Quantised ones start from the float student, which is trained first in any case.
    T: after how many steps the students are read.
    hard_weight: of the labels beside the teacher's classes, in the prediction and spiking stages. [ours]
    """

    output_dir: str
    teacher: str = "embedded"
    data: str = "embedded"
    held_out_data: str | None = None
    held_out: int = 400
    held_out_seed: int = 0
    text_field: str | None = None
    label_field: str | None = None
    max_rows: int | None = None
    general_text: str | None = None
    max_length: int = 64
    seed: int = 0
    weights: list[Form] = field(default_factory=lambda: ["float", "ternary", "binary"])
    T: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    hard_weight: float = 0.2
    temperature: float = 1.0
    embedded_teacher: EmbeddedBert = EmbeddedBert()
    student: Student = Student()
    float_stages: Stages = Stages()
    quantised_stages: Stages = Stages()
    parallel: Parallel = Parallel()  # where several processes keep the models; no part of what a run is

    def check(self) -> None:
        """SpikelmError for what would be refused only once a teacher is trained or the data read."""
        if not self.T or min(self.T) < 1:
            raise SpikelmError(f"T must be one or more integers >= 1, given {self.T}")
        if self.student.training_T < 1:
            raise SpikelmError(f"student.training_T must be at least 1, given {self.student.training_T}")
        if not self.weights or len(set(self.weights)) < len(self.weights):
            raise SpikelmError(f"weights must name each student once, given {self.weights}")
        if self.held_out < 1 or self.max_length < 3:
            raise SpikelmError(
                f"held_out must be at least 1 and max_length at least 3, given {self.held_out} and {self.max_length}"
            )
        for name in ("float_stages", "quantised_stages"):
            stages: Stages = getattr(self, name)
            if not stages.by_name():
                raise SpikelmError(f"{name} has no stage with steps > 0")
            for stage, optimisation in stages.by_name().items():
                optimisation.check(f"{name}.{stage}")
                if optimisation.gradient_checkpointing:
                    raise SpikelmError(f"{name}.{stage}: SpikingBert has no gradient checkpointing")
        self.objective("prediction")
        SpikingBertConfig(**self.student_config())
        for wanted, module, extra in (
            (True, "sklearn", "baselines"),
            (self.student.feedback, "torchdeq", "equilibrium"),
        ):
            if wanted and importlib.util.find_spec(module) is None:
                raise SpikelmError(f"{module} is not installed: pip install 'spikelm[{extra}]'")

    def objective(self, stage: str) -> InternalKD:
        """Of a stage; labels join where the teacher's classes are the target."""
        if stage in ("general", "internal"):
            return InternalKD.stage(stage)
        return InternalKD.stage("prediction", hard_weight=self.hard_weight, temperature=self.temperature)

    def student_config(self) -> dict[str, Any]:
        """Arguments of from_bert."""
        student = self.student
        layers = {} if student.num_hidden_layers is None else {"num_hidden_layers": student.num_hidden_layers}
        return layers | {
            "T": student.training_T,
            "v_threshold": student.v_threshold,
            "initial_membrane": student.initial_membrane,
            "per_row": student.per_row,
            "feedback": student.feedback,
            "hidden_dropout_prob": student.hidden_dropout_prob,
        }
