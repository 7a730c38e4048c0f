"""Everything a run of train.py depends on; the fields of the presets and of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from spikelm.distill import SpAD
from spikelm.experiment import EmbeddedLlama, Optimisation, Settings
from spikelm.models.bispikclm import BiSpikCLMConfig


@dataclass(frozen=True)
class Student:
    """The student's shape and neurons; see BiSpikCLMConfig. max_position_embeddings null is context_length."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int | None = None
    T: int = 4
    beta: float = 0.9
    v_threshold: float = 1.0
    map_threshold: float | None = None
    learn_threshold: bool = False
    surrogate_alpha: float = 2.0
    initializer_position: float = 1.0
    detach_reset: bool = False
    residual: Literal["integer", "binary"] = "integer"


@dataclass(frozen=True)
class Alignment:
    """Weights of SpAD's five terms, the paper's; gamma, row_max and the rest as in spikelm.distill.SpAD."""

    embedding_weight: float = 0.2
    attention_weight: float = 0.1
    feature_weight: float = 0.1
    soft_weight: float = 0.3
    hard_weight: float = 0.3
    gamma: float = 0.5
    temperature: float = 2.0
    row_max: bool = True
    chunk_size: int = 4096


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on.

    dense: also train an OPT of the same shape, without spikes, with the same objective, text and steps, to compare.
    """

    embedded_teacher: EmbeddedLlama = EmbeddedLlama()
    student: Student = Student()
    alignment: Alignment = Alignment()
    optimisation: Optimisation = Optimisation()
    dense: bool = True

    def objective(self) -> SpAD:
        """SpAD, with the student's neuron on the teacher's maps and hidden states."""
        student = self.student
        return SpAD(
            **asdict(self.alignment), T=student.T, beta=student.beta, v_threshold=student.v_threshold, project=True
        )

    def model_config(self, teacher: Any) -> BiSpikCLMConfig:
        """The student's configuration, with the vocabulary of a teacher's."""
        shape = asdict(self.student)
        shape["max_position_embeddings"] = shape["max_position_embeddings"] or self.context_length
        tokens = {name: getattr(teacher, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return BiSpikCLMConfig(vocab_size=teacher.vocab_size, **shape, **tokens)
