"""Runs of examples/mar/train.py that benchmarks/faults.py starts, watches and compares with an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from spikelm.files import sha256

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "mar" / "train.py"
CHILD = ROOT / "benchmarks" / "fault_child.py"
STAGES = ("orientation", "alignment", "stage1", "student")
PATIENCE_S = 10  # SPIKELM_RANK_PATIENCE
COLLECTIVE_TIMEOUT_S = 30  # SPIKELM_COLLECTIVE_TIMEOUT
LIMIT_S = 180.0  # a run of seconds that is not at its end by then hangs
MOST_RUNS = 5  # as often the same command is given before the run counts as lost
# Half of the time is training, a checkpoint every 0.2 s of it.
FIELDS = {
    "evaluation_contexts": 4,
    "sample_tokens": 4,
    "orientation.steps": 30,
    "orientation.save_steps": 5,
    "alignment.steps": 30,
    "alignment.save_steps": 5,
    "distillation.steps": 200,
    "distillation.save_steps": 10,
    "spiking.optimisation.steps": 200,
    "spiking.optimisation.save_steps": 10,
    "spiking.calibration_contexts": 8,
}
TIMES = ("wall_s", "total_s", "tokens_per_second", "skipped_updates")  # of a training's record, not compared


@dataclass(frozen=True)
class Bench:
    """The directory of all runs, and what they have in common: a trained teacher and a text."""

    directory: Path
    fields: dict[str, Any] = field(default_factory=lambda: dict(FIELDS))

    @property
    def teacher(self) -> Path:
        """A run of train.py without stages, which trains the embedded teacher alone."""
        return self.directory / "embedded" / "teacher"

    def prepare(self) -> None:
        """Trains the teacher and writes the text, once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = self.directory / "text.txt"
        if not text.exists():
            from spikelm.data import python_documentation

            text.write_text(python_documentation()[:200_000], encoding="utf-8")
        if not self.teacher.exists():
            place = self.teacher.parent
            command = [sys.executable, str(TRAIN), "--preset", "smoke", "stages=[]", f"output_dir={place}"]
            with started(command) as run:
                if run.wait() != 0:
                    raise SystemExit(f"the teacher's run failed: {run.tail()}")

    def command(self, output_dir: Path, plan: Path | None = None) -> list[str]:
        """train.py of one process; with `plan` under fault_child.py, which puts a fault into it."""
        script = [str(TRAIN)] if plan is None else [str(CHILD), str(plan), str(TRAIN)]
        values = self.fields | {"teacher": self.teacher, "data": self.directory / "text.txt", "output_dir": output_dir}
        return [sys.executable, *script, "--preset", "smoke", *(f"{name}={value}" for name, value in values.items())]

    def launched(self, output_dir: Path, agent: bool) -> list[tuple[list[str], dict[str, str]]]:
        """The commands and environments of two processes: of torchrun, or of each rank where no agent is to be."""
        python, *arguments = self.command(output_dir)
        own = {
            "SPIKELM_RANK_PATIENCE": str(PATIENCE_S),
            "SPIKELM_COLLECTIVE_TIMEOUT": str(COLLECTIVE_TIMEOUT_S),
        }
        if agent:
            launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
            return [([python, *launch, "--rdzv-endpoint", "localhost:0", *arguments], own)]
        own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        return [([python, *arguments], own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


class Run:
    """A process that was started, and the lines that it writes to stderr, each with the time at which it came."""

    def __init__(self, command: list[str], more: dict[str, str] | None = None) -> None:
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.started = time.time()
        self.process = subprocess.Popen(
            command,
            env=os.environ | own | (more or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest, errors = "", self.process.stderr
        assert errors is not None
        with errors:
            while content := os.read(errors.fileno(), 1 << 16):
                now = time.time()
                *whole, rest = re.split(r"[\r\n]+", rest + content.decode(errors="replace"))
                self.lines += [(now, line.strip()) for line in whole if line.strip()]
        if rest.strip():
            self.lines.append((time.time(), rest.strip()))

    def wait(self, limit: float = LIMIT_S) -> int | None:
        """The exit status once all is read; None where it does not end within `limit` seconds and is killed."""
        try:
            status: int | None = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            self.kill()
        self.ended = time.time()
        self._reader.join(5)
        return status

    def ends_before(self, seconds: float) -> bool:
        """Sleeps until `seconds` after the start; True at once where the process ends before."""
        try:
            self.process.wait(max(0.0, self.started + seconds - time.time()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def first(self, pattern: str, since: float = 0.0) -> tuple[float, str] | None:
        """The first line from the time `since` on in which a pattern is found."""
        return next(((when, line) for when, line in self.lines if when >= since and re.search(pattern, line)), None)

    def tail(self) -> str:
        """Its last lines."""
        return " / ".join(line for _, line in self.lines[-8:])


@contextmanager
def started(command: list[str], more: dict[str, str] | None = None) -> Iterator[Run]:
    """A run that is dead at the end of the context, however that comes."""
    run = Run(command, more)
    try:
        yield run
    finally:
        run.kill()
        run._reader.join(5)


@contextmanager
def started_ranks(bench: Bench, output_dir: Path, agent: bool) -> Iterator[list[Run]]:
    """Two processes on one run, by torchrun or by themselves; nothing of them is left, a stopped one neither."""
    runs: list[Run] = []
    try:
        for command, more in bench.launched(output_dir, agent):
            runs.append(Run(command, more))
        yield runs
    finally:
        for process in ranks_of(output_dir).values():
            process.kill()
        for run in runs:
            run.kill()
            run._reader.join(5)


def ranks_of(output_dir: Path) -> dict[int, psutil.Process]:
    """The living processes of a run that share it, by their rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if f"output_dir={output_dir}" in process.cmdline() and "RANK" in (environment := process.environ()):
                found[int(environment["RANK"])] = process
        except psutil.Error:  # it has ended, or is another user's
            continue
    return found


def stage_of(output_dir: Path) -> str:
    """Where a run is: start (nothing written), data, a stage, report, or end."""
    if not (output_dir / "run.json").exists():
        return "start"
    if (output_dir / "metrics.json").exists():
        return "end"
    if not (output_dir / "training").exists() and not (output_dir / STAGES[0]).exists():
        return "data"
    return next((name for name in STAGES if not (output_dir / name).exists()), "report")


def result_of(output_dir: Path) -> dict[str, Any]:
    """What a finished run has come to: the bits of its models, every figure, without times and places."""
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    training = {
        stage: {name: value for name, value in record.items() if name not in TIMES}
        for stage, record in metrics.pop("training").items()
    }
    for name in ("config", "versions", "wall_s"):
        metrics.pop(name)
    return {"models": models_of(output_dir), "figures": metrics, "training": training}


def models_of(output_dir: Path) -> dict[str, str]:
    """The SHA-256 of every stage's weights."""
    return {stage: sha256(output_dir / stage / "model.safetensors") for stage in STAGES}


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """The names of all values that are not the same, bit for bit."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        each = (differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key) for key in keys)
        return [place for places in each for place in places]
    return [] if json.dumps(found) == json.dumps(wanted) else [name]


def skipped_updates(output_dir: Path) -> dict[str, int]:
    """How many updates each stage's record says were left out."""
    training = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))["training"]
    return {stage: int(record.get("skipped_updates", 0)) for stage, record in training.items()}


def told(runs: Iterable[Run], pattern: str, since: float, output_dir: Path) -> dict[str, Any]:
    """The first message in stderr that fits, and the seconds to it; whether a traceback stands there too."""
    runs = list(runs)
    found = [line for line in (run.first(pattern, since) for run in runs) if line is not None]
    first = min(found, default=None)
    return {
        "message": None if first is None else without_places(first[1], output_dir)[:400],
        "message_s": None if first is None else round(first[0] - since, 3),
        "traceback": any(run.first(r"^(\[rank\d+\]: ?)?Traceback", since) for run in runs),
    }


def without_places(text: str, output_dir: Path) -> str:
    """A message without the place of the run on this machine, and without a progress bar that stands before it."""
    text = re.sub(r"^\d+%\|.*?\|.*?\]", "", text)
    return text.replace(str(output_dir), "RUN").replace(str(output_dir.parent), "BENCH")


@dataclass
class Repeated:
    """The same command, again and again until it comes to its end."""

    statuses: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether it did."""
        return self.statuses[-1] == 0


def repeat(command: list[str], output_dir: Path, most: int = MOST_RUNS) -> Repeated:
    """Gives a command until it comes to its end, at most `most` times; what a message says to delete is deleted."""
    done = Repeated()
    for _ in range(most):
        with started(command) as run:
            done.statuses.append(run.wait())
        done.runs.append(run)
        done.seconds.append(round(run.ended - run.started, 3))
        if done.ended:
            break
        advice = run.first(r"^error: .*; delete \S+ to run it again")
        if advice is not None:
            place = Path(re.findall(r"; delete (\S+) to run it again", advice[1])[-1])
            if output_dir in place.parents:
                done.deleted.append(place.relative_to(output_dir).as_posix())
                shutil.rmtree(place)
    return done


def repeat_ranks(bench: Bench, output_dir: Path, agent: bool, most: int = MOST_RUNS) -> Repeated:
    """repeat() of two processes; its status is the worst of theirs."""
    done = Repeated()
    for _ in range(most):
        with started_ranks(bench, output_dir, agent) as runs:
            statuses = [run.wait() for run in runs]
        done.statuses.append(None if None in statuses else max(map(abs, statuses)))  # type: ignore[arg-type]
        done.runs += runs
        done.seconds.append(round(max(run.ended for run in runs) - runs[0].started, 3))
        if done.ended:
            break
    return done


def verdict(record: dict[str, Any]) -> str:
    """lost: the command does not come to its end; wrong: it does, with another result; right."""
    if not record["ended"]:
        return "lost"
    return "wrong" if record["different"] else "right"


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the injections of one fault: where they struck, what was said and how soon, and what became of the runs."""
    verdicts = [verdict(record) for record in records]
    waits = [record["told"]["message_s"] for record in records if record["told"] and record["told"]["message"]]
    again = [sum(record["again_s"]) for record in records if record["again_s"]]
    return {
        "injected": len(records),
        "too_late": sum(record["too_late"] for record in records),
        "stages": counts(record["stage"] for record in records),
        "variants": counts(record["variant"] for record in records),
        "exit_statuses": counts(str(record["status"]) for record in records),
        "told": None if all(record["told"] is None for record in records) else len(waits),
        "with_problems": sum(bool(record["problems"]) for record in records),
        "message_s": {"median": median(waits), "longest": max(waits)} if waits else None,
        "again_s": median(again) if again else None,
        "ended": len(records) - verdicts.count("lost"),
        "lost": verdicts.count("lost"),
        "wrong": verdicts.count("wrong"),
    }


def counts(names: Iterable[str]) -> dict[str, int]:
    """How often each comes up."""
    return dict(sorted(Counter(names).items()))
