"""lm-evaluation-harness through spikelm: against lm-eval itself, against a slow loop, and what is refused."""

import copy
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Mamba2Config

import spikelm.interop.lm_eval as interop
from spikelm import calibrate, spikify
from spikelm.data import load_teacher, train_tokenizer
from spikelm.errors import SpikelmError
from spikelm.interop.lm_eval import (
    check_max_length,
    evaluate_tasks,
    load_tasks,
    local_task,
    longest_context,
    read_rows,
)
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from tests.conftest import shared_path

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which is not installed")

CHOICE = {"prompt": "Once upon a time there was", "choices": [" a cat", " a dog that ran"], "answer": 0}
PAIR = {"sentence_good": "The cat was big.", "sentence_bad": "The cat were big."}
WORDS = "cat dog ran sat big red ball time once there was".split()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows_of(count: int, blank: str = " ") -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text() -> str:
        return blank + " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    return [
        {"prompt": " ".join(draw.choices(WORDS, k=5)), "choices": [text(), text()], "answer": draw.randint(0, 1)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer("Once upon a time there was a cat and a dog. The dog ran, the cat sat. " * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **shape)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def log_likelihood(model: Any, tokens: list[int], length: int) -> float:
    """Of the last `length` tokens."""
    scores = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, tokens[place]]) for place in range(len(tokens) - length, len(tokens)))


@pytest.mark.parametrize(("blank", "delimiter"), [(" ", None), ("", None), ("", " : ")])
def test_choices_equal_a_slow_loop(model: Any, tokenizer: Any, tmp_path: Path, blank: str, delimiter: Any) -> None:
    rows = rows_of(12, blank)
    path = write(tmp_path / "animals.jsonl", rows)
    found = evaluate_tasks(model, tokenizer, load_tasks([path], delimiter))["tasks"]["animals"]
    right = normalised = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            tokens = tokenizer(row["prompt"] + (delimiter or "") + choice)["input_ids"]
            assert tokens[: len(prompt)] == prompt
            scores.append(log_likelihood(model, tokens, len(tokens) - len(prompt)))
        per_character = [score / len(text.strip()) for score, text in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["answer"]
        normalised += per_character.index(max(per_character)) == row["answer"]
    assert found["metrics"] == {"acc": right / 12, "acc_norm": normalised / 12}
    assert found["examples"] == 12
    assert 0 < right < 12


@pytest.mark.parametrize("delimiter", [None, ""])
def test_pairs_equal_a_slow_loop(model: Any, tokenizer: Any, tmp_path: Path, delimiter: str | None) -> None:
    rows = [dict(zip(("sentence_good", "sentence_bad"), row["choices"], strict=True)) for row in rows_of(20, "")]
    found = evaluate_tasks(model, tokenizer, load_tasks([write(tmp_path / "pairs.jsonl", rows)], delimiter))
    right = 0
    for row in rows:
        scores = []
        for name in ("sentence_good", "sentence_bad"):
            tokens = tokenizer((" " if delimiter is None else "") + row[name], add_special_tokens=False)["input_ids"]
            scores.append(log_likelihood(model, [tokenizer.bos_token_id, *tokens], len(tokens)))
        right += scores[0] > scores[1]
    assert found["tasks"]["pairs"]["metrics"]["acc"] == right / 20
    assert 0 < right < 20


def test_examples_of_the_answer_come_first_when_asked(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", rows_of(6)), write(tmp_path / "b.jsonl", [PAIR] * 3)]
    tasks = load_tasks(paths)
    found = [evaluate_tasks(model, tokenizer, tasks, num_fewshot=shots, max_length=60) for shots in (0, 2, 2)]
    assert [result["tasks"]["a"]["num_fewshot"] for result in found] == [0, 2, 2]
    assert found[1] == found[2]
    assert found[0]["truncated"] == 0
    assert found[1]["tasks"]["b"] == found[0]["tasks"]["b"]


def test_a_question_is_not_among_its_own_examples(tmp_path: Path) -> None:
    rows = [row | {"prompt": f"Number {number}."} for number, row in enumerate(rows_of(6))]
    task = local_task(write(tmp_path / "a.jsonl", rows))
    task.set_fewshot_seed(0)
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, num_fewshot=5)
        assert context.endswith(doc["prompt"])
        assert sorted(re.findall(r"Number \d", context)) == [f"Number {number}" for number in range(6)]


def test_what_is_too_long_is_counted_or_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [CHOICE | {"prompt": "cat " * 100}, CHOICE])
    found = evaluate_tasks(model, tokenizer, [path], max_length=32)
    assert (found["truncated"], found["max_length"]) == (2, 32)
    write(path, [CHOICE, CHOICE | {"choices": [" a cat", " dog" * 100]}])
    with pytest.raises(SpikelmError, match=r"long, example 2: a choice has \d+ tokens, .* max_length=64"):
        evaluate_tasks(model, tokenizer, [path])
    with pytest.raises(SpikelmError, match="max_length=65: 2 to 64 is what this model takes"):
        evaluate_tasks(model, tokenizer, [path], max_length=65)


def test_a_spiking_student_and_what_is_given_stays_as_it_was(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    student = spikify(LlambaForCausalLM.from_llama(model), "mar")
    calibrate(student, [{"input_ids": torch.arange(32)[None]}])
    student.train()
    path = write(tmp_path / "animals.jsonl", rows_of(12))
    found = evaluate_tasks(student, tokenizer, [str(path)], limit=8, batch_size=3)
    assert found["max_length"] == model.config.max_position_embeddings == student.config.max_position_embeddings
    assert found["tasks"]["animals"]["examples"] == 8
    assert student.training
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    again = evaluate_tasks(student.eval(), unpadded, [path], limit=8, batch_size=1)
    assert again["tasks"] == found["tasks"]
    assert unpadded.pad_token is None


def test_how_much_a_model_takes(model: Any) -> None:
    recurrent = Mamba2Config()
    assert (longest_context(model.config), check_max_length(model.config, None)) == (64, 64)
    assert (longest_context(recurrent), check_max_length(recurrent, None)) == (None, interop.DEFAULT_MAX_LENGTH)
    assert longest_context(LlambaConfig(max_position_embeddings=64)) is None
    assert check_max_length(LlambaConfig(max_position_embeddings=64), 10_000) == 10_000
    assert longest_context(GPT2Config(n_positions=48)) == 48


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ({"prompt": "a", "choices": [" b", " c"]}, "line 2 has no 'answer'"),
        (CHOICE | {"prompt": 3}, "line 2 has the prompt 3"),
        (CHOICE | {"prompt": " "}, "line 2 has the prompt ' '"),
        (CHOICE | {"choices": [" b"]}, "line 2 has no list of at least two choices"),
        (CHOICE | {"choices": [" b", " "]}, "line 2 has a choice without text"),
        (CHOICE | {"answer": 2}, "line 2 has the answer 2, which is no index of its 2 choices"),
        (CHOICE | {"answer": True}, "line 2 has the answer True"),
        (PAIR, "line 2 is of another kind than the lines before it"),
        ({"sentence_good": "a"}, "line 2 "),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: Any, fault: str) -> None:
    path = write(tmp_path / "rows.jsonl", [CHOICE, line])
    with pytest.raises(SpikelmError) as caught:
        read_rows(path)
    assert f"{path} {fault}" in str(caught.value)


def test_a_pair_without_a_sentence_and_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [PAIR, {"sentence_good": "a", "sentence_bad": ""}])
    with pytest.raises(SpikelmError, match="line 2 has no text in 'sentence_bad'"):
        local_task(path)
    with pytest.raises(SpikelmError, match="blank.jsonl is empty"):
        read_rows(write(tmp_path / "blank.jsonl", [""]))


def test_unknown_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "animals.jsonl", [CHOICE])
    with pytest.raises(SpikelmError, match=r"plants\.jsonl is no task: a \.jsonl file \(in \.: animals\.jsonl\)"):
        load_tasks(["plants.jsonl"])
    with pytest.raises(SpikelmError, match="no task is given"):
        load_tasks([])
    with pytest.raises(SpikelmError, match="two of the tasks are called 'animals'"):
        load_tasks(["animals.jsonl", tmp_path / "animals.jsonl"])


def test_a_prompt_is_no_template(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = local_task(write(tmp_path / "t.jsonl", [CHOICE | {"prompt": "{{choices}} of a {% cat"}]))
    assert task.doc_to_text(task.eval_docs[0]) == "{{choices}} of a {% cat"


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpikelmError, match=r'pip install "spikelm\[eval\]"'):
        load_tasks([write(tmp_path / "animals.jsonl", [CHOICE])])


def test_a_tokenizer_without_bos_and_eos_and_sizes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "animals.jsonl", [CHOICE])
    with pytest.raises(SpikelmError, match="limit=0: at least 1 is accepted"):
        evaluate_tasks(model, tokenizer, [path], limit=0)
    with pytest.raises(SpikelmError, match="num_fewshot=1: task animals has 0 to 0 examples beside a question"):
        evaluate_tasks(model, tokenizer, [path], num_fewshot=1)
    bare = train_tokenizer("Once upon a time there was a cat. " * 20, 300)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(SpikelmError, match="neither bos nor eos"):
        evaluate_tasks(model, bare, [path])


def direct(path: Path, tasks: list[Any], limit: int) -> dict[str, Any]:
    """lm-eval's Python API, without spikelm."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=8)
    index = interop._manager(True)  # lm-eval's own; reading it takes seconds
    return lm_eval.simple_evaluate(harness, tasks=tasks, limit=limit, num_fewshot=0, task_manager=index)["results"]


@pytest.mark.slow
def test_accuracies_are_those_of_lm_eval_alone(teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own BLiMP task on the same rows, by name and as a file; and a task as its ARC-easy is written."""
    name = "anaphor_gender_agreement"
    file, questions = (shared_path(f"data/zeroshot/{each}.jsonl") for each in (f"blimp/{name}", "arc_easy"))
    pairs, choices = ([json.loads(line) for line in path.read_text().splitlines()] for path in (file, questions))
    asked: list[str] = []

    def load_dataset(path: str, **arguments: Any) -> DatasetDict:
        asked.append(path)
        return DatasetDict(train=Dataset.from_list(pairs))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    arc = {
        "task": "arc",
        "custom_dataset": lambda **metadata: DatasetDict(validation=Dataset.from_list(choices)),
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": lambda row: [choice.strip() for choice in row["choices"]],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    }
    expected = direct(teacher_path, [f"blimp_{name}", arc], 100)
    model, tokenizer = load_teacher(teacher_path)
    tasks = load_tasks([f"blimp_{name}", file, questions])
    found = evaluate_tasks(model, tokenizer, tasks, limit=100)["tasks"]
    assert set(asked) == {"nyu-mll/blimp"}
    accuracy = expected[f"blimp_{name}"]["acc,none"]
    assert found[f"blimp_{name}"]["metrics"] == {"acc": accuracy}
    assert found[name]["metrics"]["acc"] == accuracy
    assert found[name]["stderr"]["acc"] == expected[f"blimp_{name}"]["acc_stderr,none"]
    for metric in ("acc", "acc_norm"):
        assert found["arc_easy"]["metrics"][metric] == expected["arc"][f"{metric},none"]


@pytest.mark.slow
def test_names_that_lm_eval_does_not_know_and_data_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match=r"blimp_anaphor is no task: .*; close to it: .*blimp"):
        load_tasks(["blimp_anaphor"])
    with pytest.raises(SpikelmError, match=r"task blimp_causative: its data cannot be loaded .*needs neither"):
        load_tasks(["blimp_causative"])


def test_the_figures_of_the_small_teacher(teacher_path: Path) -> None:
    """The first 40 pairs as they are written, and all of them as lm-eval scores them, with a blank before each."""
    names = ("principle_A_case_1", "irregular_past_participle_verbs", "anaphor_gender_agreement")
    paths = [shared_path(f"data/zeroshot/blimp/{name}.jsonl") for name in names]
    model, tokenizer = load_teacher(teacher_path)

    def accuracies(tasks: list[Any], limit: int | None) -> list[float]:
        found = evaluate_tasks(model, tokenizer, tasks, limit=limit, batch_size=32)["tasks"]
        return [found[name]["metrics"]["acc"] for name in names]

    assert accuracies(load_tasks(paths, target_delimiter=""), 40) == [1.0, 0.975, 0.775]
    assert accuracies(load_tasks(paths), None) == pytest.approx([0.989, 0.909, 0.788], abs=0.003)
