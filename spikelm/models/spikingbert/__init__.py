"""SpikingBert: a BERT encoder of integrate-and-fire populations, read at their average spiking rates."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from spikelm.models.spikingbert.configuration_spikingbert import SpikingBertConfig
from spikelm.models.spikingbert.from_bert import from_bert, with_weights
from spikelm.models.spikingbert.modeling_spikingbert import SpikingBertForSequenceClassification, SpikingBertModel

AutoConfig.register("spikingbert", SpikingBertConfig)
AutoModel.register(SpikingBertConfig, SpikingBertModel)
AutoModelForSequenceClassification.register(SpikingBertConfig, SpikingBertForSequenceClassification)

__all__ = [
    "SpikingBertConfig",
    "SpikingBertForSequenceClassification",
    "SpikingBertModel",
    "from_bert",
    "with_weights",
]
