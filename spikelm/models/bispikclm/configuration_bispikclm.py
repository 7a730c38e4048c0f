"""Configuration of BiSpikCLM."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from spikelm.errors import SpikelmError
from spikelm.limits import check_sizes

# Widths of the OPT models (arXiv 2205.01068, Table 1) that the paper trains beside.
SHAPES: dict[str, dict[str, int]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
}


@strict
class BiSpikCLMConfig(PreTrainedConfig):
    """Configuration of a BiSpikCLM model; the defaults are its 125M form.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads: the shape; ``BiSpikCLMConfig.opt("1.3b")`` gives OPT's.
        ffn_dim: width of the MLP; None is 4 * hidden_size.
        max_position_embeddings: learned positions, so the longest context.
        T: time steps, >= 1; the same current enters at each.
        beta, v_threshold: leak and threshold of every neuron (BinaryIF with delayed soft reset).
        map_threshold: of the attention maps' neurons; None is v_threshold. [ours]
        learn_threshold: one trained threshold a channel (one a layer for the maps), from v_threshold. [ours]
        surrogate_alpha: of the ATan surrogate.
        detach_reset: no gradient through the spike in the reset.
        residual: "integer", a neuron in front of attention and MLP and the plain sum behind, the paper's order of
            the block; "binary", a neuron behind every sum instead, so that the stream itself is {0, 1}.
        initializer_gain: weights of a projection start with a standard deviation of initializer_gain / sqrt(inputs),
            so that neurons fire at every width. [ours]
        initializer_range: standard deviation of the token embeddings.
        initializer_position: root mean square of the positions, at first sinusoids; they are added to the normalised
            token embedding. [ours]

    Example:

    >>> from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM
    >>> model = BiSpikCLMForCausalLM(BiSpikCLMConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
    ...     num_attention_heads=4, max_position_embeddings=128))
    """

    model_type = "bispikclm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int | None = None
    max_position_embeddings: int = 2048
    T: int = 4
    beta: float = 0.9
    v_threshold: float = 1.0
    map_threshold: float | None = None
    learn_threshold: bool = False
    surrogate_alpha: float = 2.0
    detach_reset: bool = False
    residual: str = "integer"
    bias: bool = True
    layer_norm_eps: float = 1e-5
    initializer_gain: float = 0.577
    initializer_range: float = 0.02
    initializer_position: float = 1.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(vars(self))  # before anything of these sizes is made
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        if self.ffn_dim is None:
            self.ffn_dim = 4 * self.hidden_size
        for name in (*counts, "ffn_dim", "T"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpikelmError(f"{name} must be an integer >= 1; got {value!r}")
        for name in ("v_threshold", "map_threshold", "surrogate_alpha"):
            value = getattr(self, name)
            if not (value is None and name == "map_threshold") and not (0 < value < math.inf):
                raise SpikelmError(f"{name} must be a finite number > 0; got {value!r}")
        if self.residual not in ("integer", "binary"):
            raise SpikelmError(f"residual must be 'integer' or 'binary'; got {self.residual!r}")
        if self.hidden_size % self.num_attention_heads:
            raise SpikelmError(
                "hidden_size must be a multiple of num_attention_heads; got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def opt(cls, size: str, **changes: Any) -> BiSpikCLMConfig:
        """The shape of an OPT model, "125m", "350m" or "1.3b", with ``changes``."""
        if size not in SHAPES:
            raise SpikelmError(f"size must be one of {', '.join(SHAPES)}; got {size!r}")
        return cls(**(SHAPES[size] | changes))

    @property
    def neuron(self) -> dict[str, Any]:
        """Arguments of BinaryIF for every population."""
        from spikingjelly.activation_based.surrogate import ATan

        return {
            "beta": self.beta,
            "v_threshold": self.v_threshold,
            "reset_delay": True,
            "learn_threshold": self.learn_threshold,
            "surrogate_function": ATan(alpha=self.surrogate_alpha),
            "detach_reset": self.detach_reset,
        }
