"""An experiment's data: documents that cannot be read are left out, and listed in the run's directory."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spikelm.data import train_tokenizer
from spikelm.errors import SpikelmError
from spikelm.experiment import BAD_DOCUMENTS, Experiment, Settings
from spikelm.run import RunDirectory

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GOOD = [json.dumps({"text": f"Story {number}: the cat slept."}) for number in range(100)]


@pytest.fixture
def teacher(tmp_path: Path, tiny_llama: "LlamaForCausalLM") -> Path:
    """A random Llama with a tokenizer."""
    tiny_llama.resize_token_embeddings(300)
    tiny_llama.save_pretrained(tmp_path / "teacher")
    train_tokenizer("\n".join(GOOD), 300).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of documents of which lines 2 and 7 are bad."""
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join([GOOD[0], "{", *GOOD[1:5], "[]", *GOOD[5:]]))
    return Settings(str(tmp_path / "run"), data=str(path), context_length=16)


def opened(settings: Settings, teacher: Path, processes: int = 1) -> tuple[Any, Any]:
    """The training contexts and bad_documents.json (None where there is none) of an experiment opened and left."""
    with RunDirectory(settings.output_dir, {}) as run, pytest.MonkeyPatch.context() as patch:
        if processes > 1:  # as the first of them
            patch.setenv("WORLD_SIZE", str(processes))
            patch.setenv("RANK", "0")
        contexts = Experiment.open(settings, run, teacher).train_data
        listed = run.path(BAD_DOCUMENTS)
        rows = [row["input_ids"] for row in contexts]
        return rows, json.loads(listed.read_text()) if listed.exists() else None


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_documents_are_listed_in_the_run(settings: Settings, teacher: Path, processes: int) -> None:
    with pytest.warns(UserWarning, match="skipped 2 documents that cannot be read: .*documents.jsonl line 2: not JSON"):
        rows, bad = opened(settings, teacher, processes)
    assert [(document["source"], document["line"], document["reason"]) for document in bad] == [
        (settings.data, 2, "not JSON (Expecting property name enclosed in double quotes)"),
        (settings.data, 7, "a list"),
    ]
    if processes > 1:  # which read what was packed, with nothing left out now
        assert opened(settings, teacher, processes) == (rows, bad)
    Path(settings.data).write_text("\n".join(GOOD))
    clean = dataclasses.replace(settings, output_dir=settings.output_dir + "-clean", max_bad_documents=0)
    assert opened(clean, teacher, processes) == (rows, None)


def test_the_list_is_of_the_last_reading(settings: Settings, teacher: Path) -> None:
    with pytest.warns(UserWarning, match="skipped 2 documents"):
        opened(settings, teacher)
    Path(settings.data).write_text("\n".join(GOOD))
    assert opened(settings, teacher)[1] == []


def test_a_stream_lists_nothing(settings: Settings, teacher: Path) -> None:
    with pytest.warns(UserWarning, match="skipped a document that cannot be read: .* line (2: not JSON|7: a list)"):
        _, bad = opened(dataclasses.replace(settings, streaming=True, max_tokens=16 * 40), teacher)
    assert bad is None


def test_more_bad_documents_than_the_settings_allow(settings: Settings, teacher: Path) -> None:
    few = dataclasses.replace(settings, max_bad_documents=1)
    with pytest.raises(
        SpikelmError, match="more than max_bad_documents=1 documents cannot be read: .* line 2: .* line 7: "
    ):
        opened(few, teacher)
    assert [path.name for path in Path(few.output_dir).iterdir()] == ["run.lock"]  # nothing hinders the next command


def test_a_limit_below_nothing_is_refused(settings: Settings) -> None:
    dataclasses.replace(settings, max_bad_documents=0).check()
    with pytest.raises(SpikelmError, match="max_bad_documents must be at least 0, given -1"):
        dataclasses.replace(settings, max_bad_documents=-1).check()
