"""What a Llamba takes over from the Llama it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig

from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from spikelm.models.llamba.configuration_llamba import LlambaConfig

SILU_ONE = 1.2784645  # silu(SILU_ONE) = 1: the gate starts open


def config_from_llama(llama: LlamaConfig, ssm_cfg: dict[str, Any], config_class: type[LlambaConfig]) -> LlambaConfig:
    """The Llamba of the same width, depth, vocabulary and heads."""
    heads, head_dim = llama.num_attention_heads, llama.head_dim or llama.hidden_size // llama.num_attention_heads
    if heads * head_dim != llama.hidden_size or llama.attention_bias:
        raise SpikelmError(
            "from_llama needs num_attention_heads * head_dim == hidden_size and no attention_bias; "
            f"got {heads} * {head_dim} for {llama.hidden_size}, attention_bias={llama.attention_bias}"
        )
    return config_class(
        vocab_size=llama.vocab_size,
        pad_vocab_size_multiple=1,
        d_model=llama.hidden_size,
        n_layer=llama.num_hidden_layers,
        tie_embeddings=llama.tie_word_embeddings,
        norm_epsilon=llama.rms_norm_eps,
        mlp_cfg={"intermediate_size": llama.intermediate_size, "bias": llama.mlp_bias, "act_fn": llama.hidden_act},
        ssm_cfg={"d_state": head_dim, "n_v_heads": heads, "n_qk_heads": heads, "expand": 1, "chunk_size": 64} | ssm_cfg,
        max_position_embeddings=llama.max_position_embeddings,
        pad_token_id=llama.pad_token_id,
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
    )


@torch.no_grad()
def copy_weights(teacher: Any, student: Any) -> None:
    """Copies what both have and initialises the mixers from the attentions."""
    student.backbone.embedding.weight.copy_(teacher.model.embed_tokens.weight)
    student.backbone.final_layernorm.weight.copy_(teacher.model.norm.weight)
    student.lm_head.weight.copy_(teacher.lm_head.weight)
    for block, layer in zip(student.backbone.layers, teacher.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            getattr(block, name).load_state_dict(getattr(layer, name).state_dict())
        _initialise_mixer(block.mixer, layer.self_attn)


def _initialise_mixer(mixer: Any, attention: Any) -> None:
    """x <- V, B <- K, C <- Q / sqrt(head_dim), out_proj <- O; keys and values repeated over grouped heads."""
    heads, state = mixer.n_v_heads, mixer.d_state
    if (mixer.n_qk_heads, state, mixer.head_dim) != (heads, attention.head_dim, attention.head_dim):
        return  # another geometry was asked for: random projections, trained by the first stage
    repeats = attention.num_key_value_groups

    def per_head(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)

    value, key = per_head(attention.v_proj.weight), per_head(attention.k_proj.weight)
    query = attention.q_proj.weight * attention.scaling
    xBC, z, A_log = mixer.in_proj.weight.split([mixer.conv_dim, mixer.d_inner, heads])
    xBC.copy_(torch.cat([value, key, query]))
    z.zero_()  # with z_bias below the gate is 1 for every input
    A_log.normal_(std=0.02)
    if mixer.z_bias is not None:
        mixer.z_bias.fill_(SILU_ONE)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[..., -1] = 1.0
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
    mixer.D.zero_()
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
