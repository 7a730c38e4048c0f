"""benchmarks/energy.py: what it is given wrongly is refused by name, before anything is loaded."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from spikelm.errors import SpikelmError


@pytest.fixture(scope="module")
def energy(repository: Path) -> Iterator[ModuleType]:
    """The script as a module; this process is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module("energy")
    del sys.modules["energy"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What settings are read from, without models."""
    config = {"teacher": "embedded", "context_length": 128, "held_out": 0.05}
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config}))
    return tmp_path


@pytest.mark.parametrize(
    "given", [["run=a"], ["run=a", "student=b", "data="], ["run=a", "student=b", "date=c"], ["run=a"] * 3, ["run"]]
)
def test_fields_that_are_missing_or_unknown(energy: ModuleType, given: list[str]) -> None:
    with pytest.raises(SpikelmError, match=f"are needed, each once; got {' '.join(given)}"):
        energy.fields_of(given)


def test_the_settings_of_a_run(energy: ModuleType, run: Path) -> None:
    assert energy.fields_of(["data=a=b", "run=c", "student=d,e"]) == {"data": "a=b", "run": "c", "student": "d,e"}
    assert energy.settings_of(run) == {"teacher": str(run / "teacher"), "context_length": 128, "held_out": 0.05}
    for content in ("", "[]", "{}", '{"config": {"teacher": "a"}}'):
        (run / "metrics.json").write_text(content)
        with pytest.raises(SpikelmError, match="run must be the output_dir of a finished"):
            energy.settings_of(run)
    with pytest.raises(SpikelmError, match="run must be the output_dir of a finished .*; got nowhere"):
        energy.settings_of(Path("nowhere"))


def test_directories_that_are_missing(energy: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["energy.py", f"run={run}", "data=stories.txt", f"student={run / 'none'}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SpikelmError, match="student must be a directory written by save_pretrained; got .*none"):
        energy.main()
    (run / "none").mkdir()
    (run / "none" / "config.json").write_text("{}")
    with pytest.raises(SpikelmError, match="the run's teacher must be a directory written by save_pretrained"):
        energy.main()
    monkeypatch.setattr(sys, "argv", [*given, "--output", str(run / "absent" / "energy.json")])
    with pytest.raises(SpikelmError, match="--output must be a file in a directory that exists"):
        energy.main()
    with pytest.raises(SpikelmError, match="student must be .*; got nothing"):
        energy.check_directory("student", "")


def test_the_committed_result_says_how_it_was_made(repository: Path) -> None:
    result = json.loads((repository / "benchmarks" / "results" / "energy.json").read_text())
    command = " ".join((repository / "docs" / "energy.md").read_text().split()).replace("\\ ", "")
    assert result["command"] in command
    assert len(result["students"]) == len(result["command"].split("student=")[1].split()[0].split(","))
