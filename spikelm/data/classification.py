"""Text classification: rows (text, label) from files and the Hub, sentences held out, tokens and batches."""

import csv
import random
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spikelm.data.sources import LINES_SUFFIXES, hub_rows, line_rows
from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TABLE_SUFFIXES = (".tsv", ".csv")
# Tried in this order on the first row of a source.
TEXT_FIELDS = ("text", "sentence")
LABEL_FIELDS = ("label", "labels")
GLUE = "nyu-mll/glue"
ACCEPTED = (
    f"a path ending in {', '.join(TABLE_SUFFIXES + LINES_SUFFIXES)}, hub:owner/name[:config[:split]], glue:task, or "
    "embedded"
)
START = 3  # tokens by which a row is looked up in a sentence
Tokens = tuple[str, ...]


class Row(NamedTuple):
    """A text and its class, 0 .. num_labels - 1."""

    text: str
    label: int


def load_classification(
    source: str | Path,
    *,
    text_field: str | None = None,
    label_field: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
) -> list[Row]:
    """Rows of `source`, blanks around their texts taken off.

    source: a path ending in .tsv or .csv (a first line that names the columns; tabs and no quotes in .tsv, as SST-2
        comes), .jsonl or .json (one object a line), "hub:owner/name[:config[:split]]", "glue:sst2" (a task of
        nyu-mll/glue), "embedded" (spikelm.data.embedded_classification), or several of these joined with "+", from
        which rows are taken in turn.
    text_field, label_field: without them the first of text, sentence and the first of label, labels. Labels are
        integers or their digits.
    split: of a Hub data set that does not name its own.
    max_rows: the first so many.
    Rows whose text is empty are skipped with a warning that counts them. SpikelmError names what cannot be read.
    """
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise SpikelmError(f"max_rows must be an integer >= 1, or None for all rows; got {max_rows!r}")
    names = _source_names(source)
    turns = deque(_rows(name, text_field, label_field, split) for name in names)
    rows: list[Row] = []
    while turns and (max_rows is None or len(rows) < max_rows):
        source_rows = turns.popleft()
        for row in source_rows:
            rows.append(row)
            turns.append(source_rows)
            break
    return rows


def check_labels(rows: Iterable[Row], num_labels: int) -> None:
    """SpikelmError unless every label is within 0 .. num_labels - 1; -1 is how GLUE marks the rows of its test sets."""
    for number, row in enumerate(rows, 1):
        if not 0 <= row.label < num_labels:
            raise SpikelmError(
                f"row {number} ({row.text[:40]!r}) has the label {row.label}; 0 to {num_labels - 1} are accepted"
            )


def hold_out_sentences(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, `count` held-out sentences), so that no phrase is trained on that only a held-out sentence has.

    SST-2's rows are phrases of sentences. A row is a whole sentence when its tokens, text.split(), stand side by side
    in no longer row; rows of other data mostly are. `count` whole sentences are drawn at random by `seed`. Training
    keeps the rows, in their order, that are contained in one of the other whole sentences (every such sentence itself
    included), which is how the official split of SST-2 was made [our reading].

    A sentence that is there several times is drawn as one row, the first, and none of its rows is trained on. One
    whose rows have different labels is never drawn, for nobody could be right about it; training keeps such rows.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SpikelmError(f"count must be an integer >= 1; got {count!r}")
    numbers: dict[Tokens, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[tuple(row.text.split())].append(number)
    if () in numbers:
        raise SpikelmError(f"row {numbers[()][0] + 1} has no tokens; rows with text are accepted")
    lengths = _lengths_by_start(numbers)
    contained: set[Tokens] = set()
    for tokens in sorted(numbers, key=len, reverse=True):
        if tokens not in contained:  # what it contains, a longer row's contents hold already
            contained.update(part for part in _parts(tokens, numbers, lengths) if part != tokens)
    sentences = [tokens for tokens in numbers if tokens not in contained]
    agreed = [tokens for tokens in sentences if len({rows[number].label for number in numbers[tokens]}) == 1]
    if count > min(len(agreed), len(sentences) - 1):
        raise SpikelmError(
            f"count is {count}; the {len(rows)} rows have {len(sentences)} whole sentences, {len(agreed)} of them "
            "without contradicting labels; one more sentence than is held out is needed"
        )
    drawn = random.Random(seed).sample(agreed, count)
    remaining = set(sentences).difference(drawn)
    trained = {part for tokens in remaining for part in _parts(tokens, numbers, lengths)}
    kept = sorted(number for tokens in trained for number in numbers[tokens])
    return [rows[number] for number in kept], [rows[numbers[tokens][0]] for tokens in drawn]


def _lengths_by_start(rows: Iterable[Tokens]) -> dict[Tokens, set[int]]:
    """The lengths of the rows that begin with the same (at most) START tokens."""
    lengths: dict[Tokens, set[int]] = defaultdict(set)
    for tokens in rows:
        lengths[tokens[:START]].add(len(tokens))
    return dict(lengths)


def _parts(sentence: Tokens, rows: Mapping[Tokens, Any], lengths: Mapping[Tokens, set[int]]) -> Iterator[Tokens]:
    """The rows whose tokens stand side by side in the sentence, itself among them if it is one; some repeatedly."""
    for start in range(len(sentence)):
        for size in range(1, START + 1):
            for length in lengths.get(sentence[start : start + size], ()):
                # Rows of START tokens and more share a start: their own tokens decide. At the sentence's end a start
                # is cut short, and a slice equals a row of another length never.
                part = sentence[start : start + length]
                if len(part) == length and part in rows:
                    yield part


def encode_rows(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[dict[str, Any]]:
    """Rows {"input_ids", "attention_mask": lists of at most max_length integers, "labels": an integer}."""
    if not rows:
        return []
    # The special tokens count, and a text has one token at least.
    smallest = tokenizer.num_special_tokens_to_add() + 1
    if max_length < smallest:
        raise SpikelmError(f"max_length is {max_length}; a text and its special tokens need at least {smallest}")
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row.label}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def collate_classification(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> "dict[str, Tensor]":
    """A batch of rows of encode_rows: input_ids and attention_mask [B, L], padded on the right, and labels [B]."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[number, :length] = torch.as_tensor(row["input_ids"])
        attention_mask[number, :length] = torch.as_tensor(row["attention_mask"])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _source_names(source: str | Path) -> list[str]:
    """Split "a.tsv+glue:sst2" into its parts (a path that exists is never split) and check every one."""
    text = str(source)
    names = [text] if Path(text).exists() else [part.strip() for part in text.split("+")]
    for name in names:
        if name == "embedded" or name.startswith(("hub:", "glue:")):
            continue
        path = Path(name)
        if not name:
            raise SpikelmError(f"the data source is empty; accepted: {ACCEPTED}")
        if path.suffix.lower() not in TABLE_SUFFIXES + LINES_SUFFIXES:
            raise SpikelmError(f"{name} has the suffix {path.suffix!r}; accepted: {ACCEPTED}")
        if not path.is_file():
            raise SpikelmError(f"no such file: {name}; accepted: {ACCEPTED}")
    return names


def _rows(name: str, text_field: str | None, label_field: str | None, split: str) -> Iterator[Row]:
    """Rows of one source; its first row decides which fields are read."""
    if name == "embedded":
        from spikelm.data.embedded_classification import embedded_classification

        yield from embedded_classification()[0]
        return
    fields: tuple[str, str] | None = None
    empty = found = 0
    for place, row in _placed_rows(name, split):
        if fields is None:
            fields = (
                _field(name, row, text_field, TEXT_FIELDS, "text"),
                _field(name, row, label_field, LABEL_FIELDS, "label"),
            )
        text = row.get(fields[0])
        if not isinstance(text, str):
            raise SpikelmError(f"{place}: {fields[0]} is a {type(text).__name__}; text is accepted")
        if not text.strip():
            empty += 1
            continue
        found += 1
        yield Row(text.strip(), _label(row.get(fields[1]), f"{place}: {fields[1]}"))
    if empty:
        warnings.warn(f"{name}: skipped {empty} of {empty + found} rows whose text is empty", stacklevel=2)
    if not found:
        raise SpikelmError(f"{name} is empty: it holds no rows with text")


def _placed_rows(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where the row stands, for messages; the row)."""
    if name.startswith(("hub:", "glue:")):
        hub_name = name if name.startswith("hub:") else f"hub:{GLUE}:{name.removeprefix('glue:')}"
        for number, row in enumerate(hub_rows(hub_name, split), 1):
            yield f"{name} row {number}", row
    elif Path(name).suffix.lower() in LINES_SUFFIXES:
        for number, row in line_rows(name):
            yield f"{name} line {number}", row
    else:
        yield from _table_rows(name)


def _table_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    header: list[str] | None = None
    try:
        for number, cells in _cells(name):
            if not any(cells):  # a blank line
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise SpikelmError(
                    f"{name} line {number} has {len(cells)} columns; its first line has {len(header)}: "
                    f"{', '.join(header)}"
                )
            else:
                yield f"{name} line {number}", dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise SpikelmError(f"{name} is not UTF-8 text ({error.reason}); UTF-8 text is accepted") from error
    except csv.Error as error:
        raise SpikelmError(f"{name} cannot be read as .csv: {error}") from error


def _cells(name: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the line on which it ends, cells) of every line of a table."""
    if Path(name).suffix.lower() == ".csv":
        with open(name, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                yield reader.line_num, cells
    else:
        # Not the csv module: a quotation mark is text here, and so is every line end but "\n".
        with open(name, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n").split("\t")


def _field(name: str, row: Mapping[str, Any], given: str | None, known: Sequence[str], role: str) -> str:
    """The name of the column that holds the texts or the labels."""
    for field in known if given is None else (given,):
        if field in row:
            return field
    found = ", ".join(map(str, row)) or "none"
    wanted = f"no field {given!r}" if given else f"no field {' or '.join(known)}"
    raise SpikelmError(
        f"{name} has {wanted}; its fields: {found}; name the one that holds the {role} with {role}_field"
    )


def _label(value: Any, place: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise SpikelmError(f"{place} is {value!r}; an integer, or its digits, is accepted")
