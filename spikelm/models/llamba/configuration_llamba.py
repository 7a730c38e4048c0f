"""Configuration of Llamba, with the field names of the published checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from spikelm.errors import SpikelmError
from spikelm.limits import check_sizes
from spikelm.neurons.base import check_count


@strict
class LlambaConfig(PreTrainedConfig):
    """Configuration of a Llamba model; the defaults are Llamba-1B (1.405e9 parameters).

    Args:
        vocab_size: tokens; raised to a multiple of pad_vocab_size_multiple.
        d_model, n_layer: width and depth (also readable as hidden_size and num_hidden_layers).
        tie_embeddings: whether the LM head shares the embedding's weight.
        norm_epsilon: of every RMSNorm.
        mlp_cfg: intermediate_size, bias, act_fn.
        ssm_cfg: arguments of DiscreteMamba2 (d_state, n_v_heads, n_qk_heads, d_conv, expand, chunk_size, ...).
        initializer_range: standard deviation of random weights.

    Example:

    >>> from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
    >>> model = LlambaForCausalLM(LlambaConfig(vocab_size=64, d_model=32, n_layer=2,
    ...     mlp_cfg={"intermediate_size": 64, "bias": False, "act_fn": "silu"},
    ...     ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4}))
    """

    model_type = "llamba"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 128256
    d_model: int = 2048
    n_layer: int = 16
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    lm_head_bias: bool = False
    lm_head_prenorm: str = "rms"
    resid_dropout: float = 0.0
    norm_epsilon: float = 1e-5
    mlp_cfg: dict[str, Any] | None = None
    ssm_cfg: dict[str, Any] | None = None
    initializer_range: float = 0.02
    max_position_embeddings: int = 131072
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(vars(self))  # before anything of these sizes is made
        if self.resid_dropout != 0.0 or self.lm_head_prenorm != "rms":
            raise SpikelmError(
                "Llamba here has resid_dropout 0.0 and lm_head_prenorm 'rms' alone; got "
                f"{self.resid_dropout} and {self.lm_head_prenorm!r}"
            )
        for name in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple"):
            check_count(name, getattr(self, name))
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        self.mlp_cfg = {"intermediate_size": 8192, "bias": False, "act_fn": "silu"} | (self.mlp_cfg or {})
        self.ssm_cfg = {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "expand": 1, "chunk_size": 128} | {
            "activation": "identity",
            "bias": False,
            **(self.ssm_cfg or {}),
        }
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What every layer keeps in a cache."""
        return ["linear_attention"] * self.n_layer
