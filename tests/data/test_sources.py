"""Reading: blocks join to the file, rows give their text, what cannot be read is said in one line."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spikelm.data import sources
from spikelm.data.sources import Reading, read_pieces, source_names, text_blocks
from spikelm.errors import SpikelmError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


def texts_of(
    source: str | Path, tokenizer: PreTrainedTokenizerFast, text_field: str | None = None, hub_config: str | None = None
) -> list[str]:
    reading = Reading(tokenizer, text_field, "train", hub_config, streaming=False)
    return [piece.text for piece in read_pieces(source_names(source), reading)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@given(text=TEXTS, block=st.integers(1, 12))
def test_file_blocks_join_to_the_file(text: str, block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(("x" + text).encode())  # a letter first: neither blank nor a byte-order mark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        blocks = list(sources._file_blocks(str(path)))
    assert "".join(blocks) == "x" + text
    assert all(blocks)


@given(text=TEXTS, block=st.integers(1, 12))
def test_text_blocks_join_to_the_text(text: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        blocks = list(text_blocks(text))
    assert "".join(blocks) == text
    assert all(0 < len(part) <= block for part in blocks)


def test_file_blocks_are_cut_at_newlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one line\n" * 40)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    blocks = list(sources._file_blocks(str(path)))
    assert len(blocks) > 5
    assert all(block.endswith("\n") for block in blocks)
    assert "".join(blocks) == "one line\n" * 40  # the byte-order mark is not text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one", "content": "two"}, "one"),
        ({"id": 3, "content": "two"}, "two"),
        ({"story": "three"}, "three"),
        ({"prompt": "Why?", "response": "So."}, "user: Why?\nassistant: So."),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "user: Add\n\n1 1\nassistant: 2"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "user: a\nassistant: b"),
        ({"messages": [{"role": "user", "content": "a\u2028b"}]}, "user: a\u2028b"),
        ({"text": [{"role": "user", "content": "a"}], "prompt": "x"}, "user: a"),
    ],
)
def test_known_fields(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any, expected: str) -> None:
    assert texts_of(write_rows(tmp_path / "a.jsonl", [row]), tokenizer) == [expected]


def test_text_field_is_used_and_must_exist(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one", "title": "two"}])
    assert texts_of(path, tokenizer, text_field="title") == ["two"]
    with pytest.raises(SpikelmError, match="no field 'titel'; its fields: text, title"):
        texts_of(path, tokenizer, text_field="titel")


def test_chat_template_is_applied_without_its_own_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        [
            {"prompt": "Why?", "response": "So."},
            {"prompt": "refuse", "response": "this"},
        ],
    )
    templated = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    templated.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    with pytest.warns(UserWarning, match="skipped 1 of 2 rows"):
        assert texts_of(path, templated) == ["[user]Why?[assistant]So."]


def test_rows_without_text_are_counted_and_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": 3}, {"other": "b"}, {"text": [1]}, {"text": ""}, {"text": "c"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.warns(UserWarning, match="skipped 4 of 7 rows that hold no text in text"):
        assert texts_of(path, tokenizer) == ["a", "c"]


def test_sources_are_read_in_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = write_rows(tmp_path / "first.jsonl", [{"text": text} for text in "abcd"])
    second = write_rows(tmp_path / "second.json", [{"story": text} for text in "xy"])
    assert texts_of(f"{first}+{second}", tokenizer) == ["a", "x", "b", "y", "c", "d"]


def test_plus_in_a_file_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "c++.txt"
    path.write_text("text")
    assert texts_of(path, tokenizer) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such text: .*missing.txt; accepted: a path ending in .txt, .md, .jsonl, .json, hub:"),
        ("empty.txt", b"", "is empty"),
        ("blank.md", b" \n\n ", "is empty: it holds nothing but blanks"),
        ("nul.txt", b"abc\0def", "is binary"),
        ("latin.txt", b"caf\xe9 au lait", "is not UTF-8"),
        ("cut.txt", b"caf\xc3", "is not UTF-8"),
        ("a.csv", b"a,b", "has the suffix '.csv'; accepted: .*.jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("b.jsonl", b"[1, 2]\n", "line 1 is a list; one object a line"),
        (
            "c.jsonl",
            b'{"title": "a", "body": "b"}\n',
            "no usable field; its fields: title, body; known: text, .*text_field",
        ),
        ("d.jsonl", b'{"text": ""}\n', "none of its rows holds text"),
        ("directory.txt", "directory", "is a directory"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "directory":
        path.mkdir()
    with pytest.raises(SpikelmError, match=message) as caught:
        texts_of(path, tokenizer)
    assert "\n" not in str(caught.value)


def test_hub_rows_and_their_config_and_split(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*given: Any, **named: Any) -> list[dict[str, str]]:
        asked.append((*given, named["split"], named["streaming"]))
        return [{"text": "row"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["hub:owner/name", "hub:owner/name:small", "hub:owner/name::code", "hub:owner/name:small:code"]
    for name in names:
        assert texts_of(name, tokenizer, hub_config="full") == ["row"]
    assert asked == [
        ("owner/name", "full", "train", False),
        ("owner/name", "small", "train", False),
        ("owner/name", "full", "code", False),
        ("owner/name", "small", "code", False),
    ]
    with pytest.raises(SpikelmError, match="accepted: hub:owner/name"):
        texts_of("hub:owner/name:a:b:c", tokenizer)


def test_unreachable_hub_is_one_line(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*given: Any, **named: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SpikelmError, match=re.escape("hub:owner/name cannot be read: no route") + "$"):
        texts_of("hub:owner/name", tokenizer)
