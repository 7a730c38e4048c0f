"""Llamba: Llama with every attention replaced by a discrete Mamba-2 mixer."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spikelm.models.llamba.configuration_llamba import LlambaConfig
from spikelm.models.llamba.modeling_llamba import LlambaForCausalLM, LlambaModel

AutoConfig.register("llamba", LlambaConfig)
AutoModel.register(LlambaConfig, LlambaModel)
AutoModelForCausalLM.register(LlambaConfig, LlambaForCausalLM)

__all__ = ["LlambaConfig", "LlambaForCausalLM", "LlambaModel"]
