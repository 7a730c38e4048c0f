"""Where text comes from: local files, Hub datasets and Python's documentation, read as pieces of bounded size."""

import codecs
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BYTES = 1_000_000
TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".json")
# Tried in this order on the first row of a source; the two pairs become a conversation of one turn each.
KNOWN_FIELDS = (
    ("text",),
    ("content",),
    ("story",),
    ("prompt", "response"),
    ("instruction", "output"),
    ("conversations",),
    ("messages",),
)
ROLES = {"human": "user", "gpt": "assistant"}


class Piece(NamedTuple):
    """A run of text. Successive pieces with the same document number continue one document."""

    source: int
    document: int
    text: str


class Reading(NamedTuple):
    """How rows are read: the tokenizer (for its chat template) and the caller's choices."""

    tokenizer: "PreTrainedTokenizerBase"
    text_field: str | None
    split: str
    hub_config: str | None
    streaming: bool


def source_names(source: str | Path) -> list[str]:
    """Split "a.txt+hub:owner/name" into its parts (a path that exists is never split) and check every local one."""
    text = str(source)
    names = [text] if Path(text).exists() else [part.strip() for part in text.split("+")]
    for name in names:
        if name != "embedded" and not name.startswith("hub:"):
            _check_file(name)
    return names


def total_bytes(names: Iterable[str]) -> int:
    """Bytes of the local files among `names` (Hub datasets and "embedded" count as 0)."""
    return sum(Path(name).stat().st_size for name in names if name != "embedded" and not name.startswith("hub:"))


def read_pieces(names: list[str], reading: Reading) -> Iterator[Piece]:
    """Pieces of all sources in turn, one from each (a row, or 1 MB of a text), until every source has ended."""
    turns = deque((index, _documents(name, reading)) for index, name in enumerate(names))
    while turns:
        index, documents = turns.popleft()
        for document, text in documents:
            yield Piece(index, document, text)
            turns.append((index, documents))
            break


def text_blocks(text: str) -> Iterator[str]:
    """Cut a text at newlines into blocks of about 1 MB; the blocks together are the text."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > BLOCK_BYTES:
            end = text.rfind("\n", start, start + BLOCK_BYTES) + 1 or start + BLOCK_BYTES
        yield text[start:end]
        start = end


def _check_file(name: str) -> None:
    path = Path(name)
    accepted = f"{', '.join(TEXT_SUFFIXES + LINES_SUFFIXES)}, hub:owner/name, or embedded"
    if not name:
        raise SpikelmError(f"the data source is empty; accepted: a path ending in {accepted}")
    if path.is_dir():
        raise SpikelmError(f"{name} is a directory; accepted: a path ending in {accepted}")
    if not path.exists():
        raise SpikelmError(f"no such text: {name}; accepted: a path ending in {accepted}")
    if path.suffix.lower() not in TEXT_SUFFIXES + LINES_SUFFIXES:
        raise SpikelmError(f"{name} has the suffix {path.suffix!r}; accepted: a path ending in {accepted}")
    if path.stat().st_size == 0:
        raise SpikelmError(f"{name} is empty")


def _documents(name: str, reading: Reading) -> Iterator[tuple[int, str]]:
    if name == "embedded":
        from spikelm.data.embedded import python_documentation

        return ((0, block) for block in text_blocks(python_documentation()))
    if name.startswith("hub:"):
        rows = hub_rows(name, reading.split, reading.hub_config, reading.streaming)
        return _row_documents(name, rows, reading)
    if Path(name).suffix.lower() in TEXT_SUFFIXES:
        return ((0, block) for block in _file_blocks(name))
    return _row_documents(name, (row for _, row in line_rows(name)), reading)


def _file_blocks(name: str) -> Iterator[str]:
    """Blocks of about 1 MB of a UTF-8 file, cut at newlines where there are any, so that memory stays bounded."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    carry = ""
    blank = True
    with open(name, "rb") as file:
        for raw in iter(partial(file.read, BLOCK_BYTES), b""):
            text = carry + _decoded(name, decoder, raw)
            cut = text.rfind("\n") + 1 or len(text)
            carry = text[cut:]
            if cut:
                blank = blank and not text[:cut].strip()
                yield text[:cut]
    carry += _decoded(name, decoder, b"")
    if carry:
        yield carry
    if blank and not carry.strip():
        raise SpikelmError(f"{name} is empty: it holds nothing but blanks")


def _decoded(name: str, decoder: codecs.IncrementalDecoder, raw: bytes) -> str:
    if b"\0" in raw:
        raise SpikelmError(f"{name} is binary (it holds NUL bytes); UTF-8 text is accepted")
    try:
        return decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        raise SpikelmError(f"{name} is not UTF-8 text ({error.reason}); UTF-8 text is accepted") from error


def line_rows(name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, counted from 1, and object) for every line of a JSON Lines file that is not blank."""
    number = 0
    for block in _file_blocks(name):
        # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SpikelmError(
                    f"{name} line {number} is not JSON ({error.msg}); one object a line is accepted"
                ) from error
            if not isinstance(row, dict):
                raise SpikelmError(f"{name} line {number} is a {type(row).__name__}; one object a line is accepted")
            yield number, row


def hub_rows(
    name: str, split: str = "train", hub_config: str | None = None, streaming: bool = False
) -> Iterator[Mapping[str, Any]]:
    """Rows of "hub:owner/name[:config[:split]]"; a part that is empty or absent keeps the argument's value."""
    from datasets import load_dataset

    repository, own_config, own_split, *rest = (*name.removeprefix("hub:").split(":"), "", "")
    if not repository or any(rest):
        raise SpikelmError(
            f"{name} is not a Hub dataset; accepted: hub:owner/name, hub:owner/name:config, hub:owner/name:config:split"
        )
    try:
        yield from load_dataset(repository, own_config or hub_config, split=own_split or split, streaming=streaming)
    # The network, the Hub's client and the readers of file formats raise unrelated classes; the cause stays chained.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpikelmError(f"{name} cannot be read: {reason}") from error


def _row_documents(name: str, rows: Iterator[Mapping[str, Any]], reading: Reading) -> Iterator[tuple[int, str]]:
    fields: tuple[str, ...] | None = None
    skipped = found = 0
    for number, row in enumerate(rows):
        if fields is None:
            fields = _usable_fields(name, row, reading.text_field)
        text = _row_text(row, fields, reading.tokenizer)
        if text is None:
            skipped += 1
        elif text:
            found += 1
            yield number, text
    if skipped:
        message = f"{name}: skipped {skipped} of {number + 1} rows that hold no text in {' + '.join(fields or ())}"
        warnings.warn(message, stacklevel=2)
    if not found:
        raise SpikelmError(f"{name} is empty: none of its rows holds text")


def _usable_fields(name: str, row: Mapping[str, Any], text_field: str | None) -> tuple[str, ...]:
    found = ", ".join(map(str, row)) or "none"
    if text_field is not None:
        if text_field not in row:
            raise SpikelmError(f"{name} has no field {text_field!r}; its fields: {found}")
        return (text_field,)
    for fields in KNOWN_FIELDS:
        if all(field in row for field in fields):
            return fields
    known = ", ".join("+".join(fields) for fields in KNOWN_FIELDS)
    raise SpikelmError(f"{name} has no usable field; its fields: {found}; known: {known}; or name one with text_field")


def _row_text(row: Mapping[str, Any], fields: tuple[str, ...], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The row's document, or None when its fields hold something else than text or a conversation."""
    values = [row.get(field) for field in fields]
    if len(values) == 2:
        question, answer = values
        context = row.get("input") if fields[0] == "instruction" else None
        if isinstance(question, str) and isinstance(context, str) and context:
            question = f"{question}\n\n{context}"
        values = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]]
    if isinstance(values[0], str):
        return values[0]
    return _conversation(values[0], tokenizer) if isinstance(values[0], list) else None


def messages_of(turns: list[Any]) -> list[dict[str, str]] | None:
    """[{"role", "content"}] of a conversation in those words or in from/value; None when it is something else."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def plain_text(messages: list[dict[str, str]]) -> str:
    """Lines "role: content", for tokenizers without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _conversation(turns: list[Any], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    from jinja2.exceptions import TemplateError

    messages = messages_of(turns)
    if messages is None:
        return None
    if tokenizer.chat_template is None:
        return plain_text(messages)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # a template may refuse an order of roles
        return None
    return str(text).removeprefix(tokenizer.bos_token or "")  # every context begins with bos anyway
