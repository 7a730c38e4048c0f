"""Text to packed contexts, the documentation that every Python carries, and teachers."""

from spikelm.data.embedded import python_documentation, train_teacher, train_tokenizer
from spikelm.data.teacher import load_teacher, load_whole
from spikelm.data.text import bytes_per_token, check_tokenizer, load_contexts, text_contexts

__all__ = [
    "bytes_per_token",
    "check_tokenizer",
    "load_contexts",
    "load_teacher",
    "load_whole",
    "python_documentation",
    "text_contexts",
    "train_teacher",
    "train_tokenizer",
]
