"""Models that several test files build."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Mamba2Config, Mamba2ForCausalLM

from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.models.spikingbert import SpikingBertConfig, SpikingBertForSequenceClassification


def llamba() -> LlambaForCausalLM:
    """A fresh random Llamba in eval mode, the same at every call: 2 layers, width 32, 4 heads, vocabulary 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlambaForCausalLM(
            LlambaConfig(
                vocab_size=64,
                d_model=32,
                n_layer=2,
                initializer_range=0.2,
                mlp_cfg={"intermediate_size": 48},
                ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 8},
            )
        ).eval()


def mamba2() -> Mamba2ForCausalLM:
    """A fresh random Mamba2 of transformers in eval mode, the same at every call: 2 layers, width 32, vocabulary 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Mamba2Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=16,
            n_groups=2,
            chunk_size=8,
            tie_word_embeddings=True,
        )
        return Mamba2ForCausalLM(config).eval()


def bispikclm(**arguments: object) -> BiSpikCLMForCausalLM:
    """A fresh random BiSpikCLM in eval mode, the same at every call: 2 layers, width 32, 4 heads, vocabulary 64.

    Its weights are large enough that every population fires and its greedy text is not one token repeated.
    """
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = shape | {"max_position_embeddings": 128, "initializer_gain": 2.0, "initializer_range": 0.5} | arguments
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BiSpikCLMForCausalLM(BiSpikCLMConfig(**fields)).eval()


BERT = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def spikingbert(**arguments: object) -> SpikingBertForSequenceClassification:
    """A fresh random SpikingBert in eval mode, the same at every call: 2 layers, width 32, 4 heads, vocabulary 64.

    Its weights are large enough that every population fires.
    """
    shape = BERT | {"num_hidden_layers": 2, "max_position_embeddings": 16, "initializer_range": 0.3, "T": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SpikingBertForSequenceClassification(SpikingBertConfig(**(shape | arguments))).eval()


def bert(**arguments: object) -> BertForSequenceClassification:
    """A fresh random BERT classifier in eval mode, the same at every call: 4 layers, otherwise as `spikingbert`."""
    shape = BERT | {"num_hidden_layers": 4, "max_position_embeddings": 16, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BertForSequenceClassification(BertConfig(**(shape | arguments))).eval()
