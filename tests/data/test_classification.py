"""Rows of text and label from every kind of source, sentences held out without leaks, and a BERT trained on them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from spikelm.data import (
    Row,
    check_labels,
    collate_classification,
    embedded_classification,
    encode_rows,
    hold_out_sentences,
    load_classification,
    python_documentation,
    train_bert,
    train_wordpiece,
)
from spikelm.errors import SpikelmError
from tests.conftest import shared_path

ROWS = [Row("a fine film", 1), Row("so dull", 0), Row('he said " no', 0)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# Reading


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'sentence\tlabel\na fine film \t1\nso dull\t0\n\nhe said " no\t0\n'),
        ("b.tsv", '\ufefflabel\ttext\r\n1\ta fine film\r\n0\tso dull\r\n0\the said " no'),
        ("c.csv", 'id,text,label\n7,a fine film,1\n8,so dull,0\n9,"he said "" no", 0\n'),
        ("d.jsonl", "\n".join(json.dumps({"text": text, "labels": label}) for text, label in ROWS)),
        ("E.JSON", "\n".join(json.dumps({"sentence": text, "label": str(label)}) for text, label in ROWS)),
    ],
)
def test_files_are_read(tmp_path: Path, name: str, text: str) -> None:
    path = written(tmp_path / name, text)
    assert load_classification(path) == ROWS
    assert load_classification(str(path), max_rows=2) == ROWS[:2]


def test_sources_are_joined_in_turn_and_a_path_with_a_plus_is_one(tmp_path: Path) -> None:
    first = written(tmp_path / "a+b.tsv", "text\tlabel\nx\t0\ny\t1\nz\t2\n")
    second = written(tmp_path / "c.csv", "text,label\nv,3\n")
    assert [row.text for row in load_classification(first)] == ["x", "y", "z"]
    first = first.rename(tmp_path / "ab.tsv")
    assert [row.text for row in load_classification(f"{first} + {second}")] == ["x", "v", "y", "z"]
    joined = load_classification(f"{second}+embedded", max_rows=3)
    assert joined == [Row("v", 3), *embedded_classification()[0][:2]]


def test_fields_may_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "review,text,stars,label\ngood,other,4,0\n")
    assert load_classification(path) == [Row("other", 0)]
    assert load_classification(path, text_field="review", label_field="stars") == [Row("good", 4)]
    with pytest.raises(SpikelmError, match="no field 'body'; its fields: review, text, stars, label; .* text_field"):
        load_classification(path, text_field="body")


def test_empty_texts_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "text\tlabel\n \t1\nx\t0\n\t0\n")
    with pytest.warns(UserWarning, match="a.tsv: skipped 2 of 3 rows whose text is empty"):
        assert load_classification(path) == [Row("x", 0)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tclass\nx\t1\n", "no field label or labels; its fields: sentence, class;.*label_field"),
        ("a.csv", "body,label\nx,1\n", "no field text or sentence; its fields: body, label;.*text_field"),
        ("a.tsv", "text\tlabel\nx\tgood\n", "line 2: label is 'good'; an integer, or its digits"),
        ("a.tsv", "text\tlabel\nx\t1.0\n", "line 2: label is '1.0'"),
        ("a.tsv", "text\tlabel\nx\t1\ny\t\n", "line 3: label is ''"),
        ("a.tsv", "text\tlabel\nx\ty\t1\n", "line 2 has 3 columns; its first line has 2: text, label"),
        ("a.csv", 'text,label\n"x\ny",1\nz\n', "line 4 has 1 columns"),
        ("a.jsonl", '{"text": "x", "label": true}', "line 1: label is True"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "line 1: label is 0.5"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}', "line 2: label is None"),
        ("a.jsonl", '{"text": ["x"], "label": 1}', "line 1: text is a list; text is accepted"),
        ("a.jsonl", '{"text": "x", "label": 1}\nno', "line 2 is not JSON"),
        ("a.jsonl", "\n", "is empty"),
        ("a.tsv", "", "is empty: it holds no rows with text"),
        ("a.csv", "text,label\n", "is empty: it holds no rows with text"),
        ("a.csv", "text,label\n" + "x" * 200_000 + ",1\n", "cannot be read as .csv"),
        ("a.txt", "x", "suffix '.txt'; accepted: a path ending in .tsv, .csv, .jsonl, .json, hub:"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(SpikelmError, match=f"{name}.*{message}"):
        load_classification(path)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match="no such file: .*none.tsv; accepted: a path"):
        load_classification(tmp_path / "none.tsv")
    with pytest.raises(SpikelmError, match="the data source is empty; accepted: a path"):
        load_classification("embedded+")
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\t1\n")
    with pytest.raises(SpikelmError, match="a.tsv is not UTF-8 text"):
        load_classification(tmp_path / "a.tsv")
    for max_rows in (0, True, 2.0):
        with pytest.raises(SpikelmError, match="max_rows must be an integer >= 1, or None"):
            load_classification("embedded", max_rows=max_rows)  # type: ignore[arg-type]


def test_hub_and_glue_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **named: Any) -> list[dict[str, Any]]:
        asked.append((*arguments, named["split"]))
        return [{"sentence": "x ", "label": 1, "idx": 0}, {"sentence": "y", "label": -1, "idx": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [Row("x", 1), Row("y", -1)]
    assert load_classification("glue:sst2", split="validation") == rows
    assert load_classification("hub:owner/name:config:test") == rows
    assert load_classification("hub:owner/name") == rows
    assert asked == [
        ("nyu-mll/glue", "sst2", "validation"),
        ("owner/name", "config", "test"),
        ("owner/name", None, "train"),
    ]
    with pytest.raises(SpikelmError, match="glue:sst2 has no field 'premise'; its fields: sentence, label, idx"):
        load_classification("glue:sst2", text_field="premise")


def test_labels_are_checked() -> None:
    check_labels(ROWS, 2)
    with pytest.raises(SpikelmError, match=r"row 1 \('a fine film'\) has the label 1; 0 to 0 are accepted"):
        check_labels(ROWS, 1)
    with pytest.raises(SpikelmError, match="has the label -1; 0 to 2 are accepted"):
        check_labels([Row("x", -1)], 3)


# Holding out


def contains(sentence: Sequence[str], part: Sequence[str]) -> bool:
    return any(sentence[start : start + len(part)] == part for start in range(len(sentence) - len(part) + 1))


def brute_force(rows: list[Row], held_out: list[Row]) -> list[Row]:
    """The training rows by the definition: contained in a whole sentence that is not held out."""
    tokens = [row.text.split() for row in rows]
    sentences = [
        mine for mine in tokens if not any(len(other) > len(mine) and contains(other, mine) for other in tokens)
    ]
    drawn = [row.text.split() for row in held_out]
    assert all(mine in sentences for mine in drawn)
    remaining = [mine for mine in sentences if mine not in drawn]
    return [row for row, mine in zip(rows, tokens, strict=True) if any(contains(other, mine) for other in remaining)]


@given(
    texts=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=25),
    labels=st.randoms(use_true_random=False),
    seed=st.integers(0, 9),
)
def test_no_phrase_of_a_held_out_sentence_alone_is_trained_on(
    texts: list[str], labels: random.Random, seed: int
) -> None:
    rows = [Row(text, labels.randrange(8) // 7) for text in texts]
    try:
        train, held_out = hold_out_sentences(rows, 2, seed)
    except SpikelmError as error:
        assert "one more sentence than is held out is needed" in str(error)
        return
    assert len({row.text for row in held_out}) == 2 and train
    assert train == brute_force(rows, held_out)
    for drawn in held_out:
        assert {row.label for row in rows if row.text == drawn.text} == {drawn.label}
    assert (train, held_out) == hold_out_sentences(rows, 2, seed)


def test_phrases_sentences_and_repeats() -> None:
    rows = [
        Row("the film", 0),
        Row("a  fine film", 1),  # another number of blanks is the same sentence
        Row("fine film", 1),
        Row("film", 0),
        Row("a fine film", 1),
        Row("the film is dull", 0),
        Row("no", 0),
        Row("no", 1),  # nobody could be right about it
    ]
    parts = {held_out[0].text: train for seed in range(20) for train, held_out in [hold_out_sentences(rows, 1, seed)]}
    assert set(parts) == {"a  fine film", "the film is dull"}
    assert parts["a  fine film"] == [rows[0], rows[3], *rows[5:]]
    assert parts["the film is dull"] == [*rows[1:5], *rows[6:]], "film is in a training sentence too"


def test_rows_that_are_no_phrases_are_sentences() -> None:
    rows = [Row(f"row {number} of many", number % 2) for number in range(100)]
    train, held_out = hold_out_sentences(rows, 30, seed=3)
    assert sorted([*train, *held_out]) == sorted(rows) and len(held_out) == 30
    assert train == [row for row in rows if row not in held_out]
    assert held_out != hold_out_sentences(rows, 30, seed=4)[1]


def test_counts_that_cannot_be_held_out() -> None:
    with pytest.raises(SpikelmError, match="count is 3; the 3 rows have 3 whole sentences, 3 of them without contra"):
        hold_out_sentences(ROWS, 3, 0)
    contradicting = [Row("x", 0), Row("x", 1), Row("y", 0)]
    assert hold_out_sentences(contradicting, 1, 0)[1] == [Row("y", 0)]
    with pytest.raises(SpikelmError, match="count is 2; the 3 rows have 2 whole sentences, 1 of them without contra"):
        hold_out_sentences(contradicting, 2, 0)
    for count in (0, -1, 1.5, True):
        with pytest.raises(SpikelmError, match="count must be an integer >= 1"):
            hold_out_sentences(ROWS, count, 0)  # type: ignore[arg-type]
    with pytest.raises(SpikelmError, match="the 0 rows have 0 whole sentences"):
        hold_out_sentences([], 1, 0)
    with pytest.raises(SpikelmError, match="row 2 has no tokens"):
        hold_out_sentences([Row("x", 0), Row(" ", 0)], 1, 0)


def test_sst2_sentences() -> None:
    """67,349 rows are phrases of 6,885 sentences; the phrases of 872 of them are gone from the training part."""
    source = f"{shared_path('data/sst2/train.tsv')}+{shared_path('data/sst2/dev.tsv')}"
    rows = load_classification(source)
    assert len(rows) == 67_349
    check_labels(rows, 2)
    with pytest.raises(SpikelmError, match="the 67349 rows have 6885 whole sentences"):
        hold_out_sentences(rows, 6885, 0)
    train, held_out = hold_out_sentences(rows, 872, seed=0)
    assert len(held_out) == 872 and 58_000 < len(train) < 61_000
    kept = {" ".join(row.text.split()) for row in train}
    # Strings of a sample of the dropped and of the kept, padded with blanks, by brute force.
    drawn = [f" {' '.join(row.text.split())} " for row in held_out]
    sentences = [f" {text} " for text in kept if len(text) > 15]
    for text in random.Random(0).sample(sorted(kept), 100):
        assert not any(f" {text} " in sentence for sentence in drawn) or any(
            f" {text} " in sentence and sentence != f" {text} " for sentence in sentences
        )
    dropped = [row for row in rows if " ".join(row.text.split()) not in kept]
    for row in random.Random(0).sample(dropped, 100):
        text = f" {' '.join(row.text.split())} "
        assert any(text in sentence for sentence in drawn)
        assert not any(text in sentence for sentence in sentences)


# What every Python carries


def test_embedded_classification() -> None:
    rows, names = embedded_classification()
    assert names == ("code", "interface", "network", "numbers")
    check_labels(rows, 4)
    counts = [sum(row.label == label for row in rows) for label in range(4)]
    assert len(rows) > 6000 and min(counts) > 600 and max(counts) < 0.5 * len(rows)
    assert len({row.text for row in rows}) == len(rows)
    assert all(row.text.isascii() and row.text == " ".join(row.text.split()) for row in rows)
    assert list(rows) == load_classification("embedded")
    assert embedded_classification.__wrapped__() == (rows, names)
    everything = " ".join(python_documentation().split())
    assert all(row.text in everything for row in rows[::50])


# Tokens


def test_wordpiece_is_bert_lower_case_and_comes_back(tmp_path: Path) -> None:
    texts = [row.text for row in embedded_classification()[0][:500]]
    tokenizer = train_wordpiece(texts, 400, model_max_length=32)
    assert isinstance(tokenizer, BertTokenizer) and tokenizer.is_fast and len(tokenizer) == 400
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = tokenizer("Returns THE value")["input_ids"]
    assert ids == tokenizer("returns the value")["input_ids"]
    assert (ids[0], ids[-1], tokenizer.pad_token_id, tokenizer.mask_token_id) == (2, 3, 0, 4)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "returns the value"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab() == train_wordpiece(texts, 400).get_vocab()
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"] and loaded.model_max_length == 32
    assert isinstance(loaded, BertTokenizer) and loaded("\u4e16")["input_ids"] == [2, 1, 3]
    with pytest.raises(SpikelmError, match="vocab_size is 20; the special tokens and the characters"):
        train_wordpiece(texts, 20)


def test_rows_are_encoded_and_padded() -> None:
    tokenizer = train_wordpiece([row.text for row in ROWS], 60)
    encoded = encode_rows([*ROWS, Row("film " * 30, 1)], tokenizer, 8)
    assert [row["labels"] for row in encoded] == [1, 0, 0, 1]
    assert len(encoded[3]["input_ids"]) == 8 and encoded[3]["input_ids"][-1] == tokenizer.sep_token_id
    assert set(encoded[0]) == {"input_ids", "attention_mask", "labels"}
    batch = collate_classification(encoded, pad_token_id=9)
    assert batch["labels"].tolist() == [1, 0, 0, 1]
    for number, row in enumerate(encoded):
        length = len(row["input_ids"])
        assert batch["input_ids"][number].tolist() == row["input_ids"] + [9] * (8 - length)
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (8 - length)
    assert all(value.dtype == torch.long for value in batch.values())
    assert encode_rows([], tokenizer, 8) == []
    with pytest.raises(SpikelmError, match="max_length is 2; a text and its special tokens need at least 3"):
        encode_rows(ROWS, tokenizer, 2)


# A BERT


@pytest.fixture(scope="module")
def parity() -> tuple[list[Row], list[Row]]:
    """Rows whose label is whether they hold the word "good"."""
    words = "the film was long and short but never green".split()
    generator = random.Random(0)
    rows = []
    for number in range(400):
        chosen = generator.choices(words, k=generator.randrange(2, 9))
        chosen.insert(generator.randrange(len(chosen)), ("bad", "good")[number % 2])
        rows.append(Row(" ".join(chosen), number % 2))
    return rows[:300], rows[300:]


def test_bert_learns_and_is_found_whole(tmp_path: Path, parity: tuple[list[Row], list[Row]]) -> None:
    state = torch.random.get_rng_state()
    path = train_bert(
        tmp_path / "deep" / "teacher", *parity, label_names=("no", "yes"), vocab_size=80, steps=105, batch_size=32,
        learning_rate=1e-2, max_position_embeddings=16, **SMALL,
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [entry.name for entry in path.parent.iterdir()] == ["teacher"]
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(10, 101, 10), 105]
    assert all({"loss", "learning_rate", "wall_s"} <= set(line) for line in log)
    assert log[0]["loss"] > 0.5 > log[-1]["loss"] and log[-1]["held_out_accuracy"] > 0.9
    assert max(line["learning_rate"] for line in log) == pytest.approx(1e-2, rel=0.1)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.architectures == [
        "BertForSequenceClassification"
    ]
    assert tokenizer.model_max_length == 16
    batch = collate_classification(encode_rows(parity[1], tokenizer, 16))
    labels = batch.pop("labels")
    with torch.no_grad():
        right = (model.eval()(**batch).logits.argmax(-1) == labels).float().mean().item()
    assert right == pytest.approx(log[-1]["held_out_accuracy"], abs=0.011)
    with pytest.raises(SpikelmError, match="exists already; give train_bert a directory"):
        train_bert(path, parity[0], steps=1)


def test_bert_is_the_same_for_the_same_seed(tmp_path: Path, parity: tuple[list[Row], list[Row]]) -> None:
    weights = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        path = train_bert(tmp_path / name, parity[0], vocab_size=80, steps=3, seed=seed, **SMALL)
        weights.append(AutoModelForSequenceClassification.from_pretrained(path).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_and_rows(tmp_path: Path, steps: int) -> None:
    path = train_bert(tmp_path / "teacher", ROWS, ROWS, vocab_size=80, steps=steps, dropout=0.0, **SMALL)
    (line,) = (path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == steps and "held_out_accuracy" in json.loads(line)


def test_an_interrupted_training_leaves_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_bert(tmp_path / "teacher", ROWS, vocab_size=80, steps=2, **SMALL)
    assert not (tmp_path / "teacher").exists()
    train_bert(tmp_path / "teacher", ROWS, vocab_size=80, steps=2, **SMALL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 3}, "train_bert takes the shape hidden_size, .*; got hidden"),
        ({"hidden_size": 30}, "hidden_size is 30; a multiple of num_attention_heads, 4"),
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be an integer >= 1; got 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0; got 0.0"),
        ({"label_names": ["only"]}, r"row 1 \('a fine film'\) has the label 1; 0 to 0"),
        ({"rows": []}, "at least one row; got none"),
        ({"held_out": [Row("x", -1)]}, "has the label -1"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        train_bert(tmp_path / "teacher", **{"rows": ROWS, **arguments})
    assert not list(tmp_path.iterdir())
