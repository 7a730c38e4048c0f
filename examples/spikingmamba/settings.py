"""Everything a run of train.py depends on; the fields of the presets and of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import spikelm
from spikelm.experiment import Optimisation, Settings


@dataclass(frozen=True)
class EmbeddedTeacher:
    """The Mamba2ForCausalLM trained on the spot for teacher=embedded."""

    steps: int = 1000
    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 4
    state_size: int = 16
    head_dim: int = 16
    batch_size: int = 16
    learning_rate: float = 6e-3


@dataclass(frozen=True)
class Neuron:
    """TI-LIF before in_proj and out_proj of every mixer. All but the neuron itself is ours (docs/faithfulness.md)."""

    D: int = 4
    alpha: float = 1.0
    sgc: Literal["gradient", "blend"] | None = "gradient"
    sgc_weight: float = 0.3
    sgc_end: float = 0.9  # share of the training after which the blend form's weight is 0
    learn_threshold: bool = False


@dataclass(frozen=True)
class Distillation:
    """The single stage: KL on the logits and the relative error of the residual stream; see HiddenMatch."""

    kl_weight: float = 1.0
    hidden_weight: float = 1.0
    temperature: float = 1.0
    chunk_size: int = 4096
    freeze_embeddings: bool = True  # and with them a tied head
    calibration_contexts: int = 64
    max_sum_of_rates: float | None = 0.9  # mean |s| that a threshold may lead to at conversion
    optimisation: Optimisation = Optimisation()


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on.

    weights: of the projections behind neurons; per_row: a scale per output of binary or ternary ones [ours].
    """

    embedded_teacher: EmbeddedTeacher = EmbeddedTeacher()
    neuron: Neuron = Neuron()
    distillation: Distillation = Distillation()
    weights: Literal["float", "binary", "ternary"] = "float"
    per_row: bool = False

    def recipe(self) -> spikelm.Recipe:
        """The neuron at the paper's two places, and the form of the weights behind it."""
        arguments = {name: value for name, value in asdict(self.neuron).items() if name != "sgc_end"}
        recipe = spikelm.Recipe.preset("spikingmamba", **arguments)
        return replace(recipe, weights=self.weights, per_row=self.per_row)
