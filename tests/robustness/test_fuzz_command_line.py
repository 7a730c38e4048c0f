"""The command line with any arguments and any model directory: an exit status, never a traceback."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from spikelm import Recipe, calibrate, spikify
from spikelm.cli import main
from spikelm.data import train_tokenizer
from spikelm.errors import SpikelmError
from spikelm.limits import check_directory
from tests.robustness.profiles import examples
from tests.robustness.test_fuzz_recipes import VALUES, WORDS, mostly

TEXT = "Once upon a time there was a cat. " * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a spiking Llama, a text, a task and odd files, in which the commands run."""
    root = tmp_path_factory.mktemp("commands")
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.save_pretrained(root / "student")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    spikify(model, Recipe.preset("llama"))
    calibrate(model, [{"input_ids": torch.randint(3, 64, (1, 16))}])
    model.save_pretrained(root / "student")
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "task.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    (root / "broken.jsonl").write_text("{\n[1]\n")
    (root / "none").mkdir()
    shutil.copytree(root / "student", root / "changed")
    with contextlib.chdir(root):
        yield root


def status_of(arguments: list[str]) -> tuple[int, str]:
    """The exit status and what was said on stderr."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            return main(arguments), said.getvalue()
    except SystemExit as error:
        return int(error.code or 0), said.getvalue()


PLACES = st.sampled_from(["student", "none", "text.txt", "empty.txt", "binary.txt", "absent", "", ".", "task.jsonl",
                          "broken.jsonl", "a/b", "hub:a/b", "\0", "--", "-1", "é" * 300])  # fmt: skip
VALUES_OF_OPTIONS = {
    "--model": mostly(st.just("student")),
    "--data": mostly(st.just("text.txt")),
    "--teacher": PLACES,
    "--tasks": st.sampled_from(["task.jsonl", "broken.jsonl", "text.txt", "absent.jsonl", "", "none"]),
    "--prompt": WORDS,
    "--max-new-tokens": mostly(st.sampled_from(["1", "2", "100", "0", "-1", "9" * 30])),
    "--context-length": st.sampled_from(["8", "16", "1", "0", "64", "65", "9" * 30, "x"]),
    "--max-contexts": st.sampled_from(["1", "2", "0", "9" * 30]),
    "--batch-size": st.sampled_from(["1", "3", "-2", "9" * 30]),
    "--held-out": st.sampled_from(["0.5", "0", "1", "nan", "inf", "1e-300", "x"]),
    "--limit": st.sampled_from(["1", "0", "x"]),
    "--num-fewshot": st.sampled_from(["0", "1", "-1", "9" * 30]),
    "--max-length": st.sampled_from(["1", "8", "64", "9" * 30]),
    "--seed": st.sampled_from(["0", "-1", "9" * 30, "x"]),
    "--device": st.sampled_from(["cpu", "cuda", "cuda:9", "meta", "x", ""]),
    "--dtype": st.sampled_from(["float32", "bfloat16", "float16", "int8", ""]),
    "--costs": st.sampled_from(["45nm-fp32", "x", ""]),
    "--output": st.sampled_from(["out.json", "none", "absent/out.json", "out.txt", "", "/dev/null"]),
    "--picture": st.sampled_from(["out.png", "none", "out.json"]),
    "--deploy": st.none(),
    "--target-delimiter": WORDS,
    "--help": st.none(),
    "--version": st.none(),
}
# What a command does not run without, mostly there and mostly right.
NEEDED = {"eval": ["--model", "--data"], "generate": ["--model", "--prompt"], "energy": ["--model", "--data"], "": []}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from([*NEEDED, "eval", "generate", "energy"]))
    options = [*(NEEDED[command] if draw(st.integers(0, 9)) else [])]
    options += draw(st.lists(st.sampled_from([name for name in VALUES_OF_OPTIONS if name != "--help"]), max_size=3))
    line = [command] if command else []
    for name in options:
        value = draw(VALUES_OF_OPTIONS[name] if name != "--model" or draw(st.integers(0, 3)) else PLACES)
        line += [name] if value is None else [name, value if isinstance(value, str) else str(value)]
    return line + draw(st.lists(WORDS, max_size=1) if not draw(st.integers(0, 9)) else st.just([]))


@pytest.mark.filterwarnings("ignore")
@examples(25, 4_000)
@given(line=command_lines())
def test_any_command_line(place: Path, line: list[str]) -> None:
    status, said = status_of(line)
    assert status in (0, 1, 2)
    assert "Traceback" not in said
    assert bool(said.strip()) or status == 0


# ---- model directories


FIELDS = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("model_type", "architectures", "dtype", "quantization_config", "rope_parameters", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "auto_map", "tie_word_embeddings", "hidden_act", "transformers_version"),
)


@st.composite
def changed_directories(draw: st.DrawFn) -> dict[str, Any]:
    """File name -> its new content: a configuration with other fields, or bytes."""
    fields = st.sampled_from(FIELDS)
    if draw(st.booleans()):
        return {"config.json": draw(st.dictionaries(fields, VALUES, min_size=1, max_size=2))}
    name = draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                 "model.safetensors", "model.safetensors.index.json"]))  # fmt: skip
    content = draw(st.one_of(st.binary(max_size=20), VALUES.map(lambda value: json.dumps(value).encode())))
    return {name: content}


@pytest.mark.filterwarnings("ignore")
@examples(15, 3_000)
@given(changes=changed_directories())
def test_any_model_directory(place: Path, changes: dict[str, Any]) -> None:
    changed = place / "changed"
    for path in (place / "student").iterdir():
        shutil.copyfile(path, changed / path.name)
    for path in set(changed.iterdir()) - {changed / one.name for one in (place / "student").iterdir()}:
        path.unlink()
    for name, content in changes.items():
        if isinstance(content, dict):
            content = json.dumps(json.loads((changed / name).read_text()) | content).encode()
        (changed / name).write_bytes(content)
    try:
        check_directory(changed)
    except SpikelmError:
        return
    status, said = status_of(["generate", "--model", "changed", "--prompt", "Once", "--max-new-tokens", "1"])
    assert status in (0, 1)
    assert "Traceback" not in said
