"""Documents that cannot be read: what is left is what a file without them gives, and each is named."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spikelm.data import load_contexts, sources, text, text_contexts
from spikelm.data.bad_documents import BadDocuments
from spikelm.data.sources import Reading, line_rows, read_pieces
from spikelm.data.text import pack
from spikelm.errors import SpikelmError

BAD = {
    b'{"text": "cut': "not JSON (",  # the words depend on the end of the line
    b"no JSON": "not JSON (Expecting value)",
    b'{"text": "caf\xe9"}': "not UTF-8 text (invalid continuation byte)",
    b'{"text": "a"}\0\0\0': "binary (it holds NUL bytes)",
    b"\xff\xfe{\0": "binary (it holds NUL bytes)",
    b"[1, 2]": "a list",
    b'{"text": ' + b"[" * 100_000: "not JSON that can be parsed (maximum recursion depth exceeded",
    b'{"text": "half a pair: \\ud800"}': "the tokenizer fails on it (TypeError: TextEncodeInput must be",
}
GOOD = st.text("ab cé\u2028\n", min_size=1, max_size=40).map(
    lambda words: json.dumps({"text": words}, ensure_ascii=False).encode()
)


def contexts_of(
    path: Path, tokenizer: PreTrainedTokenizerFast, limit: int
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Every context of 4 tokens of a file, and what was left out."""
    bad = BadDocuments([str(path)], limit)
    reading = Reading(tokenizer, None, "train", None, streaming=False)
    blocks = pack(read_pieces(bad.names, reading, bad), tokenizer, 4, bad=bad)  # type: ignore[arg-type]
    return [row for block in blocks for row in block.tolist()], bad.found


@given(
    lines=st.lists(GOOD | st.sampled_from([*BAD, b"", b"  "]), max_size=12).filter(lambda lines: set(lines) - set(BAD)),
    first=GOOD,
    end=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    block=st.integers(1, 200),
)
def test_contexts_are_those_of_the_file_without_the_bad_lines(
    lines: list[bytes],
    first: bytes,
    end: bytes,
    mark: bytes,
    block: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("lines")
    lines.append(first)  # one document at least
    (directory / "all.jsonl").write_bytes(mark + end.join(lines))
    (directory / "good.jsonl").write_bytes(mark + end.join(line for line in lines if line not in BAD))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block)  # how many documents are tokenised at once
        found, left_out = contexts_of(directory / "all.jsonl", tokenizer, limit=20)
        expected, nothing = contexts_of(directory / "good.jsonl", tokenizer, limit=0)
    assert found == expected
    assert nothing == []
    bad = {number: BAD[line] for number, line in enumerate(lines, 1) if line in BAD}
    assert {document["line"] for document in left_out} == bad.keys()
    for document in left_out:
        assert document["source"] == str(directory / "all.jsonl")
        assert document["reason"].startswith(bad[document["line"]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """200 documents, of which lines 3, 50, 51 and 120 are bad."""
    lines = [json.dumps({"text": f"Story {number}: the cat slept."}).encode() for number in range(1, 201)]
    for number, bad in zip((3, 50, 51, 120), (b"{", b"\xff", b"7", b'{"text": "\\udfff"}'), strict=True):
        lines[number - 1] = bad
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def rows_of(*parts: Any) -> list[list[int]]:
    return [row["input_ids"] for part in parts for row in part]


def good_rows(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The contexts of 16 tokens of the file without its bad lines."""
    lines = path.read_bytes().split(b"\n")
    good = path.with_name("good.jsonl")
    good.write_bytes(b"\n".join(line for number, line in enumerate(lines, 1) if number not in (3, 50, 51, 120)))
    return rows_of(*load_contexts(good, tokenizer, 16, max_bad_documents=0))


def test_they_are_counted_listed_and_handed_out(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bad: list[dict[str, Any]] = []
    with pytest.warns(UserWarning) as caught:
        contexts = load_contexts(path, tokenizer, 16, max_bad_documents=4, bad_documents=bad)
    assert [str(warning.message) for warning in caught] == [
        f"skipped 4 documents that cannot be read: {path} line 3: not JSON (Expecting property name enclosed in double "
        f"quotes); {path} line 50: not UTF-8 text (invalid start byte); {path} line 51: a int; and 1 more"
    ]
    assert rows_of(*contexts) == good_rows(path, tokenizer)
    assert [(document["source"], document["line"]) for document in bad] == [(str(path), n) for n in (3, 50, 51, 120)]
    assert bad[3]["reason"].startswith("the tokenizer fails on it (TypeError: ")
    assert json.loads(json.dumps(bad)) == bad


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (3, "more than max_bad_documents=3 documents cannot be read: .*a.jsonl line 3: .* line 51: a int; and 1 more$"),
        (0, "a.jsonl line 3 is not JSON .Expecting property name .*; one object a line is accepted$"),
        (-1, "max_bad_documents is -1; a whole number >= 0 is accepted"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped a document")
def test_more_than_the_limit(
    path: Path, tokenizer: PreTrainedTokenizerFast, limit: int, message: str, streaming: bool
) -> None:
    with pytest.raises(SpikelmError, match=message) as caught:
        load_contexts(path, tokenizer, 16, max_bad_documents=limit, streaming=streaming)
    assert "\n" not in str(caught.value)


def test_a_stream_leaves_out_the_same_on_every_pass(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 500)  # so that the first contexts are not read with all others
    bad: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match="skipped a document that cannot be read: .* line 3: not JSON") as caught:
        train, held_out = load_contexts(
            path, tokenizer, 16, streaming=True, max_tokens=16 * 10_000, held_out=0.001, bad_documents=bad
        )
    assert len(caught) == 1
    assert bad == []
    whole = good_rows(path, tokenizer)
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            assert rows_of(held_out, train) == whole
        lines = [int(str(warning.message).split(" line ")[1].split(":")[0]) for warning in caught]
        assert lines == [3, 50, 51, 120]


def test_a_stream_ends_beyond_the_limit(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 500)
    named = {"streaming": True, "max_tokens": 16 * 10_000, "held_out": 0.001, "max_bad_documents": 3}
    with pytest.warns(UserWarning, match="line 3: not JSON"):
        train, _ = load_contexts(path, tokenizer, 16, **named)  # type: ignore[arg-type]
    with pytest.warns(UserWarning), pytest.raises(SpikelmError, match="more than max_bad_documents=3"):
        list(train)


def failing(tokenizer: PreTrainedTokenizerFast, error: BaseException) -> PreTrainedTokenizerFast:
    """The tokenizer, that raises `error` for texts that hold "poison"."""

    class Failing(PreTrainedTokenizerFast):
        """As it says."""

        def __call__(self, texts: Any, **options: Any) -> Any:  # type: ignore[override]
            """Token ids, or the error."""
            if any("poison" in each for each in texts):
                raise error
            return super().__call__(texts, **options)

    return Failing(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")


class PanicException(BaseException):  # noqa: N818
    """As pyo3 names a panic of Rust."""


@pytest.mark.parametrize(
    "error", [PanicException("no entry found\nfor key " + "x" * 1000), OverflowError("out of range")]
)
def test_what_the_tokenizer_fails_on_alone_is_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, error: BaseException
) -> None:
    path = tmp_path / "a.jsonl"
    words = ["the cat slept " * 9, "poison", "two birds", "poison again", *["and then"] * 20]
    path.write_text("\n".join(json.dumps({"text": each}) for each in words))
    bad: list[dict[str, Any]] = []
    with pytest.warns(
        UserWarning, match="skipped 2 documents that cannot be read: .* line 2: the tokenizer fails on it"
    ):
        contexts = load_contexts(path, failing(tokenizer, error), 8, bad_documents=bad)
    path.write_text("\n".join(json.dumps({"text": each}) for each in words if "poison" not in each))
    assert rows_of(*contexts) == rows_of(*load_contexts(path, tokenizer, 8))
    assert [document["line"] for document in bad] == [2, 4]
    assert all(type(error).__name__ in document["reason"] and len(document["reason"]) < 160 for document in bad)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no room"), SystemExit(3)])
def test_what_is_no_fault_of_a_document_is_raised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, error: BaseException
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "poison"}\n')
    with pytest.raises(type(error)):
        load_contexts(path, failing(tokenizer, error), 8)


def test_a_text_is_one_document_and_never_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some poison")
    poisoned = failing(tokenizer, PanicException("no entry"))
    with pytest.raises(SpikelmError, match=r"a.txt: the tokenizer fails on it \(PanicException: no entry\)$"):
        load_contexts(path, poisoned, 8, max_bad_documents=100)
    with pytest.raises(SpikelmError, match="^the text: the tokenizer fails on it"):
        text_contexts("some poison", poisoned, 8)


def templated(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a chat template that adds a number to the word "poison", and refuses the word "system"."""
    chosen = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    chosen.chat_template = (
        "{% for m in messages %}{% if m.content == 'poison' %}{{ m.content + 1 }}{% endif %}"
        "{% if m.content == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    return chosen


def test_what_the_chat_template_fails_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    asked = ["Why?", "poison", "system", "How?"]
    path.write_text("\n".join(json.dumps({"prompt": each, "response": "So."}) for each in asked))
    bad = BadDocuments([str(path)], limit=1)
    reading = Reading(templated(tokenizer), None, "train", None, streaming=False)
    with pytest.warns(UserWarning, match="skipped 1 of 4 rows that hold no text"):  # which is what a refusal is
        assert [piece.text for piece in read_pieces([str(path)], reading, bad)] == ["Why?So.", "How?So."]
    assert [(document["line"], document["reason"]) for document in bad.found] == [
        (2, 'the chat template fails on it (TypeError: can only concatenate str (not "int") to str)')
    ]
    with pytest.raises(SpikelmError, match="a.jsonl line 2: the chat template fails on it"):
        list(read_pieces([str(path)], reading))


def test_rows_of_the_hub_are_named_by_their_number(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "the cat slept " * 9}, {"text": "\ud800"}, {"text": "two birds"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: rows)
    bad: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match="skipped 1 document that cannot be read: hub:owner/name row 2: the tokenizer"):
        load_contexts("hub:owner/name", tokenizer, 8, bad_documents=bad)
    assert [(document["source"], document["row"]) for document in bad] == [("hub:owner/name", 2)]


def test_the_limit_is_of_all_sources_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{\n" + '{"text": "the cat slept and slept"}\n' * 9)
    source = f"{tmp_path / 'a.jsonl'}+{tmp_path / 'b.jsonl'}"
    with pytest.raises(SpikelmError, match=r"more than max_bad_documents=1 .*a.jsonl line 1: .*b.jsonl line 1: "):
        load_contexts(source, tokenizer, 8, max_bad_documents=1)
    with pytest.warns(UserWarning, match="skipped 2 documents"):
        load_contexts(source, tokenizer, 8, max_bad_documents=2)


def test_a_source_of_bad_documents_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "one"},\n]')
    with pytest.raises(
        SpikelmError, match="a.json: none of its documents can be read: .*line 1: not JSON .*; .* line 2"
    ):
        load_contexts(path, tokenizer, 8)


def test_without_a_place_to_note_them_each_is_warned_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    reading = Reading(tokenizer, None, "train", None, streaming=False, max_bad_documents=3)
    with pytest.warns(UserWarning) as caught:
        pieces = list(read_pieces([str(path)], reading))
    assert len(pieces) == 197  # the tokenizer has yet to fail on line 120
    assert [str(warning.message).split(": ")[2] for warning in caught][1:] == [
        "not UTF-8 text (invalid start byte)",
        "a int",
    ]


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + b'{"n": "' + b"x" * 1000 + b'"}\n' + b"\n" + b'{"n": 4}\n' + b"y" * 64)
    bad = BadDocuments([str(path)], limit=2)
    assert list(line_rows(str(path), bad)) == [(1, {"n": 1}), (4, {"n": 4})]
    reason = "longer than 64 bytes"
    assert bad.found == [{"source": str(path), "line": line, "reason": reason} for line in (2, 5)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xe9", "line 2 is not UTF-8 text .unexpected end of data.; UTF-8 text is accepted"),
        (b'{"a": 1}\0', "line 2 is binary .it holds NUL bytes.; UTF-8 text is accepted"),
        (b"9" * 5000, "line 2 is not JSON that can be parsed .Exceeds the limit .*; one object a line is accepted"),
    ],
)
def test_lines_are_read_strictly_by_others(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    rows = line_rows(str(path))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(SpikelmError, match=message):
        next(rows)
