"""BiSpikCLM as a transformers model: a causal language model whose activations are spikes (arXiv 2605.13859)."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from spikelm.errors import SpikelmError
from spikelm.layers.spiking_attention import SpikingSelfAttention, per_channel
from spikelm.models.bispikclm.cache import BiSpikCLMCache, check_cache
from spikelm.models.bispikclm.configuration_bispikclm import BiSpikCLMConfig


class BiSpikCLMBlock(GradientCheckpointingLayer):
    """Attention and MLP between spikes, X [T, B, L, d]; Attention and MLP give spikes.

    residual "integer":  H = X + Attention(SN(X)),   X' = H + MLP(SN(H))
    residual "binary":   H = SN(X + Attention(X)),   X' = SN(H + MLP(H))
    with MLP(x) = SN(fc2(SN(fc1(x)))).
    """

    def __init__(self, config: BiSpikCLMConfig, layer_idx: int) -> None:
        super().__init__()
        size, neuron = config.hidden_size, config.neuron
        assert config.ffn_dim is not None  # filled in by the config
        self.binary = config.residual == "binary"
        self.self_attn = SpikingSelfAttention(
            size, config.num_attention_heads, neuron, config.map_threshold, config.bias, layer_idx
        )
        self.fc1 = nn.Linear(size, config.ffn_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.ffn_dim, size, bias=config.bias)
        self.attention_neuron, self.mlp_neuron = (per_channel(neuron, size) for _ in range(2))
        self.fc1_neuron, self.fc2_neuron = per_channel(neuron, config.ffn_dim), per_channel(neuron, size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [T, B, L, d] -> the same shape, and the mean map [B, H, L, S] if asked for."""
        spikes = hidden_states if self.binary else self.attention_neuron(hidden_states)
        mixed, average = self.self_attn(spikes, attention_mask, past_key_values, output_attentions)
        hidden_states = hidden_states + mixed
        if self.binary:
            hidden_states = self.attention_neuron(hidden_states)
            return self.mlp_neuron(hidden_states + self._mlp(hidden_states)), average
        return hidden_states + self._mlp(self.mlp_neuron(hidden_states)), average

    def _mlp(self, spikes: torch.Tensor) -> torch.Tensor:
        return self.fc2_neuron(self.fc2(self.fc1_neuron(self.fc1(spikes))))


class BiSpikCLMPreTrainedModel(PreTrainedModel):
    """Initialisation and the flags transformers asks for."""

    config: BiSpikCLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BiSpikCLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Positions):
            init.copy_(module.weight, self.config.initializer_position * sinusoids(*module.weight.shape))
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_gain / module.in_features**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class Positions(nn.Embedding):
    """The learned positions, a class of its own for its first values."""


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """[length, channels] of mean square 1: sines, then cosines, of wavelengths from 2 pi to 2 pi length."""
    angles = torch.arange(length)[:, None] * float(length) ** -torch.linspace(0, 1, -(-channels // 2))
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


class BiSpikCLMModel(BiSpikCLMPreTrainedModel):
    """Embeddings, their spikes, the blocks, the mean over T and the final norm."""

    def __init__(self, config: BiSpikCLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Positions(config.max_position_embeddings, config.hidden_size)
        self.input_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.input_neuron = per_channel(config.neuron, config.hidden_size)
        self.layers = nn.ModuleList([BiSpikCLMBlock(config, i) for i in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, L] or inputs_embeds [B, L, d], attention_mask [B, past + L] -> hidden states [B, L, d].

        hidden_states of the output, all means over T: the embedding's spikes, the stream behind every block but the
        last one and, last, the output of the final norm. attentions: the mean maps [B, H, L, past + L] over T.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = BiSpikCLMCache(self.config.num_hidden_layers)
        if past_key_values is not None:
            check_cache(past_key_values, self.config.num_hidden_layers)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions, mask = self._positions(embedded, attention_mask, position_ids, past)
        # The norm is of the tokens alone: in a sum the growing embedding would drown the positions.
        current = self.input_layer_norm(embedded) + self.embed_positions(positions)
        spikes = self.input_neuron(current.expand(self.config.T, *current.shape))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        streams, maps = [], []
        for layer in self.layers:
            streams += [spikes.mean(0)] if output_hidden_states else []
            spikes, average = layer(
                spikes, mask, past_key_values=past_key_values, output_attentions=bool(output_attentions)
            )
            maps.append(average)
        hidden_states = self.final_layer_norm(spikes.mean(0))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*streams, hidden_states) if output_hidden_states else None,
            attentions=tuple(maps) if output_attentions else None,
        )

    def _positions(
        self, embedded: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, past: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions [1 or B, L], counted over real tokens, and the new tokens' mask [B, L] where there is padding."""
        length, longest = embedded.shape[1], self.config.max_position_embeddings
        tokens: int | None = None  # of the longest context, where that is known without looking into a tensor
        if attention_mask is not None and attention_mask.shape != (embedded.shape[0], past + length):
            raise SpikelmError(
                f"attention_mask must be [{embedded.shape[0]}, {past + length}], over {past} cached and {length} new "
                f"tokens; got {tuple(attention_mask.shape)}"
            )
        padded = attention_mask is not None and not bool(attention_mask.all())
        if position_ids is None and attention_mask is not None and padded:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=embedded.device).unsqueeze(0)
            tokens = past + length
        if tokens is None:
            tokens = int(position_ids.max()) + 1 if position_ids.numel() else 0
        if tokens > longest:
            raise SpikelmError(
                f"the context has {tokens} tokens; this model's table of positions (max_position_embeddings) ends at "
                f"{longest}"
            )
        return position_ids, attention_mask[:, past:] if attention_mask is not None and padded else None


class BiSpikCLMForCausalLM(BiSpikCLMPreTrainedModel, GenerationMixin):
    """BiSpikCLM with its LM head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BiSpikCLMConfig) -> None:
        super().__init__(config)
        self.model = BiSpikCLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """generate() makes a DynamicCache by default, of dense keys and values."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    "BiSpikCLM keeps keys and values as bits: cache_implementation must be None or 'dynamic'; "
                    f"got {generation_config.cache_implementation!r}"
                )
            model_kwargs["past_key_values"] = BiSpikCLMCache(self.config.num_hidden_layers)
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocab_size] (of the last ``logits_to_keep`` positions if given) and, with labels, the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
