"""Text to packed contexts, what every Python carries, teachers, preference pairs, and text classification."""

from spikelm.data.classification import (
    Row,
    check_labels,
    collate_classification,
    encode_rows,
    hold_out_sentences,
    load_classification,
)
from spikelm.data.embedded import python_documentation, train_teacher, train_tokenizer
from spikelm.data.embedded_classification import embedded_classification, train_bert, train_wordpiece
from spikelm.data.preferences import load_preferences, make_preferences, write_preferences
from spikelm.data.teacher import load_teacher, load_whole
from spikelm.data.text import bytes_per_token, check_tokenizer, load_contexts, text_contexts

__all__ = [
    "Row",
    "bytes_per_token",
    "check_labels",
    "check_tokenizer",
    "collate_classification",
    "embedded_classification",
    "encode_rows",
    "hold_out_sentences",
    "load_classification",
    "load_contexts",
    "load_preferences",
    "load_teacher",
    "load_whole",
    "make_preferences",
    "python_documentation",
    "text_contexts",
    "train_bert",
    "train_teacher",
    "train_tokenizer",
    "train_wordpiece",
    "write_preferences",
]
