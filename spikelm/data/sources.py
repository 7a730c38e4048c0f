"""Where text comes from: local files, Hub datasets and Python's documentation, read as pieces of bounded size."""

import codecs
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spikelm.data.bad_documents import BadDocuments, DocumentError, document_error, listed
from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BYTES = 1_000_000
LONGEST_LINE = 2**28  # bytes; what has longer ones is hardly JSON Lines, and is not to fill the memory
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
    """A run of text. Successive pieces with the same document number continue one document.

    document: the number of a line or row, from 1; 0 for a text, which is one document.
    """

    source: int
    document: int
    text: str


class Reading(NamedTuple):
    """How rows are read: the tokenizer (for its chat template) and the caller's choices.

    max_bad_documents: how many documents that cannot be read are left out; 0: the first one is an error.
    """

    tokenizer: "PreTrainedTokenizerBase"
    text_field: str | None
    split: str
    hub_config: str | None
    streaming: bool
    max_bad_documents: int = 0


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


def read_pieces(names: list[str], reading: Reading, bad: BadDocuments | None = None) -> Iterator[Piece]:
    """Pieces of all sources in turn, one from each (a row, or 1 MB of a text), until every source has ended.

    bad: where documents that cannot be read are noted; without it each is warned of as it is met.
    """
    bad = BadDocuments(names, reading.max_bad_documents, at_once=True) if bad is None else bad
    turns = deque((index, _documents(index, name, reading, bad)) for index, name in enumerate(names))
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


def _documents(source: int, name: str, reading: Reading, bad: BadDocuments) -> Iterator[tuple[int, str]]:
    if name == "embedded":
        from spikelm.data.embedded import python_documentation

        return ((0, block) for block in text_blocks(python_documentation()))
    if name.startswith("hub:"):
        hub = hub_rows(name, reading.split, reading.hub_config, reading.streaming)
        return _row_documents(source, enumerate(hub, 1), reading, bad)
    if Path(name).suffix.lower() in TEXT_SUFFIXES:
        return ((0, block) for block in _file_blocks(name))
    return _row_documents(source, line_rows(name, bad, source), reading, bad)


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


def line_rows(name: str, bad: BadDocuments | None = None, source: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, counted from 1, and object) for every line of a JSON Lines file that is not blank.

    bad: where lines that hold no object are noted, as those of bad.names[source]; without it the first is a
        SpikelmError.
    """
    bad = BadDocuments([name]) if bad is None else bad
    for number, line in _lines(name):
        try:
            row = _object(line)
        except DocumentError as error:
            bad.add(source, number, error)
        else:
            if row is not None:
                yield number, row


def _lines(name: str) -> Iterator[tuple[int, bytes]]:
    """(number, bytes without the newline) of every line; of one of LONGEST_LINE bytes or more, its beginning."""
    number, ended = 0, True
    with open(name, "rb") as file:
        # Bytes are cut at newlines alone, as JSON strings may hold U+2028 and its like unescaped.
        for part in iter(partial(file.readline, LONGEST_LINE), b""):
            if ended:
                number += 1
                yield number, (part.removeprefix(codecs.BOM_UTF8) if number == 1 else part).removesuffix(b"\n")
            ended = part.endswith(b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None for a blank one."""
    if len(line) >= LONGEST_LINE:
        raise DocumentError(f"longer than {LONGEST_LINE} bytes", "one object a line")
    try:
        text = line.decode()
        if not text or text.isspace():
            return None
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _line_error(line, error) from error
    if not isinstance(row, dict):
        raise DocumentError(f"a {type(row).__name__}", "one object a line")
    return row


def _line_error(line: bytes, error: Exception) -> DocumentError:
    if b"\0" in line:  # which JSON never takes
        return DocumentError("binary (it holds NUL bytes)", "UTF-8 text")
    if isinstance(error, UnicodeDecodeError):
        return DocumentError(f"not UTF-8 text ({error.reason})", "UTF-8 text")
    if isinstance(error, json.JSONDecodeError):
        return DocumentError(f"not JSON ({error.msg})", "one object a line")
    # Nested beyond what Python parses, or a number of more than 4300 digits.
    return DocumentError(f"not JSON that can be parsed ({error})", "one object a line")


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


def _row_documents(
    source: int, rows: Iterable[tuple[int, Mapping[str, Any]]], reading: Reading, bad: BadDocuments
) -> Iterator[tuple[int, str]]:
    name = bad.names[source]
    fields: tuple[str, ...] | None = None
    read = skipped = found = 0
    for number, row in rows:
        read += 1
        if fields is None:
            fields = _usable_fields(name, row, reading.text_field)
        try:
            text = _row_text(row, fields, reading.tokenizer)
        except DocumentError as error:
            bad.add(source, number, error)
            continue
        if text is None:
            skipped += 1
        elif text:
            found += 1
            yield number, text
    if skipped:
        message = f"{name}: skipped {skipped} of {read} rows that hold no text in {' + '.join(fields or ())}"
        warnings.warn(message, stacklevel=2)
    if not found and bad.of(source):
        raise SpikelmError(f"{name}: none of its documents can be read: {listed(bad.of(source))}")
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
    """The row's document, or None when its fields hold something else than text or a conversation.

    DocumentError where the chat template fails on it.
    """
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
    except Exception as error:
        raise document_error("the chat template", error) from error
    return str(text).removeprefix(tokenizer.bos_token or "")  # every context begins with bos anyway
