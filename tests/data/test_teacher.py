"""load_teacher: what it gives, and one line for each thing that is no teacher."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

from spikelm.data import load_teacher, train_tokenizer
from spikelm.errors import SpikelmError


@pytest.fixture
def saved(tmp_path: Path, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole teacher in bfloat16 with a vocabulary of 320 for a tokenizer of 300."""
    tiny_llama.resize_token_embeddings(320, mean_resizing=False)
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def refused(path: Path | str, message: str) -> None:
    with pytest.raises(SpikelmError, match=message) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_float32_frozen_and_in_eval_mode(saved: Path) -> None:
    model, tokenizer = load_teacher(saved)
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in model.parameters())
    assert not model.training
    assert len(tokenizer) == 300


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is not found, neither as a directory nor on the Hub")
    refused("no-such-owner/no-such-model", "no-such-owner/no-such-model is not found")
    refused(tmp_path, "holds no config.json")


def test_not_a_causal_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "is a BertForMaskedLM; a causal LM is accepted")


def test_no_tokenizer(saved: Path) -> None:
    for path in saved.glob("tokenizer*"):
        path.unlink()
    refused(saved, "has no tokenizer")


def test_tokenizer_larger_than_the_vocabulary(saved: Path, story: str) -> None:
    train_tokenizer(story, 400).save_pretrained(saved)
    refused(saved, "the tokenizer has 400 tokens and the model a vocabulary of 320")


def test_damaged_weights(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(saved, "its weights cannot be loaded")


def test_missing_weights(saved: Path, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.save_pretrained(saved)
    config = saved / "config.json"
    config.write_text(config.read_text().replace("LlamaModel", "LlamaForCausalLM"))
    refused(saved, "lacks 1 of its weights, lm_head.weight")
