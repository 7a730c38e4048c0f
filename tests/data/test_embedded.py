"""The embedded text, the tokenizer and the small Llama trained on it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerState

from spikelm.data import (
    load_contexts,
    load_teacher,
    python_documentation,
    text_contexts,
    train_teacher,
    train_tokenizer,
)
from spikelm.distill.callbacks import StopAtStepEnd
from spikelm.errors import SpikelmError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def documentation() -> str:
    return python_documentation()


def test_documentation_is_plain_and_large(documentation: str) -> None:
    assert len(documentation) > 1_500_000
    assert documentation.isascii()
    assert 'The "assert" statement' in documentation
    assert "Text wrapping and filling." in documentation  # the docstring of textwrap
    paragraphs = documentation.removesuffix("\n\n").split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


def test_documentation_is_cut_between_paragraphs_and_repeats(documentation: str) -> None:
    # Past the topics, so that files are read a second time, in the same order.
    beginning = python_documentation.__wrapped__(600_000)
    assert 595_000 < len(beginning) <= 600_000
    assert documentation.startswith(beginning)
    with pytest.raises(SpikelmError, match="max_bytes is too small"):
        python_documentation.__wrapped__(3)


def test_embedded_source(tokenizer: PreTrainedTokenizerFast, documentation: str) -> None:
    train, held_out = load_contexts("embedded", tokenizer, 64)
    _, again = text_contexts(documentation, tokenizer, 64)
    assert len(held_out) == round(0.05 * (len(train) + len(held_out)))
    assert held_out[:]["input_ids"] == again[:]["input_ids"]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_saves_and_loads(tokenizer: PreTrainedTokenizerFast, story: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = story[:500] + "  na\u00efve \n\n\tend </s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
    assert loaded.model_max_length == 512
    assert len(loaded) == 300
    assert train_tokenizer(story, 300)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizer_too_small() -> None:
    with pytest.raises(SpikelmError, match="vocab_size is 200; .* at least 258"):
        train_tokenizer("text", 200)


def test_teacher_learns_and_is_found_whole(tmp_path: Path, story: str) -> None:
    path = train_teacher(
        tmp_path / "teacher",
        story,
        vocab_size=300,
        context_length=32,
        intermediate_size=32,
        steps=60,
        learning_rate=1e-2,
        **SMALL,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher"]
    model, tokenizer = load_teacher(path)
    assert model.config.tie_word_embeddings
    assert tokenizer.model_max_length == 32
    _, held_out = text_contexts(story, tokenizer, 32)
    input_ids = torch.tensor(held_out[:16]["input_ids"])
    with torch.no_grad():
        assert model(input_ids=input_ids, labels=input_ids).loss.item() < 3.5  # 5.7 before training
    with pytest.raises(SpikelmError, match="exists already"):
        train_teacher(path, story, steps=1)


def test_a_mamba2_teacher_learns(tmp_path: Path, story: str) -> None:
    path = train_teacher(
        tmp_path / "teacher", story, model_type="mamba2", vocab_size=300, context_length=32, steps=60,
        learning_rate=1e-2, hidden_size=32, num_hidden_layers=2, state_size=8, batch_size=8,
    )  # fmt: skip
    model, tokenizer = load_teacher(path)
    assert type(model).__name__ == "Mamba2ForCausalLM" and model.config.tie_word_embeddings
    _, held_out = text_contexts(story, tokenizer, 32)
    input_ids = torch.tensor(held_out[:16]["input_ids"])
    with torch.no_grad():
        assert model(input_ids=input_ids, labels=input_ids).loss.item() < 3.5  # 5.7 before training


def test_shapes_that_the_model_does_not_have_are_refused(tmp_path: Path, story: str) -> None:
    with pytest.raises(SpikelmError, match="model_type must be one of llama, mamba2; got 'rwkv'"):
        train_teacher(tmp_path / "a", story, model_type="rwkv", steps=1)
    with pytest.raises(SpikelmError, match="a mamba2 teacher takes hidden_size, .*; got intermediate_size"):
        train_teacher(tmp_path / "a", story, model_type="mamba2", intermediate_size=32, steps=1)
    assert not list(tmp_path.iterdir())


def test_teacher_is_the_same_for_the_same_seed(tmp_path: Path, story: str) -> None:
    text = story[:20_000]
    models = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        path = train_teacher(tmp_path / name, text, vocab_size=300, context_length=16, steps=2, seed=seed, **SMALL)
        models.append(load_teacher(path)[0].get_input_embeddings().weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_interrupted_training_goes_on(tmp_path: Path, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves a checkpoint and no teacher; the same call ends where an uninterrupted one does."""

    def interrupt_at_step_3(self: StopAtStepEnd, args: object, state: TrainerState, *rest: object, **more: object):
        self.requested = self.requested or state.global_step == 3
        original(self, args, state, *rest, **more)

    original = StopAtStepEnd.on_step_end
    text, shape = story[:20_000], {"vocab_size": 300, "context_length": 16, "steps": 6, **SMALL}
    whole = train_teacher(tmp_path / "whole", text, **shape)
    target = tmp_path / "runs" / "teacher"
    with monkeypatch.context() as patch:
        patch.setattr(StopAtStepEnd, "on_step_end", interrupt_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(target, text, **shape)
    assert not target.exists()
    target.mkdir()  # an empty directory is accepted
    train_teacher(target, text, **shape)
    weights, expected = (load_file(path / "model.safetensors") for path in (target, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [entry.name for entry in target.parent.iterdir()] == ["teacher"]


def test_the_contexts_that_a_run_holds_out_are_not_trained_on(
    tmp_path: Path, story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where max_tokens makes the run see a part of the text alone."""
    from spikelm.distill import trainer

    seen: list[set[tuple[int, ...]]] = []

    def record(student: object, teacher: object, dataset: object, *rest: object, **more: object) -> None:
        seen.append({tuple(row["input_ids"]) for row in dataset})  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", record)
    for max_tokens in (None, 2000):
        with pytest.raises(KeyboardInterrupt):
            train_teacher(
                tmp_path / "t", story, vocab_size=300, context_length=16, max_tokens=max_tokens, held_out=0.2, steps=1
            )
        tokenizer = train_tokenizer(story, 300, model_max_length=16)
        train, held_out = text_contexts(story, tokenizer, 16, 0.2, max_tokens)
        assert {tuple(row["input_ids"]) for row in train} == seen[-1]
        rows = {tuple(row["input_ids"]) for row in held_out}
        assert rows and len(rows & seen[-1]) < 0.1 * len(rows), "but for what the text repeats"
    assert len(seen[1]) < len(seen[0])
