"""Preference pairs: what is read, what is refused and where, and what is made from plain text."""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spikelm.data import text_contexts
from spikelm.data.preferences import (
    load_preferences,
    make_preferences,
    pair_lengths,
    tokenise_pairs,
    write_preferences,
)
from spikelm.errors import SpikelmError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no such turn') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASK, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "a?"), ("assistant", "b"), ("assistant", "c"))
)


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Story {n}:", "chosen": f" the cat saw {n}", "rejected": f" birds {n} slept"} for n in range(count)
    ]


def written(path: Path, content: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    return path


def test_rows_are_split_by_prompt_and_end_with_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    twice = rows(20) + [{**row, "rejected": " another"} for row in rows(20)]
    path = written(tmp_path / "pairs.jsonl", twice)
    train, held_out = load_preferences(path, tokenizer, 64, held_out=0.25)
    assert (len(train), len(held_out)) == (30, 10)
    assert not set(train["prompt"]) & set(held_out["prompt"]), "both pairs of a prompt are on the same side"
    ended = [{**row, **{field: row[field] + "</s>" for field in ("chosen", "rejected")}} for row in twice]
    assert sorted([*train, *held_out], key=str) == sorted(ended, key=str)
    again, other = (load_preferences(path, tokenizer, 64, held_out=0.25, seed=seed)[1] for seed in (0, 1))
    assert list(again) == list(held_out) and list(other) != list(held_out)
    fragments, _ = load_preferences(path, tokenizer, 64, held_out=0.25, append_eos=False)
    assert list(fragments) == [row for row in twice if row["prompt"] in set(fragments["prompt"])]


def test_tokens_are_those_of_the_whole_text_behind_a_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "Story 1: the c", "chosen": "at saw</s>", "rejected": "ow"}
    tokens = tokenise_pairs([pair], tokenizer)[0]
    for field in ("chosen", "rejected"):
        ids = tokens["prompt_ids"] + tokens[f"{field}_ids"]
        assert ids == [tokenizer.bos_token_id, *tokenizer(pair["prompt"] + pair[field])["input_ids"]]
    # "the cat" is one token or two, so the completion begins before the letters that the prompt ends with
    assert tokenizer.decode(tokens["prompt_ids"][1:]) != pair["prompt"]
    assert tokens["chosen_ids"][-1] == tokenizer.eos_token_id
    assert pair_lengths([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}]) == [5]
    written_by_template = tokenise_pairs([{**pair, "prompt": "<s>" + pair["prompt"]}], tokenizer)[0]
    assert written_by_template == tokens


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "a?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "a?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {
            "chosen": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
            "rejected": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "c"}],
        },
    ],
)
def test_conversations_become_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any) -> None:
    other = {"chosen": [{"role": "user", "content": "z?"}, GOOD], "rejected": [{"role": "user", "content": "z?"}, BAD]}
    path = written(tmp_path / "pairs.jsonl", [row, other])

    def first(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
        parts = load_preferences(path, tokenizer, 64, held_out=0.5)
        return next(pair for part in parts for pair in part if "a?" in pair["prompt"])

    assert first(tokenizer) == {"prompt": "user: a?\nassistant:", "chosen": " b</s>", "rejected": " c</s>"}
    templated = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    templated.chat_template = TEMPLATE
    assert first(templated) == {"prompt": "<s>[user]a?;[assistant]", "chosen": "b;", "rejected": "c;"}
    refused = written(tmp_path / "refused.jsonl", [{"prompt": "refuse", "chosen": [GOOD], "rejected": [BAD]}])
    with pytest.raises(SpikelmError, match="line 1: the tokenizer's chat template refuses it: no such turn"):
        load_preferences(refused, templated, 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "better": "b", "rejected": "c"}, "no field 'chosen'; its fields: prompt, better, rejected"),
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "chosen and rejected are str and int"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "chosen and rejected are str and list"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "a text prompt is needed beside a text"),
        ({"chosen": "a", "rejected": "b"}, "a text prompt is needed beside a text; its fields: chosen, rejected"),
        ({"chosen": [], "rejected": [BAD]}, "a conversation a message"),
        ({"chosen": [{"role": "user"}], "rejected": [BAD]}, "a role and a content"),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "a role and a content"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "share no first message"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [ASK]}, "different roles: assistant, user"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any, message: str
) -> None:
    path = written(tmp_path / "pairs.jsonl", [*rows(1), row])
    with pytest.raises(SpikelmError, match=f"pairs.jsonl line 2.*{message}") as caught:
        load_preferences(path, tokenizer, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is empty|holds no pairs"),
        (rows(1), r"pairs of a single prompt \(1 in all\)"),
        (rows(1) * 3, r"pairs of a single prompt \(3 in all\)"),
    ],
)
def test_too_few_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: Any, message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        load_preferences(written(tmp_path / "pairs.jsonl", content), tokenizer, 64)


def test_sources_and_options_that_are_not_accepted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, message in (("pairs.txt", "cannot be read from"), ("pairs.jsonl", "no such preference pairs")):
        with pytest.raises(SpikelmError, match=f"{message}.*accepted: a path ending in .jsonl or .json, or hub:"):
            load_preferences(tmp_path / name, tokenizer, 64)
    path = written(tmp_path / "pairs.json", rows(4))
    with pytest.raises(SpikelmError, match="held_out is 1; a fraction"):
        load_preferences(path, tokenizer, 64, held_out=1)
    with pytest.raises(SpikelmError, match="long_pairs is 'cut'; error or drop"):
        load_preferences(path, tokenizer, 64, long_pairs="cut")  # type: ignore[arg-type]
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(SpikelmError, match="no eos token.*append_eos=False"):
        load_preferences(path, endless, 64)
    assert len(load_preferences(path, endless, 64, append_eos=False)[0]) == 3


def test_long_pairs_are_an_error_or_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = {"prompt": "Story 99:", "chosen": "x" * 200, "rejected": "y"}
    path = written(tmp_path / "pairs.jsonl", [*rows(10), long])
    length = 1 + len(tokenizer("Story 99:" + "x" * 200 + "</s>")["input_ids"])
    expected = f"1 of 11 pairs are longer than 64 tokens, up to {length}"
    with pytest.raises(SpikelmError, match=f"{expected}.*long_pairs=drop"):
        load_preferences(path, tokenizer, 64)
    with pytest.warns(UserWarning, match=expected):
        train, held_out = load_preferences(path, tokenizer, 64, long_pairs="drop")
    assert len(train) + len(held_out) == 10 and long["prompt"] not in [*train["prompt"], *held_out["prompt"]]
    assert sum(map(len, load_preferences(path, tokenizer, length))) == 11, "the limit itself is accepted"
    with pytest.raises(SpikelmError, match="11 of 11 pairs are longer than 3.*nothing is left"):
        load_preferences(path, tokenizer, 3, long_pairs="drop")


def test_hub_rows_are_read_and_named(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load_dataset(*arguments: Any, **named: Any) -> list[dict[str, str]]:
        given.append((arguments, named["split"]))
        return [*rows(4), *bad]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bad: list[Any] = []
    train, held_out = load_preferences("hub:owner/name:small:code", tokenizer, 64)
    assert (len(train), len(held_out)) == (3, 1) and given == [(("owner/name", "small"), "code")]
    bad = [{"chosen": "a"}]
    with pytest.raises(SpikelmError, match="hub:owner/name row 5 has no field 'rejected'"):
        load_preferences("hub:owner/name", tokenizer, 64)


def test_conversations_need_trl_and_texts_do_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert len(load_preferences(written(tmp_path / "a.jsonl", rows(4)), tokenizer, 64)[0]) == 3
    with pytest.raises(SpikelmError, match=r"conversations need TRL.*pip install 'spikelm\[rl\]'"):
        load_preferences(
            written(tmp_path / "b.jsonl", [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}]), tokenizer, 64
        )


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A random Llama with more embeddings than the tokenizer has tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                bos_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip


OPTIONS: dict[str, Any] = {
    "prompt_tokens": 8, "completion_tokens": 12, "temperature": 1.5, "batch_size": 4, "seed": 3
}  # fmt: skip


def test_completions_without_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for bad, message in (
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same tokens"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "adds no token"),
    ):
        with pytest.raises(SpikelmError, match=f"pair 2: .*{message}"):
            tokenise_pairs([good, bad], tokenizer)


def test_made_pairs_continue_real_text(
    tokenizer: PreTrainedTokenizerFast, story: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    contexts, _ = text_contexts(story[:4000], tokenizer, 24)
    contexts = contexts.select(range(10))
    model.train()
    before = torch.get_rng_state()
    pairs = make_preferences(model, tokenizer, contexts, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert len(pairs) >= 5
    texts = [tokenizer.decode(row["input_ids"][1:20]) for row in contexts]
    for pair in pairs:
        assert pair["prompt"] + pair["chosen"] in texts
        assert pair["rejected"].strip() and pair["rejected"] != pair["chosen"]
        assert "<s>" not in pair["rejected"] and "</s>" not in pair["rejected"]
    assert make_preferences(model, tokenizer, contexts, **OPTIONS) == pairs
    assert make_preferences(model, tokenizer, contexts, **{**OPTIONS, "seed": 4}) != pairs
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    train, held_out = load_preferences(tmp_path / "pairs.jsonl", tokenizer, 64, append_eos=False)
    assert sorted([*train, *held_out], key=str) == sorted(pairs, key=str)


def test_sampled_continuations_are_text(
    tokenizer: PreTrainedTokenizerFast, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A head that wants eos, what is no token and a byte above 127: without suppression it would sample nothing else.
    half = next(token for token in range(2, 300) if "\ufffd" in tokenizer.decode([token]))
    unwanted = torch.tensor([0, 1, half, *range(300, 320)])
    model.lm_head.weight.data.zero_()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, unwanted, 50.0))
    seen: list[torch.Tensor] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **named: seen.append(generate(*args, **named)) or seen[-1])
    rows = [{"input_ids": [0, *range(100, 123)]}] * 64
    with contextlib.suppress(SpikelmError):  # whether the texts make pairs is not the question
        make_preferences(model, tokenizer, rows, **{**OPTIONS, "batch_size": 64})
    sampled = seen[0][:, 8:]
    assert sampled.shape == (64, 12) and not torch.isin(sampled, unwanted).any()
    whole = sum("\ufffd" not in tokenizer.decode([token]) for token in range(2, 300))
    assert len(sampled.unique()) > 0.8 * whole > 50, "the rest is equally likely: no top-k of 50"


def test_contexts_without_a_pair_are_counted(
    tokenizer: PreTrainedTokenizerFast, story: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = text_contexts(story[:4000], tokenizer, 24)[0].select(range(6)).to_list()
    ended = [*plain[0]["input_ids"][:15], tokenizer.eos_token_id, *plain[0]["input_ids"][16:]]
    halves = [*plain[0]["input_ids"][:19], 2 + 0xC3, *plain[0]["input_ids"][20:]]
    halves[19] = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of a two-byte character
    with caplog.at_level(logging.WARNING):
        pairs = make_preferences(model, tokenizer, [*plain, {"input_ids": ended}, {"input_ids": halves}], **OPTIONS)
    assert len(pairs) <= 6
    assert f"{8 - len(pairs)} of 8 contexts make no pair" in caplog.text
    assert "1 continue with a special token" in caplog.text and "do not survive decoding" in caplog.text
    with pytest.raises(SpikelmError, match="none of the 1 contexts makes a pair"):
        make_preferences(model, tokenizer, [{"input_ids": ended}], **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens=1: at least 2"),
        ({"completion_tokens": 0}, "completion_tokens=0: at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: more than 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"completion_tokens": 17}, r"contexts have 24 tokens; prompt_tokens \+ completion_tokens = 8 \+ 17"),
    ],
)
def test_bad_options_of_making(
    tokenizer: PreTrainedTokenizerFast, model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpikelmError, match=message):
        make_preferences(model, tokenizer, [{"input_ids": list(range(24))}], **{**OPTIONS, **options})
