"""benchmarks/systems.py on models of seconds: every row has what the table shows, and is of the model that it names."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import spikelm
from spikelm.data import train_tokenizer
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import bispikclm

pytest.importorskip("lm_eval", reason="needs the extra eval")

SEED = {"orientation": 1, "alignment": 2, "stage1": 3, "student": 4, "dense": 5}


@pytest.fixture(scope="module")
def systems(repository: Path) -> Iterator[ModuleType]:
    """The script as a module; this process is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module("systems")
    del sys.modules["systems"]


@pytest.fixture(scope="module")
def inputs(systems: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Finished runs of random models that share a tokenizer, a text, and two minimal pairs."""
    root = tmp_path_factory.mktemp("systems")
    text = "Once upon a time there was a cat. It sat on a mat and saw a dog. " * 700
    (root / "stories.txt").write_text(text)
    pairs = [
        {"sentence_good": "It sat.", "sentence_bad": "It sit."},
        {"sentence_good": "a cat", "sentence_bad": "cat a"},
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer = train_tokenizer(text, 280)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, max_position_embeddings=256)).eval()
    stage1 = LlambaForCausalLM.from_llama(llama)
    saved = {
        "teacher": llama,
        "mar/stage1": stage1,
        "mar/student": spikelm.spikify(LlambaForCausalLM.from_llama(llama), "mar"),
        "spikingmamba/student": spikelm.spikify(LlambaForCausalLM.from_llama(llama), "spikingmamba"),
        "bispikclm/student": bispikclm(vocab_size=len(tokenizer)),
        "bispikclm/dense": OPTForCausalLM(OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32)),
    }
    for name, model in saved.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return systems.Inputs(
        str(root / "teacher"), str(root / "stories.txt"), "rows.tsv", [str(root / "pairs.jsonl")], root
    )


def test_language_models(systems: ModuleType, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CALIBRATION": 4, "NEW": 4, "CONTEXT_LENGTH": 32}.items():
        monkeypatch.setattr(systems, name, value)
    runs = {name: {"wall_s": SEED} for name in ("mar", "spikingmamba", "bispikclm")}
    rows = {row["name"]: row for row in systems.language_models(inputs, runs)}
    assert len(rows) == 8
    for row in rows.values():
        assert row["text"]["ce"] > 0 and set(row["blimp"]) == {"pairs"}
        ends = row["energy"]["energy"]["model"]["total_pj"]
        assert (
            0 < ends["low"] < ends["high"]
            and row["energy"]["phase"] == "decode"
            and "not measured" in row["energy"]["estimate"]
        )
        assert row["speed"]["tokens_per_second"] > 0 and row["checkpoint_bytes"] > 1000
    assert rows["teacher: Llama"]["text"]["kl_to_teacher"] == 0 and rows["teacher: Llama"]["training_s"] is None
    assert {name for name, row in rows.items() if row["rates"]} == {"MAR", "SpikingMamba", "BiSpikCLM"}
    assert [rows[name]["training_s"] for name in ("MAR", "SpikingMamba", "BiSpikCLM")] == [10, 10, 4]
    dense, quantised = rows["Llamba (Mamba-2), dense"], [row for name, row in rows.items() if "-bit" in name]
    for row, of in zip(quantised, ("MAR", "SpikingMamba"), strict=True):
        assert row["checkpoint_bytes"] < dense["checkpoint_bytes"]
        ends, floats = (each["energy"]["energy"] for each in (row, rows[of]))
        assert ends["model"]["total_pj"]["high"] < floats["quantised_student"]["total_pj"]["high"]  # bytes for floats
        assert row["text"]["ce"] == pytest.approx(dense["text"]["ce"], abs=0.5)


def test_what_is_missing_is_trained_in_order(
    systems: ModuleType, inputs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each by the script of its example, into its own directory; what is finished is not touched."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        calls.append(command)
        directory = Path(command[-1].removeprefix("output_dir="))
        directory.mkdir()
        (directory / "metrics.json").write_text("{}")

    monkeypatch.setattr(systems.subprocess, "run", run)
    asked = systems.Inputs(inputs.teacher, inputs.data, "rows.tsv", inputs.blimp, tmp_path)
    (tmp_path / "bispikclm").mkdir()
    (tmp_path / "bispikclm" / "metrics.json").write_text('{"there": 1}')
    found = systems.train_missing(asked)
    assert found == {"mar": {}, "spikingmamba": {}, "bispikclm": {"there": 1}, "sst2": {}}
    scripts = [Path(command[1]).parent.name for command in calls]
    assert scripts == ["mar", "spikingmamba", "extreme_quantization"]
    assert all(Path(command[1]).is_file() for command in calls)
    assert f"teacher={tmp_path / 'mar' / 'stage1'}" in calls[1]


def test_wrong_fields(systems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["systems.py", "teacher=somewhere", "text=else"])
    with pytest.raises(SpikelmError, match=r"sst2=\.\.\. teacher=\.\.\. are needed; got teacher=somewhere text=else"):
        systems.main()
