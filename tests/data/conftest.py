"""A small byte-level tokenizer that every data test shares."""

import pytest
from transformers import PreTrainedTokenizerFast

from spikelm.data import train_tokenizer

STORY = "".join(f"Story {number}: the cat saw {number * 7} birds, and then it slept.\n" for number in range(2000))


@pytest.fixture(scope="session")
def story() -> str:
    """100 kB of regular text."""
    return STORY


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """300 tokens, trained on `story`; bos 0, eos 1."""
    return train_tokenizer(STORY, 300)
