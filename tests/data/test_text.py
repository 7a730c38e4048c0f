"""Packing: the contexts are the token stream, nothing lost and nothing twice; the held-out part; the sizes refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spikelm.data import bytes_per_token, check_tokenizer, load_contexts, load_teacher, text, text_contexts
from spikelm.data.sources import Piece
from spikelm.errors import SpikelmError

WORDS = st.text("ab cé\n", min_size=1, max_size=40)


def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


@given(
    documents=st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=5),
    context_length=st.integers(2, 9),
    block=st.integers(1, 80),
    limit=st.none() | st.integers(1, 6),
    special=st.booleans(),
)
def test_contexts_are_the_token_stream(
    documents: list[list[str]],
    context_length: int,
    block: int,
    limit: int | None,
    special: bool,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chosen = tokenizer if special else without_bos(tokenizer)
    stream: list[int] = []
    for number, parts in enumerate(documents):
        stream += [1] if number and special else []
        stream += [token for part in parts for token in tokenizer(part)["input_ids"]]
    body = context_length - special
    count = min(len(stream) // body, math.inf if limit is None else limit)
    pieces = [Piece(0, number, part) for number, parts in enumerate(documents) for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block)
        rows = [row for array in text.pack(pieces, chosen, context_length, limit) for row in array.tolist()]
    assert all(len(row) == context_length for row in rows)
    assert all(row[0] == 0 for row in rows if special)
    assert [token for row in rows for token in row[int(special) :]] == stream[: int(count) * body]


def test_text_file_held_out_is_the_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, story: str) -> None:
    path = tmp_path / "story.txt"
    path.write_text(story)
    train, held_out = load_contexts(path, tokenizer, 32, held_out=0.1)
    count = len(tokenizer(story)["input_ids"]) // 31
    assert len(train) + len(held_out) == count
    assert len(held_out) == round(0.1 * count)
    rows = [*train["input_ids"], *held_out["input_ids"]]
    assert all(isinstance(token, int) for token in rows[0])
    decoded = tokenizer.decode([token for row in rows for token in row[1:]])
    assert decoded == story[: len(decoded)]
    assert len(story) - len(decoded) < 31 * 8
    again, _ = text_contexts(story, tokenizer, 32, held_out=0.1)
    assert again["input_ids"] == train["input_ids"]


def test_documents_are_joined_by_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "cat " * number}) for number in range(1, 30)))
    train, held_out = load_contexts(path, tokenizer, 16)
    tokens = [token for row in [*train["input_ids"], *held_out["input_ids"]] for token in row[1:]]
    documents = tokenizer.decode(tokens).split("</s>")
    assert documents[:-1] == ["cat " * number for number in range(1, len(documents))]
    assert len(documents) > 20


def test_max_tokens_counts_both_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, story: str) -> None:
    path = tmp_path / "story.txt"
    path.write_text(story)
    train, held_out = load_contexts(path, tokenizer, 32, max_tokens=32 * 40 + 31)
    assert (len(train), len(held_out)) == (38, 2)


@pytest.mark.parametrize("max_tokens", [None, 32 * 400])
def test_streaming_is_the_same_stream_and_can_be_read_twice(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    story: str,
    max_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "story.txt"
    path.write_text(story)
    whole_train, whole_held_out = load_contexts(path, tokenizer, 32, max_tokens=max_tokens)
    whole = [*whole_train["input_ids"], *whole_held_out["input_ids"]]
    train, held_out = load_contexts(path, tokenizer, 32, streaming=True, max_tokens=max_tokens)
    assert len(held_out) == (256 if max_tokens is None else 20)
    for _ in range(2):
        assert [*held_out["input_ids"], *(row["input_ids"] for row in train)] == whole


@pytest.mark.parametrize("streaming", [False, True])
def test_too_short(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The cat slept.")
    with pytest.raises(SpikelmError, match="short.txt is too short: it fills 0 contexts of 64 tokens, .* are needed"):
        load_contexts(path, tokenizer, 64, streaming=streaming)


def test_two_contexts_are_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text("zq" * 7)  # bytes that were never merged: 14 tokens
    train, held_out = load_contexts(path, tokenizer, 8)
    assert (len(train), len(held_out)) == (1, 1)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"context_length": 1}, "context_length is 1"),
        ({"held_out": 0.0}, "held_out is 0.0; a fraction between 0 and 1"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"max_tokens": 15}, r"max_tokens is 15; at least two contexts \(16 tokens\)"),
    ],
)
def test_numbers_out_of_range(tokenizer: PreTrainedTokenizerFast, named: dict[str, float], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        load_contexts("embedded", tokenizer, **{"context_length": 8, **named})  # type: ignore[arg-type]


def test_bytes_per_token_counts_characters_cut_in_two(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "accents.txt"
    path.write_text("é" * 1000, encoding="utf-8")  # two tokens each; contexts of 7 text tokens cut every other one
    train, _ = load_contexts(path, tokenizer, 8, held_out=0.5)
    assert len(train) % 2 == 1
    # The last character of this part is cut, too: it decodes to the replacement sign, of 3 bytes instead of 1.
    assert bytes_per_token(train, tokenizer) == pytest.approx(1 + 2 / (7 * len(train)), abs=1e-12)


def test_bytes_per_token_with_and_without_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, story: str) -> None:
    for chosen in (tokenizer, without_bos(tokenizer)):
        train, _ = text_contexts(story, chosen, 32)
        average = len(story) / len(tokenizer(story)["input_ids"])
        assert bytes_per_token(train, chosen) == pytest.approx(average, rel=0.02)


def test_check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 300)
    with pytest.raises(SpikelmError, match="300 tokens and the model a vocabulary of 299"):
        check_tokenizer(tokenizer, 299)


def test_progress_only_for_large_files(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    story: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "story.txt"
    path.write_text(story)
    load_contexts(path, tokenizer, 32)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(text, "PROGRESS_FROM_BYTES", 1000)
    load_contexts(path, tokenizer, 32)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tokenising: 100%" in shown.err


def test_real_teacher_on_the_held_out_part(teacher_path: Path, tinystories_path: Path) -> None:
    model, tokenizer = load_teacher(teacher_path)
    train, held_out = load_contexts(tinystories_path, tokenizer, 128)
    assert len(held_out) == pytest.approx(0.05 * (len(train) + len(held_out)), abs=1)
    input_ids = torch.tensor(held_out[:40]["input_ids"])
    assert (input_ids[:, 0] == 1).all()
    with torch.no_grad():
        cross_entropy = model(input_ids=input_ids, labels=input_ids).loss.item()
    assert cross_entropy == pytest.approx(1.83, abs=0.1)
    # 944 kB in 477,172 tokens; the text is the file's, so its bytes are, too.
    assert bytes_per_token(train, AutoTokenizer.from_pretrained(teacher_path)) == pytest.approx(1.98, abs=0.02)
