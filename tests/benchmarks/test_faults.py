"""benchmarks/faults.py: it sees a run that is lost, a result that is wrong and a fault that nobody speaks of."""

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SMALL = {
    "orientation.steps": 4,
    "alignment.steps": 4,
    "distillation.steps": 20,
    "distillation.save_steps": 5,
    "spiking.optimisation.steps": 20,
    "spiking.optimisation.save_steps": 5,
}


@pytest.fixture(scope="module")
def modules(repository: Path) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, by their names."""
    names = ("fault_runs", "fault_kinds", "faults", "robustness_tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.fixture
def runs(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["fault_runs"]


@pytest.fixture
def kinds(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["fault_kinds"]


def record(**values: Any) -> dict[str, Any]:
    """Of an injection after which all is well."""
    told = {"message": "error: no", "message_s": 2.0, "traceback": False}
    well = {"stage": "student", "variant": "cut", "status": 2, "told": told, "problems": [], "too_late": 0}
    return well | {"ended": True, "again_s": [3.0, 4.0], "different": []} | values


def test_what_is_lost_wrong_or_not_said_is_counted(runs: ModuleType) -> None:
    silent = {"message": None, "message_s": None, "traceback": False}
    records = [
        record(),
        record(told={"message": "error: no", "message_s": 9.0, "traceback": False}, stage="start", too_late=2),
        record(ended=False, again_s=[1.0] * 5),
        record(different=["models.student"], told=silent, problems=["no line names the damaged file"], status=0),
    ]
    assert [runs.verdict(each) for each in records] == ["right", "right", "lost", "wrong"]
    found = runs.summary(records)
    counted = {
        name: found[name] for name in ("injected", "ended", "lost", "wrong", "told", "with_problems", "too_late")
    }
    assert counted == {
        "injected": 4, "ended": 3, "lost": 1, "wrong": 1, "told": 3, "with_problems": 1, "too_late": 2,
    }  # fmt: skip
    assert found["stages"] == {"start": 1, "student": 3} and found["exit_statuses"] == {"0": 1, "2": 3}
    assert found["message_s"] == {"median": 2.0, "longest": 9.0} and found["again_s"] == 7.0


def test_every_bit_of_a_result_is_compared(runs: ModuleType) -> None:
    wanted = {"models": {"stage1": "a", "student": "b"}, "figures": {"teacher": {"ce": 1.0, "kl": 0.0}}}
    assert runs.differences(json.loads(json.dumps(wanted)), wanted) == []
    other = {"models": {"stage1": "a", "student": "c"}, "figures": {"teacher": {"ce": 1.0 + 1e-15}}}
    assert runs.differences(other, wanted) == ["figures.teacher.ce", "figures.teacher.kl", "models.student"]


@pytest.mark.parametrize("seed", range(6))
def test_damage_is_a_shorter_file_or_one_other_byte(kinds: ModuleType, seed: int, tmp_path: Path) -> None:
    path, content = tmp_path / "file", os.urandom(50)
    path.write_bytes(content)
    kind, damaged = kinds.damage(path, random.Random(seed)), path.read_bytes()
    if kind == "truncated":
        assert len(damaged) < 50 and content.startswith(damaged)
    else:
        assert sum(one != other for one, other in zip(damaged, content, strict=True)) == 1


def test_only_what_counts_as_whole_is_damaged(kinds: ModuleType, runs: ModuleType, tmp_path: Path) -> None:
    assert runs.stage_of(tmp_path) == "start"
    (tmp_path / "run.json").write_text("{}")
    assert runs.stage_of(tmp_path) == "data"
    for name in ("orientation", "training/alignment/checkpoint-5", "training/alignment/checkpoint-10"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "training/alignment/checkpoint-15").mkdir()
    assert runs.stage_of(tmp_path) == "alignment"
    whole = [tmp_path / "orientation", tmp_path / "training/alignment/checkpoint-10"]
    assert kinds.whole_directories(tmp_path) == whole


def test_messages_have_their_time_and_no_place(runs: ModuleType, kinds: ModuleType, tmp_path: Path) -> None:
    bar = r" 47%|###  | 94/200 [00:05<00:05, 19.93it/s]\r 48%|###  | 95/200 [00:05<00:05, 19.93it/s, loss=0.1]"
    script = f"import sys, time; sys.stderr.write('{bar}error: in {tmp_path}/run'); sys.stderr.flush(); time.sleep(0.5)"
    with runs.started([sys.executable, "-c", script + "; sys.exit('error: again')"]) as run:
        assert run.wait(20) == 1
    found = runs.told([run], "error: ", run.started, tmp_path / "run")
    assert found["message"] == "error: in RUNerror: again" and 0 < found["message_s"] < 20 and not found["traceback"]
    assert kinds.stopped_with_one_line(run, 1, 0) == []
    assert kinds.stopped_with_one_line(run, None, time.time()) == ["exit status None", "0 lines of error"]
    with runs.started([sys.executable, "-c", "1 / 0"]) as run:
        assert kinds.stopped_with_one_line(run, run.wait(20), 0) == ["0 lines of error", "a traceback"]
    with runs.started([sys.executable, "-c", "import time; time.sleep(60)"]) as run:
        assert run.wait(0.2) is None and run.process.poll() is not None


def test_only_what_a_message_names_is_deleted(runs: ModuleType, tmp_path: Path) -> None:
    for name in ("run/stage1", "run/student", "other"):
        (tmp_path / name).mkdir(parents=True)
    script = "import pathlib, sys; place = next(p for p in map(pathlib.Path, sys.argv[1:]) if p.exists()); "
    script += "sys.exit(f'error: damaged; delete {place} to run it again')"
    command = [sys.executable, "-c", script, str(tmp_path / "run/stage1"), str(tmp_path / "other")]
    done = runs.repeat(command, tmp_path / "run", most=3)
    assert not done.ended and done.statuses == [1, 1, 1] and done.deleted == ["stage1"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "run", "student"]


def test_the_table_shows_what_was_counted(
    modules: dict[str, ModuleType], runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, records = modules["robustness_tables"], [record(), record(ended=False), record(different=["models.stage1"])]
    versions = {
        "python": "3",
        "torch": "2",
        "transformers": "5",
        "spikingjelly": "2",
        "machine": {"cpu": "C", "cores": 2},
    }
    result = {"command": "x", "seconds": 60, "versions": versions, "patience_s": 10, "collective_timeout_s": 30}
    result |= {"references": {"one": {"seconds": 15.2}}, "summary": {"shard": runs.summary(records)}}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.faults() == "Not measured yet."
    (tmp_path / "faults.json").touch()
    monkeypatch.setattr(tables, "read", lambda name: result)
    row = tables.faults().splitlines()[2].split(" | ")
    assert row[1:] == ["3", "student 3", "2: 3", "3", "2.0", "2.0", "7", "2", "1", "1 |"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_comes_to_its_end_and_a_changed_student_is_seen(
    modules: dict[str, ModuleType], runs: ModuleType, kinds: ModuleType, tmp_path: Path
) -> None:
    bench = runs.Bench(tmp_path / "bench", runs.FIELDS | SMALL)
    bench.prepare()
    nothing: dict[str, Any] = {"models": {}, "figures": {}, "training": {}}
    references = {"one": {"seconds": 20.0, "result": nothing}}
    for share in (0.4, 0.2, 0.1):  # earlier where the run has ended by then
        place = bench.directory / f"run-{share}"
        found = kinds.kill(bench, place, FixedShare(share), references)
        if found is not None:
            break
    assert found is not None and found["statuses"] == [0] and runs.verdict(found) == "wrong", found
    result = runs.result_of(place)
    assert kinds.outcome(runs.Repeated([0]), place, result)["different"] == []
    student = place / "student" / "model.safetensors"
    content = bytearray(student.read_bytes())
    content[-1] ^= 1
    student.write_bytes(content)
    done = runs.Repeated([0])
    assert kinds.outcome(done, place, result)["different"] == ["models.student"]


class FixedShare(random.Random):
    """Draws always the same share of a range."""

    def __init__(self, share: float) -> None:
        super().__init__(0)
        self.share = share

    def uniform(self, a: float, b: float) -> float:
        return a + self.share * (b - a)
