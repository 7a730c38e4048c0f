"""The cache of a BiSpikCLM: keys and values of every layer as bits, one per element and time step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from spikelm.errors import SpikelmError
from spikelm.ops.spiking_attention import pack_channels, pack_tokens

_BLOCK = 256  # tokens by which the memory of a layer grows
_WORD = 32  # tokens in a word of the values


class PackedSpikes(CacheLayerMixin):
    """Keys [T, B, H, ceil(d/32), capacity] and values [T, B, H, capacity/32, d] in int32, of ``tokens`` tokens.

    In keys a word holds channels, in values tokens (spikelm.ops.spiking_attention).
    """

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """No memory yet, for spikes [T, B, L, H, d]."""
        T, batch, _, heads, channels = key_states.shape
        self.device = key_states.device
        self.keys = torch.zeros((T, batch, heads, -(-channels // 32), 0), dtype=torch.int32, device=self.device)
        self.values = torch.zeros((T, batch, heads, 0, channels), dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends spikes [T, B, L, H, d]; returns the memory, whose first get_seq_length() tokens count."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.tokens, self.tokens + key_states.shape[2]
        self._reserve(end)
        self.keys[..., start:end] = pack_channels(key_states)
        word = start // _WORD
        packed = pack_tokens(value_states, start % _WORD)
        self.values[..., word : word + packed.shape[3], :] |= packed
        self.tokens = end
        return self.keys, self.values

    def _reserve(self, tokens: int) -> None:
        missing = tokens - self.keys.shape[-1]
        if missing > 0:
            missing += -missing % _BLOCK
            self.keys = torch.nn.functional.pad(self.keys, (0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, missing // _WORD))

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask; BiSpikCLM needs none."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.keys, self.values, self.is_initialized, self.tokens = None, None, False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or less, minus the tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.tokens = max(0, self.tokens + tokens_to_remove)
        word, bit = divmod(self.tokens, _WORD)
        self.values[..., word, :] &= (1 << bit) - 1
        self.values[..., word + 1 :, :] = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search: rows of the batch in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch ``repeats`` times."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=1)
            self.values = self.values.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows of the batch."""
        if self.is_initialized:
            self.keys = self.keys[:, indices.to(self.device)]
            self.values = self.values[:, indices.to(self.device)]


def check_cache(cache: Any, num_hidden_layers: int) -> None:
    """SpikelmError unless it is a BiSpikCLMCache of as many layers."""
    if not isinstance(cache, BiSpikCLMCache) or len(cache.layers) != num_hidden_layers:
        layers = f" of {len(cache.layers)} layers" if isinstance(cache, BiSpikCLMCache) else ""
        raise SpikelmError(
            f"past_key_values must be a BiSpikCLMCache({num_hidden_layers}), which keeps spikes as bits; got a "
            f"{type(cache).__name__}{layers}"
        )


class BiSpikCLMCache(Cache):
    """A transformers Cache of PackedSpikes layers.

    Example:

    >>> from spikelm.models.bispikclm import BiSpikCLMCache
    >>> BiSpikCLMCache(num_hidden_layers=2).get_seq_length()
    0
    """

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[PackedSpikes() for _ in range(num_hidden_layers)])
