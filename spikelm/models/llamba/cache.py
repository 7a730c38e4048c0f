"""The cache of a Llamba: convolution and scan states, and how many tokens they have seen."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from spikelm.models.llamba.configuration_llamba import LlambaConfig


class LlambaCache(DynamicCache):
    """A transformers DynamicCache of linear-attention layers alone, which that class cannot count the tokens of.

    Its size does not depend on the number of tokens.
    """

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(config=config)
        self.tokens_seen = 0

    @property
    def is_compileable(self) -> bool:
        """generate() must not prepare the attention masks that it compiles other models with."""
        return False

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Takes xBC [B, conv_dim, L]; returns it with what came before."""
        if layer_idx == 0:
            self.tokens_seen += conv_states.shape[-1]
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen since the start or the last reset."""
        return self.tokens_seen

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.tokens_seen = 0
