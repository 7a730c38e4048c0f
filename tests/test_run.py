"""Output directories that hold whole things only, and the one-line errors of the examples."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spikelm
from spikelm import files
from spikelm.errors import SpikelmError
from spikelm.files import require_free_space, write_json
from spikelm.run import RunDirectory, command_line, first_difference, stage_manifest, versions

CONFIG: dict[str, Any] = {"seed": 0, "output_dir": "a", "stage2": {"alpha": 0.2, "taps": ["pre"]}}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory(tmp_path / "run", CONFIG) as opened:
        yield opened


def write_weights(directory: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "inner" / "weights.bin").write_bytes(b"12345")
    (directory / "config.json").write_text("{}")


def test_a_stage_is_absent_and_then_whole(run: RunDirectory) -> None:
    assert not run.resumed
    assert not run.is_done("stage1")
    assert run.finish_stage("stage1", write_weights, {"wall_s": 1.5}) == run.path("stage1")
    assert run.is_done("stage1")
    assert run.stage_record("stage1") == {"wall_s": 1.5}
    assert (run.path("stage1") / "inner" / "weights.bin").read_bytes() == b"12345"
    with pytest.raises(SpikelmError, match="not overwritten"):
        run.finish_stage("stage1", write_weights, {})


def test_the_same_configuration_resumes(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.finish_stage("stage1", write_weights, {})
        run.write_json("metrics.json", {"ce": 1.0})
        (run.root / "stage2.partial").mkdir()
        (run.root / "stage2.partial" / "half").write_text("x")
    (tmp_path / "run").rename(tmp_path / "moved")
    with RunDirectory(tmp_path / "moved", CONFIG | {"output_dir": "elsewhere"}) as run:
        assert run.resumed
        assert run.is_done("stage1")
        assert not run.path("stage2.partial").exists()
        assert run.read_json("metrics.json") == {"ce": 1.0}


def test_how_processes_share_a_run_and_new_fields_at_null_are_no_difference(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"seed": 0, "source": {"seed": 1}}).close()
    later = {"seed": 0, "parallel": {"student": "sharded"}, "source": {"seed": 1, "parallel": {}}, "store": None}
    with RunDirectory(tmp_path, later) as run:
        assert run.resumed
    with pytest.raises(SpikelmError, match="store is new"):
        RunDirectory(tmp_path, later | {"store": "there"})


def test_tuples_are_compared_as_json_keeps_them(tmp_path: Path) -> None:
    config = {"betas": (0.9, 0.95)}
    RunDirectory(tmp_path, config).close()
    with RunDirectory(tmp_path, config) as run:
        assert run.resumed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed=0 there, seed=1 asked"),
        ({"stage2": {"alpha": 0.5, "taps": ["pre"]}}, r"stage2.alpha=0.2 there, stage2.alpha=0.5 asked"),
        ({"stage2": {"alpha": 0.2, "taps": ["post"]}}, r'stage2.taps=\["pre"\] there'),
        ({"new": 1}, "new is new"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    RunDirectory(tmp_path / "run", CONFIG).close()
    with pytest.raises(SpikelmError, match=f"already holds another run .{message}"):
        RunDirectory(tmp_path / "run", CONFIG | change)
    RunDirectory(tmp_path / "run", CONFIG).close()  # the refusal freed the lock


def test_unrelated_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SpikelmError, match=r"no run's \(thesis.txt\)"):
        RunDirectory(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_places_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(SpikelmError, match="cannot be used"):
            RunDirectory(tmp_path / place, CONFIG)


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config"')
    with pytest.raises(SpikelmError, match="run.json is damaged"):
        RunDirectory(tmp_path, CONFIG)


def test_a_start_that_died_early_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / "run.json.partial").write_text("{")
    with RunDirectory(tmp_path, CONFIG) as run:
        assert not run.resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.lock"]


def test_two_processes_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time; from spikelm.run import RunDirectory\n"
        "run = RunDirectory(sys.argv[1], {}); print('open', flush=True); time.sleep(100)"
    )
    repository = Path(spikelm.__file__).parents[1]
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=repository
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(SpikelmError, match="in use by another process"):
            RunDirectory(tmp_path, {})
        other.send_signal(signal.SIGKILL)
        other.wait()
    RunDirectory(tmp_path, {}).close()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpikelmError, match="WORLD_SIZE=2"):
        RunDirectory(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


def change(path: Path, before: str, after: str, whole: bool = False, directory: bool = False) -> None:
    """Put other text into a file, or a directory in its place."""
    text = path.read_text()
    assert before in text
    if directory:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(after if whole else text.replace(before, after))


def test_the_contents_of_a_stage_are_read_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.finish_stage("stage1", write_weights, {})
    config = json.loads((run.root / "run.json").read_text())["config"]
    run.close()
    read: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda path, digest=files.sha256: read.append(path) or digest(path))
    with RunDirectory(run.root, config) as again:
        assert again.is_done("stage1") and again.is_done("stage1") and again.stage_record("stage1") == {}
    assert len(read) == len(set(read)) > 0


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    made.mkdir()
    write_weights(made)
    files.put_in_place(made, tmp_path / "stage", record={})

    def bad_sector(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sha256", bad_sector)
    with pytest.raises(SpikelmError, match=r"cannot be read \(Input/output error\); delete"):
        stage_manifest(tmp_path / "stage")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stage: (stage / "inner" / "weights.bin").unlink(), "inner/weights.bin is missing"),
        (lambda stage: (stage / "inner" / "weights.bin").write_bytes(b"12"), "has 2 bytes, 5 were written"),
        (lambda stage: (stage / "inner" / "weights.bin").write_bytes(b"12354"), "weights.bin is not what was written"),
        (lambda stage: (stage / "manifest.json").unlink(), "manifest.json is missing"),
        (
            lambda stage: change(stage / "manifest.json", '"ce": 1.25', '"ce": 7.25'),
            "manifest.json is not what was written",
        ),
        (lambda stage: change(stage / "manifest.json", "{", '{"files": {"a": 5}}', whole=True), "kept no SHA-256"),
        (lambda stage: change(stage / "manifest.json", "", "", directory=True), "manifest.json cannot be read"),
        (lambda stage: (stage / "manifest.json").write_text('{"files": {'), "manifest.json is not readable"),
        (lambda stage: (stage / "manifest.json").write_text("[1]"), "manifest.json is not readable"),
    ],
)
def test_a_damaged_stage_is_an_error(run: RunDirectory, damage: Any, message: str) -> None:
    run.finish_stage("stage1", write_weights, {"ce": 1.25})
    config = json.loads((run.root / "run.json").read_text())["config"]
    run.close()
    damage(run.path("stage1"))
    with (
        RunDirectory(run.root, config) as again,
        pytest.raises(SpikelmError, match=f"stage 'stage1' is damaged: .*{message}.*delete"),
    ):
        again.is_done("stage1")


def test_how_a_run_is_carried_out_may_change(tmp_path: Path) -> None:
    def config(bad: int = 10, **changed: int) -> dict[str, Any]:
        student = {"steps": 3, "keep_checkpoints": 2, "max_skipped_updates": 3} | changed
        return {"max_bad_documents": bad, "student": student}

    RunDirectory(tmp_path, config()).close()
    RunDirectory(tmp_path, config(keep_checkpoints=5, max_skipped_updates=0, bad=0)).close()
    with pytest.raises(SpikelmError, match="student.steps=3 there, student.steps=4 asked"):
        RunDirectory(tmp_path, config(steps=4))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failing_write_leaves_nothing(run: RunDirectory, error: BaseException) -> None:
    def write(directory: Path) -> None:
        write_weights(directory)
        raise error

    with pytest.raises(type(error)):
        run.finish_stage("stage1", write, {})
    assert not run.is_done("stage1")
    assert sorted(path.name for path in run.root.iterdir()) == ["run.json", "run.lock"]
    run.finish_stage("stage1", write_weights, {})


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"ce": 1.25})
    with pytest.raises(SpikelmError, match="metrics.json cannot be written: .*NaN"):
        write_json(path, {"ce": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"ce": object()})

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"ce": 2.0})
    assert json.loads(path.read_text()) == {"ce": 1.25}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_missing_json_is_named(run: RunDirectory) -> None:
    with pytest.raises(SpikelmError, match="metrics.json is missing or damaged"):
        run.read_json("metrics.json")


def test_first_difference() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": 1, "b": 2}, {"b": 2}) == "a is not known any more"
    assert first_difference({"a": None}, {"a": {"b": 1}}) == 'a=null there, a={"b": 1} asked'


def test_free_space(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(SpikelmError, match=r"not enough disk space .*1000000000000.0 MB needed, \d+\.\d MB free"):
        require_free_space(tmp_path / "not" / "there", 10**18)
    assert not (tmp_path / "not").exists()


def failing_torch_save() -> None:
    torch.save({"weights": torch.zeros(100_000)}, "/dev/full")


def raising(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "message"),
    [
        (lambda: None, 0, ""),
        (
            raising(SpikelmError("tau=0: a positive number\nis accepted")),
            2,
            "error: tau=0: a positive number is accepted",
        ),
        (raising(KeyboardInterrupt()), 130, "interrupted: run the same command again to resume"),
        (raising(OSError(errno.ENOSPC, "x")), 1, "error: no space left on the disk"),
        (raising(RuntimeError("I/O error: No space left on device (os error 28)")), 1, "error: no space left"),
        pytest.param(
            failing_torch_save,
            1,
            "error: no space left on the disk",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full"),
        ),
    ],
)
def test_command_line_says_one_line(main: Any, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line(main)
    assert stopped.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert shown.count("\n") == (1 if message else 0)


def test_command_line_keeps_unexpected_errors() -> None:
    with pytest.raises(ZeroDivisionError):
        command_line(raising(ZeroDivisionError()))


def test_versions_are_json() -> None:
    found = json.loads(json.dumps(versions()))
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["spikelm"] == spikelm.__version__
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["cpu"]


@pytest.mark.parametrize("config", [[1], "text", 3, None])
def test_a_configuration_that_is_none_is_another_run(tmp_path: Path, config: object) -> None:
    with RunDirectory(tmp_path / "run", {"seed": 1}) as run:
        run.write_json("made.json", 1)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(SpikelmError, match="already holds another run"):
        RunDirectory(tmp_path / "run", {"seed": 1})
