"""Everything a run of train.py depends on; the fields of the presets and of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import spikelm
from spikelm.distill import Activity, SpAD
from spikelm.distill.objectives import Objective
from spikelm.errors import SpikelmError
from spikelm.experiment import EmbeddedLlama, Optimisation, Settings

STAGES = ("orientation", "alignment", "stage1", "student")


@dataclass(frozen=True)
class Mixer:
    """What of DiscreteMamba2 the teacher does not decide."""

    chunk_size: int = 64
    d_conv: int = 4


@dataclass(frozen=True)
class Divergence:
    """alpha KL(p || q) + beta KL(q || p), p the teacher; logits of chunk_size tokens at a time."""

    alpha: float = 1.0
    beta: float = 0.0
    chunk_size: int = 4096


@dataclass(frozen=True)
class Neuron:
    """ATMN before every projection; T, tau, frame_weight and the surrogate are not printed in the paper."""

    name: str = "ATMN"
    T: int = 4
    tau: float = 1.0
    frame_weight: float = 1.0
    detach_reset: bool = False
    surrogate_function: str = "ATan"
    surrogate_alpha: float = 2.0

    def recipe(self) -> spikelm.Recipe:
        """The neuron at the paper's four places."""
        surrogate = {"name": self.surrogate_function, "alpha": self.surrogate_alpha}
        arguments = {"T": self.T, "tau": self.tau, "frame_weight": self.frame_weight, "detach_reset": self.detach_reset}
        return spikelm.Recipe.preset("mar", neuron=self.name, surrogate_function=surrogate, **arguments)


@dataclass(frozen=True)
class Sparsity:
    """How much the student may fire [ours]: the fields of spikelm.distill.Activity, no such term with target=null.

    max_sum_of_rates: of any channel at calibration, where training starts; see spikelm.calibrate.
    """

    target: float | None = None
    weight: float = 2.0
    measure: Literal["union", "sum"] = "union"
    max_sum_of_rates: float | None = None

    def applied_to(self, objective: Objective) -> Objective:
        """The objective with the activity term, or without one itself."""
        if self.max_sum_of_rates is not None and self.max_sum_of_rates <= 0:
            raise SpikelmError(f"sparsity.max_sum_of_rates must be > 0 or null, given {self.max_sum_of_rates}")
        return objective if self.target is None else Activity(objective, self.target, self.weight, self.measure)


@dataclass(frozen=True)
class Spiking:
    """Stage 2. teacher: "stage1", the dense Llamba (the paper), or "llama", the model it came from [ours].

    weights: of the projections behind neurons; per_row: a scale per output of binary or ternary ones [ours].
    alpha, beta, feature_weight and taps are of objective=sbds, chunk_size of sbds and kl.
    """

    teacher: Literal["stage1", "llama"] = "stage1"
    neuron: Neuron = Neuron()
    weights: Literal["float", "binary", "ternary"] = "float"
    per_row: bool = False
    alpha: float = 0.2
    beta: float = 0.7
    feature_weight: float = 1.0
    taps: Literal["pre", "post", "both"] = "pre"
    chunk_size: int = 4096
    calibration_contexts: int = 64
    sparsity: Sparsity = Sparsity()
    optimisation: Optimisation = Optimisation()

    def recipe(self) -> spikelm.Recipe:
        """The neuron and the form of the weights behind it."""
        return replace(self.neuron.recipe(), weights=self.weights, per_row=self.per_row)


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on. steps=0 leaves orientation or alignment out.

    objective is the loss of stage 2: "sbds", MAR's, with the fields of spiking; "kl", the forward KL alone; "spad",
    BiSpikCLM's, with the fields of spad, whose attention maps want spiking.teacher=llama. spad's T, beta and
    v_threshold are of the neuron that turns the teacher's values into rates, not of the student's. "stored" is the
    forward KL from what store_teacher.py has kept in teacher_store of the same contexts and teacher.
    """

    stage1: str | None = None  # a trained Llamba (directory or Hub id) to start from, instead of training one
    stages: list[Literal["orientation", "alignment", "stage1", "student"]] = field(default_factory=lambda: list(STAGES))
    embedded_teacher: EmbeddedLlama = EmbeddedLlama()
    mixer: Mixer = Mixer()
    orientation: Optimisation = Optimisation()
    alignment: Optimisation = Optimisation()
    distillation: Optimisation = Optimisation()
    divergence: Divergence = Divergence()
    objective: Literal["sbds", "spad", "kl", "stored"] = "sbds"
    teacher_store: str | None = None
    spiking: Spiking = Spiking()
    spad: SpAD = SpAD()
