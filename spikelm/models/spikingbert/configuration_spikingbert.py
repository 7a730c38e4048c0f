"""Configuration of SpikingBert."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from spikelm.equilibrium import Solver
from spikelm.errors import SpikelmError
from spikelm.limits import check_sizes
from spikelm.neurons.base import check_count, check_positive
from spikelm.ops.weight_quantization import FORMS

MODES = ("spiking", "rate")


@strict
class SpikingBertConfig(PreTrainedConfig):
    """Configuration of a SpikingBert model; the defaults are SpikingBERT's four layers of BERT-base's width.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
            max_position_embeddings, type_vocab_size, layer_norm_eps: as of transformers' BertConfig.
        hidden_dropout_prob: on the rates, in training with mode "rate" alone. [ours]
        classifier_dropout: on the pooled output, in training.
        T: time steps of a forward pass in mode "spiking", >= 1.
        mode: "spiking", the average spiking rates over T steps (in training their gradient is the rate network's);
            "rate", the rate network itself, clamp in place of every neuron.
        v_threshold: of every population.
        initial_membrane: u(0) / V, 0 in the paper, 0.5 halves the rate's error. [ours]
        weights: "float", "binary" or "ternary" projections within the layers.
        per_row: one scale for every output of a projection instead of one for the matrix.
        fold_scale: in spiking steps the scale of the key and value projections, which a neuron follows, divides its
            threshold instead of multiplying the current.
        feedback: the last layer's rates, through a projection, join the input population's current; it
            starts at 0. [ours]
        solver_method, solver_tolerance, solver_max_iterations, solver_on_failure: of the fixed point with feedback, see
            spikelm.equilibrium.Solver.
        steps_at_once: spiking steps that are computed layer by layer (1 with feedback); memory against speed.
        packed: the projections are stored as bits (set by spikelm.deploy).

    Example:

    >>> from spikelm.models.spikingbert import SpikingBertConfig, SpikingBertForSequenceClassification
    >>> config = SpikingBertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    ...     intermediate_size=64, max_position_embeddings=16, T=8, weights="ternary")
    >>> model = SpikingBertForSequenceClassification(config)
    """

    model_type = "spikingbert"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("hidden_states", "attention_scores", "firing_rates", "rate_gaps", "solutions")
    ]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    classifier_dropout: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    T: int = 100
    mode: str = "spiking"
    v_threshold: float = 1.0
    initial_membrane: float = 0.0
    weights: str = "float"
    per_row: bool = False
    fold_scale: bool = True
    feedback: bool = False
    solver_method: str = "anderson"
    solver_tolerance: float = 1e-4
    solver_max_iterations: int = 50
    solver_on_failure: str = "warn"
    steps_at_once: int = 8
    packed: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(vars(self))  # before anything of these sizes is made
        counts = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        for name in (*counts, "num_hidden_layers", "type_vocab_size", "T", "steps_at_once"):
            check_count(name, getattr(self, name))
        check_positive("v_threshold", self.v_threshold)
        for name, accepted in {"mode": MODES, "weights": FORMS}.items():
            if getattr(self, name) not in accepted:
                raise SpikelmError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        if not (math.isfinite(self.initial_membrane) and 0 <= self.initial_membrane < 1):
            raise SpikelmError(f"initial_membrane must be within [0, 1), a share of V; got {self.initial_membrane!r}")
        if self.hidden_size % self.num_attention_heads:
            raise SpikelmError(
                "hidden_size must be a multiple of num_attention_heads; got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.feedback and self.hidden_dropout_prob:
            raise SpikelmError(
                "feedback takes hidden_dropout_prob 0, for a fixed point needs one and the same function; got "
                f"{self.hidden_dropout_prob!r}"
            )
        if self.packed and self.weights == "float":
            raise SpikelmError("packed takes weights 'binary' or 'ternary'; got 'float'")
        self.solver  # noqa: B018  refuses bad arguments here
        super().__post_init__(**kwargs)

    @property
    def solver(self) -> Solver:
        """Of the fixed point, where there is feedback."""
        return Solver(
            method=self.solver_method,  # type: ignore[arg-type]  # checked there
            tolerance=self.solver_tolerance,
            max_iterations=self.solver_max_iterations,
            on_failure=self.solver_on_failure,  # type: ignore[arg-type]
        )
