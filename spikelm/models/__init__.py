"""Spiking students as transformers models; importing this registers them with the Auto classes."""

from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM, BiSpikCLMModel
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM, LlambaModel
from spikelm.models.spikingbert import SpikingBertConfig, SpikingBertForSequenceClassification, SpikingBertModel

__all__ = [
    "BiSpikCLMConfig",
    "BiSpikCLMForCausalLM",
    "BiSpikCLMModel",
    "LlambaConfig",
    "LlambaForCausalLM",
    "LlambaModel",
    "SpikingBertConfig",
    "SpikingBertForSequenceClassification",
    "SpikingBertModel",
]
