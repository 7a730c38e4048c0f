"""SFSA, the softmax-free spiking attention of BiSpikCLM (arXiv 2605.13859, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.neurons import BinaryIF
from spikelm.ops import multistep
from spikelm.ops.spiking_attention import (
    pack_channels,
    pack_tokens,
    spiking_attention,
    unpack_channels,
    unpack_tokens,
)

# The bits' kernel has the delayed soft reset alone.
NEURON_ARGUMENTS = {
    *("beta", "v_threshold", "reset_delay", "learn_threshold", "surrogate_function", "detach_reset", "backend")
}


class StatelessBinaryIF(BinaryIF):
    """BinaryIF that starts from rest at every call and keeps nothing: x_seq [T, *] -> spikes [T, *].

    Its membrane is that of one token in one forward pass, so that no token meets another one's.
    """

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """All T steps."""
        threshold = self._threshold(x_seq, x_seq.dim() - 1)
        dynamics, backend = self._current_dynamics(), self.backend
        return multistep.multi_step(x_seq, None, threshold, dynamics, keep_state=False, backend=backend)[0]


class SpikingSelfAttention(nn.Module):
    """Causal self-attention without softmax, scale or product of two real numbers, X in {0, 1}::

        Q, K, V = SN(q_proj(X)), SN(k_proj(X)), SN(v_proj(X))
        A = SN_map(Q K^T) where the key is no later than the query, else 0
        Y = SN(out_proj(SN(A V)))

    for every time step and head. Q K^T and A V are integers: AND and popcount on bits.

    Where gradients or maps are asked for, or in float64, both products are matrix products and the map [T, B, H, L, S]
    exists; else Q, K and V are packed to bits and no map is stored (spikelm.ops.spiking_attention). The spikes are the
    same.

    Args:
        hidden_size: channels, a multiple of num_heads.
        neuron: arguments of BinaryIF for every population, of its delayed soft reset and beta <= 1 alone; None is
            {"beta": 0.9, "reset_delay": True}, the paper's.
        map_threshold: of SN_map, the overlap of a query and a key that a link takes; None is the neuron's [ours].
        bias: of the four projections.
        layer_idx: which layer of a cache this is.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        neuron: Mapping[str, Any] | None = None,
        map_threshold: float | None = None,
        bias: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1 or hidden_size % num_heads:
            raise SpikelmError(f"hidden_size must be a multiple of num_heads; got {hidden_size} and {num_heads}")
        neuron = {"beta": 0.9, "reset_delay": True} if neuron is None else dict(neuron)
        if neuron.get("reset_delay") is not True or not NEURON_ARGUMENTS.issuperset(neuron):
            raise SpikelmError(
                f"neuron must have reset_delay=True and may have {', '.join(sorted(NEURON_ARGUMENTS))}; got {neuron}"
            )
        self.num_heads, self.layer_idx = num_heads, layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(4)
        )
        own_threshold = {} if map_threshold is None else {"v_threshold": map_threshold}
        self.query_neuron, self.key_neuron, self.value_neuron = (per_channel(neuron, hidden_size) for _ in range(3))
        self.map_neuron = StatelessBinaryIF(**neuron | own_threshold)
        self.mixed_neuron, self.output_neuron = (per_channel(neuron, hidden_size) for _ in range(2))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Spikes [T, B, L, hidden_size] -> spikes of that shape and, if asked for, the mean map [B, H, L, S] over T.

        attention_mask: [B, L], 0 at padding, whose keys and values then are silent.
        past_key_values: a BiSpikCLMCache, which takes the new keys and values.
        """
        queries = self._heads(self.query_neuron(self.q_proj(hidden_states)))
        keys = self._heads(self.key_neuron(self.k_proj(hidden_states)))
        values = self._heads(self.value_neuron(self.v_proj(hidden_states)))
        if attention_mask is not None:
            real = (attention_mask != 0).to(keys.dtype)[:, :, None, None]
            keys, values = keys * real, values * real
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        average = None
        learned = (queries, keys, values, *self.map_neuron.parameters())
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
        if output_attentions or differentiated or queries.dtype == torch.float64:
            mixed, average = self._by_matrices(queries, keys, values, cache, output_attentions)
        else:
            mixed = self._by_bits(queries, keys, values, cache)
        return self.output_neuron(self.out_proj(self.mixed_neuron(mixed.flatten(-2)))), average

    def _heads(self, spikes: torch.Tensor) -> torch.Tensor:
        return spikes.unflatten(-1, (self.num_heads, -1))  # t b l h d

    def _by_matrices(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: Any, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A V [T, B, L, H, d] in integers, and the mean map [B, H, L, S] over T if asked for."""
        if cache is not None:
            seen = cache.get_seq_length()
            packed = cache.update(keys, values)
            if seen:  # what is cached has no gradient
                past_keys, past_values = unpack_channels(packed[0][..., :seen], keys.shape[-1]), packed[1]
                keys = torch.cat((past_keys.to(keys.dtype), keys), dim=2)
                values = torch.cat((unpack_tokens(past_values, seen).to(values.dtype), values), dim=2)
        queries, keys, values = (spikes.transpose(2, 3) for spikes in (queries, keys, values))  # t b h l d
        past = keys.shape[3] - queries.shape[3]
        overlap = count(queries, keys.transpose(-1, -2), keys.shape[-1])  # t b h l s
        # One mask is enough: an entry's neuron sees no other entry. A product is faster than tril of five axes.
        causal = torch.ones(overlap.shape[-2:], dtype=queries.dtype, device=queries.device).tril(past)
        fired = self.map_neuron(overlap).to(queries.dtype) * causal
        mixed = count(fired, values, values.shape[3]).transpose(2, 3)
        return mixed.to(queries.dtype), fired.mean(0) if output_attentions else None

    def _by_bits(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: Any) -> torch.Tensor:
        """A V [T, B, L, H, d] in integers; no map is stored."""
        if cache is None:
            packed_keys, packed_values, seen = pack_channels(keys), pack_tokens(values), keys.shape[2]
        else:
            packed_keys, packed_values = cache.update(keys, values)
            seen = cache.get_seq_length()
        neuron = self.map_neuron
        mixed, _ = spiking_attention(
            pack_channels(queries), packed_keys, packed_values, num_keys=seen,
            threshold=float(neuron._threshold(queries, 0)), beta=neuron.beta, dtype=queries.dtype,
            backend=neuron.backend,
        )  # fmt: skip
        return mixed


def per_channel(neuron: Mapping[str, Any], num_channels: int) -> StatelessBinaryIF:
    """A population; thresholds that are learned are one a channel."""
    return StatelessBinaryIF(**neuron, num_channels=num_channels if neuron.get("learn_threshold") else None)


def count(left: torch.Tensor, right: torch.Tensor, largest: int) -> torch.Tensor:
    """left @ right of spikes, exact in their dtype, or in float32 where that cannot hold integers up to ``largest``."""
    exact = left.dtype if largest <= 2 / torch.finfo(left.dtype).eps else torch.float32
    with torch.autocast(left.device.type, enabled=False):
        return left.to(exact) @ right.to(exact)
