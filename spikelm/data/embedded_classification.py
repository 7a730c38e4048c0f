"""Text classification from what every Python carries; a WordPiece tokenizer and a small BERT, trained on the spot."""

import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.classification import Row, check_labels, collate_classification, encode_rows
from spikelm.data.embedded import docstrings, document_paragraphs
from spikelm.errors import SpikelmError
from spikelm.files import put_in_place

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import BertTokenizer

# Modules that a Python lacks, and those it adds, change the set a little; every class keeps most of its rows. [ours]
SUBJECTS = {
    "code": """abc ast bdb code codeop dataclasses dis doctest enum functools importlib inspect linecache pdb
        pickletools pkgutil pydoc tokenize trace traceback types typing unittest""",
    "interface": "cmd curses tkinter turtle",
    "network": """asyncio email ftplib html http imaplib ipaddress mailbox poplib smtplib socket socketserver ssl urllib
        wsgiref xml xmlrpc""",
    "numbers": """_pydatetime _pydecimal bisect calendar colorsys datetime decimal fractions heapq numbers operator
        random statistics""",
}
SMALLEST_PARAGRAPH = 4  # words with a letter
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHUNK = 50  # batches among which rows are sorted by length
LOGGING_STEPS = 10
# What train_bert trains unless told otherwise. [ours]
BERT_SHAPE: dict[str, int] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
}


@lru_cache(maxsize=1)
def embedded_classification() -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """(rows, label names): paragraphs of the standard library's docstrings and which subject their module is about.

    About 7,900 rows of ASCII on one line each, by file name; the same Python gives the same rows. Four classes: code,
    interface, network and numbers. Paragraphs of fewer than four words, or of modules of two subjects, are left out.
    """
    label_names = tuple(SUBJECTS)
    labels = {module: label for label, modules in enumerate(SUBJECTS.values()) for module in modules.split()}
    found: dict[str, set[int]] = defaultdict(set)
    for module, docstring in docstrings():
        if module not in labels:
            continue
        for paragraph in document_paragraphs(docstring):
            words = paragraph.split()
            if paragraph.isascii() and sum(any(map(str.isalpha, word)) for word in words) >= SMALLEST_PARAGRAPH:
                found[" ".join(words)].add(labels[module])
    rows = tuple(Row(text, next(iter(given))) for text, given in found.items() if len(given) == 1)
    missing = [name for label, name in enumerate(label_names) if all(row.label != label for row in rows)]
    if missing:
        raise SpikelmError(
            f"this Python carries no documentation of modules about {', '.join(missing)}; give a file as data instead"
        )
    return rows, label_names


def train_wordpiece(texts: Iterable[str], vocab_size: int = 8000, *, model_max_length: int = 512) -> "BertTokenizer":
    """BERT's tokenizer, lower case, of at most vocab_size tokens; [PAD] is 0, then [UNK], [CLS], [SEP], [MASK].

    A single text becomes [CLS] text [SEP]. The same texts give the same tokenizer. SpikelmError when the vocabulary
    cannot hold the characters of the texts.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer numbers the latter in the order of a randomly seeded hash table, if it is left to it, and ties
        # between pairs follow the numbers.
        special_tokens=[*SPECIAL_TOKENS, *_continuations(texts, tokenizer)],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        raise SpikelmError(
            f"vocab_size is {vocab_size}; the special tokens and the characters of the texts are {len(vocabulary)}"
        )
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=model_max_length)


def _continuations(texts: Iterable[str], tokenizer: "Tokenizer") -> list[str]:
    """ "##" and every character that stands within a word of the texts, in the order of code points."""
    characters: set[str] = set()
    for text in texts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        characters.update(*(word[1:] for word, _ in words))
    return [f"##{character}" for character in sorted(characters)]


def train_bert(
    output_dir: str | Path,
    rows: Sequence[Row],
    held_out: Sequence[Row] = (),
    *,
    label_names: Sequence[str] | None = None,
    vocab_size: int = 8000,
    steps: int = 2500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    dropout: float = 0.1,
    seed: int = 0,
    **shape: int,
) -> Path:
    """Train a tokenizer and a BertForSequenceClassification on `rows`; returns the directory, which appears when whole.

    AdamW under a rate that rises over the first tenth of the steps and falls to 0 on a cosine [ours]; batches hold
    texts of similar lengths. Nothing is kept of a training that is interrupted. A directory that exists and is not
    empty is refused.

    Args:
        held_out: rows whose accuracy the last line of log.jsonl gives as held_out_accuracy.
        label_names: one for each class, kept in the configuration; without them LABEL_0 and so on, one more than the
            largest label.
        dropout: in [0, 1), of hidden states, attention and the classifier.
        shape: entries of BertConfig, those that BERT_SHAPE names; texts are cut to max_position_embeddings tokens.

    log.jsonl has a line every 10 steps and at the end: step, loss (mean since the last line), learning_rate, wall_s.
    """
    import torch

    from spikelm.evaluate_classification import rate_accuracy

    target = Path(output_dir)
    _check_training(target, rows, held_out, label_names, shape, steps, batch_size, learning_rate, dropout)
    settings: dict[str, Any] = BERT_SHAPE | shape
    length = settings["max_position_embeddings"]
    tokenizer = train_wordpiece((row.text for row in rows), vocab_size, model_max_length=length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model: Any = _bert(settings, tokenizer, dropout, label_names or _numbered(rows, held_out)).to(device)
        encoded = encode_rows(rows, tokenizer, length)
        lines = _training_lines(model, encoded, steps, batch_size, learning_rate, random.Random(seed))
        with (partial / "log.jsonl").open("w", encoding="utf-8") as log:
            for line in lines:
                if line["step"] == steps and held_out:
                    line["held_out_accuracy"] = rate_accuracy(model, encode_rows(held_out, tokenizer, length))
                log.write(json.dumps(line) + "\n")
    model.eval().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    put_in_place(partial, target, record={"steps": steps})
    return target


def _training_lines(
    model: "nn.Module",
    encoded: list[dict[str, Any]],
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: random.Random,
) -> Iterator[dict[str, Any]]:
    """Trains in place; yields the lines of log.jsonl."""
    import torch
    from tqdm import tqdm
    from transformers import get_cosine_schedule_with_warmup

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    batches = _batches(encoded, batch_size, generator)
    begun, losses = time.perf_counter(), []
    model.train()
    for step in tqdm(range(1, steps + 1), desc="training", unit="step", disable=None):
        batch = {name: value.to(device) for name, value in collate_classification(next(batches)).items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % LOGGING_STEPS == 0 or step == steps:
            seconds = round(time.perf_counter() - begun, 3)
            mean = torch.stack(losses).mean().item()
            losses.clear()
            yield {"step": step, "loss": mean, "learning_rate": rate, "wall_s": seconds}


def _batches(
    encoded: list[dict[str, Any]], batch_size: int, generator: random.Random
) -> Iterator[list[dict[str, Any]]]:
    """Batches without end: every epoch in a new order, rows of similar length together, which saves half the time."""
    order = list(range(len(encoded)))
    while True:
        generator.shuffle(order)
        for start in range(0, len(order), CHUNK * batch_size):
            chunk = sorted(
                order[start : start + CHUNK * batch_size], key=lambda number: len(encoded[number]["input_ids"])
            )
            batches = [chunk[first : first + batch_size] for first in range(0, len(chunk), batch_size)]
            generator.shuffle(batches)
            yield from ([encoded[number] for number in batch] for batch in batches)


def _bert(settings: dict[str, Any], tokenizer: "BertTokenizer", dropout: float, names: Sequence[str]) -> "nn.Module":
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **settings,
    )
    return BertForSequenceClassification(config)


def _numbered(rows: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    largest = max(row.label for part in (rows, held_out) for row in part)
    return [f"LABEL_{number}" for number in range(largest + 1)]


def _check_training(
    target: Path,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    label_names: Sequence[str] | None,
    shape: dict[str, int],
    steps: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
) -> None:
    from spikelm.neurons.base import check_count, check_positive

    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SpikelmError(f"{target} exists already; give train_bert a directory that does not exist or is empty")
    unknown = [name for name in shape if name not in BERT_SHAPE]
    if unknown:
        raise SpikelmError(f"train_bert takes the shape {', '.join(BERT_SHAPE)}; got {', '.join(unknown)}")
    settings = BERT_SHAPE | shape
    for name, value in {"steps": steps, "batch_size": batch_size, **settings}.items():
        check_count(name, value)
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise SpikelmError(
            f"hidden_size is {settings['hidden_size']}; a multiple of num_attention_heads, "
            f"{settings['num_attention_heads']}, is accepted"
        )
    check_positive("learning_rate", learning_rate)
    if not 0 <= dropout < 1:
        raise SpikelmError(f"dropout is {dropout}; a number in [0, 1) is accepted")
    if not rows:
        raise SpikelmError("train_bert needs at least one row; got none")
    for part in (rows, held_out):
        check_labels(part, len(_numbered(rows, held_out)) if label_names is None else len(label_names))
