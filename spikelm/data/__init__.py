"""Text to packed contexts, the documentation that every Python carries, teachers, and preference pairs."""

from spikelm.data.embedded import python_documentation, train_teacher, train_tokenizer
from spikelm.data.preferences import load_preferences, make_preferences, write_preferences
from spikelm.data.teacher import load_teacher, load_whole
from spikelm.data.text import bytes_per_token, check_tokenizer, load_contexts, text_contexts

__all__ = [
    "bytes_per_token",
    "check_tokenizer",
    "load_contexts",
    "load_preferences",
    "load_teacher",
    "load_whole",
    "make_preferences",
    "python_documentation",
    "text_contexts",
    "train_teacher",
    "train_tokenizer",
    "write_preferences",
]
