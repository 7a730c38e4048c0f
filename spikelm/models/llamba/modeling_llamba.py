"""Llamba as a transformers model. Module names are those of the published checkpoints (cartesia-ai/Llamba-*)."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spikelm.errors import SpikelmError
from spikelm.layers.discrete_mamba2 import DiscreteMamba2
from spikelm.models.llamba.cache import LlambaCache
from spikelm.models.llamba.configuration_llamba import LlambaConfig
from spikelm.models.llamba.decoding import steps_of
from spikelm.models.llamba.from_llama import config_from_llama, copy_weights


class LlambaMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), as in Llama."""

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__()
        assert config.mlp_cfg is not None  # filled in by the config
        size, bias = config.mlp_cfg["intermediate_size"], config.mlp_cfg["bias"]
        self.gate_proj = nn.Linear(config.d_model, size, bias=bias)
        self.up_proj = nn.Linear(config.d_model, size, bias=bias)
        self.down_proj = nn.Linear(size, config.d_model, bias=bias)
        self.act_fn = ACT2FN[config.mlp_cfg["act_fn"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, d_model] -> [B, L, d_model]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlambaBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer = DiscreteMamba2(config.d_model, layer_idx=layer_idx, **(config.ssm_cfg or {}))
        self.input_layernorm = LlamaRMSNorm(config.d_model, eps=config.norm_epsilon)
        self.post_attention_layernorm = LlamaRMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mlp = LlambaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, L, d_model] -> [B, L, d_model]."""
        mixed = self.mixer(
            self.input_layernorm(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlambaPreTrainedModel(PreTrainedModel):
    """Initialisation and the flags transformers asks for."""

    config: LlambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlambaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiscreteMamba2):
            nn.init.ones_(module.D)
            if module.z_bias is not None:
                nn.init.zeros_(module.z_bias)


class LlambaModel(LlambaPreTrainedModel):
    """Embedding, blocks and the final norm."""

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([LlambaBlock(config, i) for i in range(config.n_layer)])
        self.final_layernorm = LlamaRMSNorm(config.d_model, eps=config.norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, L] or inputs_embeds [B, L, d_model], attention_mask [B, L] -> hidden states [B, L, d_model].

        hidden_states of the output are the input of every block and, last, the output of the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = LlambaCache(self.config)
        mask = create_recurrent_attention_mask(self.config, hidden_states, attention_mask, past_key_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        steps = None if output_hidden_states else steps_of(self, hidden_states, past_key_values, mask)
        if steps is not None:
            hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
            for step in steps:
                step(hidden_states, past_key_values)
        every: tuple[torch.Tensor, ...] = ()
        for layer in self.layers if steps is None else ():
            every += (hidden_states,) if output_hidden_states else ()
            hidden_states = layer(hidden_states, past_key_values=past_key_values, attention_mask=mask)
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*every, hidden_states) if output_hidden_states else None,
        )


class LlambaForCausalLM(LlambaPreTrainedModel, GenerationMixin):
    """Llamba with its LM head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(config)
        self.backbone = LlambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @classmethod
    def from_llama(cls, teacher: LlamaForCausalLM, **ssm_cfg: Any) -> "LlambaForCausalLM":
        """A student for a LlamaForCausalLM, grouped-query or not, tied or not.

        Its attention must have no bias and num_attention_heads * head_dim == hidden_size.

        Embedding, norms, MLP and head are copied; the mixer takes x <- V, B <- K, C <- Q, out_proj <- O (MOHAWK), with
        an identity convolution and gate [ours]. ``ssm_cfg`` overrides DiscreteMamba2's arguments; with other heads or
        another d_state than the attention's the mixers start random.
        """
        if not isinstance(teacher, LlamaForCausalLM):
            raise SpikelmError(f"from_llama takes a LlamaForCausalLM; got a {type(teacher).__name__}")
        student: Any = cls(config_from_llama(teacher.config, ssm_cfg, LlambaConfig))
        copy_weights(teacher, student)
        return student.to(teacher.device, teacher.dtype).train(teacher.training)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """generate() makes a DynamicCache by default; a Llamba's states need their own."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"Llamba keeps states of a fixed size: cache_implementation must be None or 'dynamic'; "
                    f"got {generation_config.cache_implementation!r}"
                )
            model_kwargs["past_key_values"] = LlambaCache(self.config)
        return False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits [B, L, vocab_size] (of the last ``logits_to_keep`` positions if given) and, with labels, the loss."""
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result
