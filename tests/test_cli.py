"""The command line: tables, texts and estimates of a small teacher and its spiking student, and what is refused."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spikelm import calibrate, spikify
from spikelm.cli import main
from spikelm.compare import Measures, comparison_table, open_model, score_model
from spikelm.data import load_contexts, train_tokenizer
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluate, generate_sample
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import spikingbert

TEXT = "Once upon a time there was a cat and a dog. The dog ran, the cat sat. " * 20
ROWS = [
    {"prompt": "Once upon a time there was", "choices": [" a cat", " a dog"], "answer": number % 2}
    for number in range(6)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models teacher, student (spiking), other (another vocabulary) and bare, text.txt, cats.jsonl."""
    directory = tmp_path_factory.mktemp("models")
    for name, size in (("teacher", 300), ("other", 290)):
        tokenizer = train_tokenizer(TEXT, size)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **shape)
            model = LlamaForCausalLM(config).eval()
            student = spikify(LlambaForCausalLM.from_llama(model), "mar")
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
        if name == "teacher":
            model.save_pretrained(directory / "bare")
            calibrate(student, [{"input_ids": torch.arange(32)[None]}])
            student.save_pretrained(directory / "student")
            tokenizer.save_pretrained(directory / "student")
    (directory / "text.txt").write_text(TEXT)
    (directory / "empty.txt").write_text("")
    (directory / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    return directory


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def figures_of(name: str, teacher: str) -> dict[str, Any]:
    """evaluate() on the contexts that the command measures."""
    (model, tokenizer), (reference, _) = open_model(name), open_model(teacher)
    first, last = load_contexts("text.txt", tokenizer, 32)
    return evaluate(model, [*first, *last], teacher=reference, batch_size=3)


def test_a_table_of_a_teacher_and_its_spiking_student(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    status = main(
        "eval --model teacher student --teacher teacher --data text.txt --context-length 32 --tasks cats.jsonl".split()
        + ["--limit", "4", "--output", str(output)]
    )
    said = capsys.readouterr()
    assert status == 0
    result = json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert said.out == comparison_table(result) + "\n"
    assert "models: 100%" in said.err
    assert [line.split(" | ")[0] for line in said.out.splitlines()[2:]] == ["| teacher", "| student"]
    columns = "model | parameters | perplexity | bits per byte | KL to teacher | cats acc | cats acc_norm"
    assert said.out.startswith(f"| {columns} |\n")
    student, expected = result["models"]["student"], figures_of("student", "teacher")
    assert student["text"]["ce"] == pytest.approx(expected["ce"], rel=1e-5)
    assert student["text"]["kl_to_teacher"] == pytest.approx(expected["kl_to_teacher"], rel=1e-4)
    assert student["text"]["kl_to_teacher"] > 0.001 > result["models"]["teacher"]["text"]["kl_to_teacher"]
    assert student["tasks"]["tasks"]["cats"]["examples"] == 4
    assert result["versions"]["torch"] == version("torch")
    assert result["versions"]["machine"]["cores"] == os.cpu_count()
    assert result["command"].startswith("spikelm eval --model teacher student --teacher teacher --data text.txt")
    assert result["settings"]["tasks"] == ["cats.jsonl"] and result["settings"]["context_length"] == 32
    assert comparison_table(result, metrics=["acc"]).count("acc") == 1


def test_a_part_of_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The last part is what the examples hold out; the whole is all contexts."""
    model, tokenizer = open_model("student")
    first, last = load_contexts("text.txt", tokenizer, 32, held_out=0.25)
    asked = Measures(data="text.txt", context_length=32, held_out=0.25)
    part, whole = (score_model(model, tokenizer, measures) for measures in (asked, Measures("text.txt", 32)))
    assert part["text"]["ce"] == evaluate(model, last, batch_size=8)["ce"]
    assert (part["text"]["tokens"], whole["text"]["tokens"]) == (len(last) * 31, (len(first) + len(last)) * 31)
    assert score_model(model, tokenizer, Measures("text.txt", 32, max_contexts=2))["text"]["tokens"] == 62
    assert part["tasks"] is None
    assert main("eval --model student --data text.txt --dtype bfloat16 --context-length 32".split()) == 0
    assert "| student |" in capsys.readouterr().out


def test_what_is_cut_off_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "teacher", "--tasks", "cats.jsonl", "--max-length", "4"]) == 0
    assert re.search(r"teacher: \d+ inputs were longer than 4 tokens and lost their beginning", capsys.readouterr().err)


@pytest.mark.parametrize("deployed", [False, True])
def test_a_text_goes_on(capsys: pytest.CaptureFixture[str], deployed: bool) -> None:
    arguments = ["generate", "--model", "student", "--prompt", "Once upon", "--max-new-tokens", "8"]
    assert main(arguments + ["--deploy"] * deployed) == 0
    tokenizer = open_model("student")[1]
    expected = generate_sample(AutoModelForCausalLM.from_pretrained("student"), tokenizer, "Once upon", 8)
    assert capsys.readouterr().out == expected + "\n"


def test_an_estimate_of_energy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "energy --model student --data text.txt --teacher teacher --context-length 16 --max-contexts 2".split()
    places = ["--output", str(tmp_path / "energy.json"), "--picture", str(tmp_path / "energy.png")]
    assert main(arguments + places + ["--costs", "45nm-int8"]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "energy.json").read_text())
    assert "estimate" in said and "|" in said
    assert report["costs"]["name"] == "45nm-int8"
    assert report["phases"]["prefill"]["energy"]["teacher"] != report["phases"]["prefill"]["energy"]["model"]
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --model missing --data text.txt", "model missing has no configuration that can be loaded"),
        ("eval --model . --data text.txt", "model . holds no config.json"),
        ("eval --model bare --data text.txt", "model bare has no tokenizer that can be loaded"),
        ("eval --model teacher --data empty.txt", "empty.txt is empty"),
        ("eval --model teacher --data missing.txt", "no such text: missing.txt"),
        ("eval --model teacher --data text.txt --context-length 65", "one of the models takes at most 64 tokens"),
        ("eval --model teacher teacher --data text.txt", "every model is given once; got teacher, teacher"),
        ("eval --model teacher teacher/ --data text.txt", "every model is given once; got teacher, teacher/"),
        (
            "eval --model teacher --data text.txt --teacher other",
            "teacher has a vocabulary of 293, teacher other one of",
        ),
        ("eval --model teacher --tasks cats.jsonl --max-length 65", "max_length=65: 2 to 64 is what this model takes"),
        ("eval --model teacher --tasks broken.jsonl", "broken.jsonl line 2 is not JSON"),
        ("eval --model teacher --tasks dogs.jsonl", "dogs.jsonl is no task: a .jsonl file (in .: broken.jsonl, cats."),
        ("eval --model teacher --data text.txt --output no/where.json", "no/where.json cannot be written: No such"),
        ("eval --model teacher --data text.txt --output figures.txt", "a name ending in .json is accepted"),
        ("eval --model teacher --data text.txt --device nowhere", "device='nowhere' cannot be used here"),
        ("generate --model teacher --prompt a --max-new-tokens 99", "more than the 64 that teacher takes"),
        ("generate --model teacher --prompt a --max-new-tokens 5 --deploy", "deploy takes a spiking model"),
        ("energy --model student --data text.txt --costs gold", "gold"),
        ("energy --model student --data text.txt --device nowhere", "device='nowhere' cannot be used here"),
        ("energy --model student --data text.txt --teacher other", "teacher other one of"),
        ("energy --model student --data text.txt --picture energy.txt", "a name ending in .png is accepted"),
        ("energy --model missing --data text.txt", "model missing has no configuration"),
    ],
)
def test_one_line_says_what_is_wrong(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    assert main(command.split()) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert said.out == ""
    assert last.startswith("error: ") and message in last
    assert sorted(Path().iterdir()) == before


def test_a_model_of_other_tokens_is_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained("teacher").save_pretrained(tmp_path / "swapped")
    train_tokenizer("zebras quietly jump " * 50, 293).save_pretrained(tmp_path / "swapped")
    assert main(["eval", "--model", "teacher", "--teacher", str(tmp_path / "swapped"), "--data", "text.txt"]) == 1
    assert "other tokens under the same numbers" in capsys.readouterr().err


def test_code_of_a_model_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    assert main(["eval", "--model", str(tmp_path), "--data", "text.txt"]) == 1
    assert "has no configuration that can be loaded" in capsys.readouterr().err


def test_a_classifier_is_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spikingbert().save_pretrained(tmp_path)
    train_tokenizer(TEXT, 300).save_pretrained(tmp_path)
    assert main(["eval", "--model", str(tmp_path), "--data", "text.txt"]) == 1
    assert "is a spikingbert; a causal LM is accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "eval --model teacher",
        "eval --data text.txt",
        "eval --model teacher --tasks cats.jsonl --teacher teacher",
        "eval --model teacher --tasks cats.jsonl --held-out 0.5",
        "eval --model teacher --tasks cats.jsonl --seed -1",
        "eval --model teacher --data text.txt --limit 3",
        "eval --model teacher --data text.txt --num-fewshot 0",
        "eval --model teacher --data text.txt --limit 0",
        "eval --model teacher --data text.txt --held-out 1",
        "eval --model teacher --data text.txt --num-fewshot -1",
        "generate --model teacher",
        "unknown",
    ],
)
def test_wrong_usage_leaves_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(command.split())
    assert left.value.code == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "eval", "generate", "energy"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"  spikelm {command}" in capsys.readouterr().out.rpartition("\nexample")[2]


def test_interrupted_and_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(error: BaseException) -> int:
        monkeypatch.setattr("spikelm.doctor.report", lambda: (_ for _ in ()).throw(error))
        return main(["doctor"])

    assert stop(KeyboardInterrupt()) == 130
    assert stop(OSError(28, "No space left on device")) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_nothing_to_measure() -> None:
    with pytest.raises(SpikelmError, match="nothing is measured"):
        Measures().resolve([])


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spikelm", "generate", "--model", "missing", "--prompt", "a"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: model missing has no configuration")
    assert "Traceback" not in done.stderr
