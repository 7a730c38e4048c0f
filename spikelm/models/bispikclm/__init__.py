"""BiSpikCLM: a causal language model of binary spikes, with softmax-free attention."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spikelm.models.bispikclm.cache import BiSpikCLMCache
from spikelm.models.bispikclm.configuration_bispikclm import BiSpikCLMConfig
from spikelm.models.bispikclm.modeling_bispikclm import BiSpikCLMForCausalLM, BiSpikCLMModel

AutoConfig.register("bispikclm", BiSpikCLMConfig)
AutoModel.register(BiSpikCLMConfig, BiSpikCLMModel)
AutoModelForCausalLM.register(BiSpikCLMConfig, BiSpikCLMForCausalLM)

__all__ = ["BiSpikCLMCache", "BiSpikCLMConfig", "BiSpikCLMForCausalLM", "BiSpikCLMModel"]
