"""The faults of benchmarks/faults.py: each is put into one run, which is then given again and compared.

A fault is a function (bench, place, choose, references) -> a record, or None where it came too late to strike anything.
`place` is a directory that is not there yet. A record holds "stage" (where it struck), "variant", "status" (of the run
that speaks), "told" (its message, seconds to it), "problems" (what the program should have said or done, and did not),
"statuses" and "again_s" (of the runs after the fault), "ended", "different" (names of figures and models that are not
the reference's).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_runs import (
    STAGES,
    Bench,
    Repeated,
    Run,
    differences,
    ranks_of,
    repeat,
    repeat_ranks,
    result_of,
    skipped_updates,
    stage_of,
    started,
    started_ranks,
    told,
)

Record = dict[str, Any]
References = dict[str, Any]
DISK_BYTES = 64 << 20
OTHERS_LIMIT_S = 90.0  # in which the others of a lost rank must have ended
STEPS = {"orientation": "orientation", "alignment": "alignment", "stage1": "distillation"}  # stage: field
MOST_SKIPPED = 3  # max_skipped_updates of the run
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def outcome(
    done: Repeated, place: Path, wanted: Any, parts: tuple[str, ...] = ("models", "figures", "training")
) -> Record:
    """How the runs after the fault ended, and in what their result differs from the wanted one."""
    different = []
    if done.ended:
        found = result_of(place)
        different = [each for part in parts for each in differences(found[part], wanted[part], part)]
    return {
        "statuses": done.statuses,
        "again_s": done.seconds,
        "ended": done.ended,
        "deleted": done.deleted,
        "different": different,
        "last_words": None if done.ended else done.runs[-1].tail(),
    }


def kill(bench: Bench, place: Path, choose: random.Random, references: References) -> Record | None:
    """SIGKILL at a random moment: nothing can be said; the same command goes on."""
    command = bench.command(place)
    with started(command) as run:
        if run.ends_before(choose.uniform(0, references["one"]["seconds"])):
            return None
        stage = stage_of(place)
    record: Record = {"variant": "SIGKILL", "stage": stage, "status": None, "told": None, "problems": []}
    return record | outcome(repeat(command, place), place, references["one"]["result"])


# ---- a damaged file


def shard(bench: Bench, place: Path, choose: random.Random, references: References) -> Record | None:
    """SIGKILL once something is trained, and a file of a stage, checkpoint or the packed contexts is damaged."""
    shutil.copytree(references["packed"], place)
    command, one = bench.command(place), references["one"]
    with started(command) as run:
        if run.ends_before(choose.uniform(one["training_from_s"], one["seconds"])):
            return None
        stage = stage_of(place)
    directory = choose.choice(whole_directories(place))
    path = choose.choice(damageable(directory))
    variant, done = damage(path, choose), repeat(command, place)
    first, pattern = done.runs[0], rf"(?=.*\b{directory.name}\b).*{re.escape(path.name)}"
    said = told(done.runs[:1], pattern, first.started, place)
    problems = [] if said["message"] else ["no line names the damaged file"]
    problems += ["a traceback"] if said["traceback"] else []
    record: Record = {"variant": variant, "stage": stage, "told": said, "problems": problems}
    record |= {"status": done.statuses[0], "file": path.relative_to(place).as_posix()}
    return record | outcome(done, place, one["result"])


def whole_directories(output_dir: Path) -> list[Path]:
    """Packed contexts, finished stages, and the newest checkpoint of the training that goes on."""
    found = [output_dir / name for name in ("contexts", *STAGES) if (output_dir / name).exists()]
    training = output_dir / "training" / stage_of(output_dir)
    numbered = {int(match[1]): path for path in training.glob("*") if (match := CHECKPOINT.fullmatch(path.name))}
    whole = [numbered[step] for step in sorted(numbered) if (numbered[step] / "manifest.json").exists()]
    return found + whole[-1:]


def damageable(directory: Path) -> list[Path]:
    """Every file of a directory that holds something."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def damage(path: Path, choose: random.Random) -> str:
    """Cuts a file at a random length, or changes one byte of it."""
    size = path.stat().st_size
    if choose.random() < 0.5:
        os.truncate(path, choose.randrange(size))
        return "truncated"
    with path.open("r+b") as stream:
        place = choose.randrange(size)
        stream.seek(place)
        before = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([before ^ choose.randrange(1, 256)]))
    return "one byte changed"


# ---- a full disk


def disk(bench: Bench, place: Path, choose: random.Random, references: References) -> Record | None:
    """The disk of the run fills up but for 0 to 64 kB, at a random moment; later there is space again."""
    with small_disk(place):
        output_dir, ballast = place / "run", place / "ballast"
        command = bench.command(output_dir)
        with started(command) as run:
            if run.ends_before(choose.uniform(0, references["one"]["seconds"])):
                return None
            stage, since = stage_of(output_dir), time.time()
            fill(ballast, choose.randrange(1 << 16))
            status = run.wait()
        ballast.unlink()
        if status == 0 and not differences(result_of(output_dir), references["one"]["result"]):
            return None  # what was left to write had room
        said = told([run], r"^error: ", since, output_dir)
        record: Record = {"variant": "full disk", "stage": stage, "told": said, "status": status}
        record["problems"] = stopped_with_one_line(run, status, since)
        return record | outcome(repeat(command, output_dir), output_dir, references["one"]["result"])


def stopped_with_one_line(run: Run, status: int | None, since: float) -> list[str]:
    """What is wrong with how a run stopped: exit status 1 or 2, one line, no traceback."""
    lines = [line for when, line in run.lines if when >= since and "error: " in line]
    problems = [] if status in (1, 2) else [f"exit status {status}"]
    problems += [] if len(lines) == 1 else [f"{len(lines)} lines of error"]
    return problems + (["a traceback"] if run.first(r"^Traceback", since) else [])


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A tmpfs of 64 MB; unmounted at the end."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)], check=True)
    try:
        yield
    finally:
        if subprocess.run(["umount", str(place)], check=False).returncode:
            subprocess.run(["umount", "-l", str(place)], check=False)


def can_mount(bench: Bench) -> str | None:
    """Why no tmpfs can be mounted here, or None."""
    place = bench.directory / "mount"
    try:
        with small_disk(place):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a tmpfs cannot be mounted: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def fill(ballast: Path, rest: int) -> None:
    """Fills the disk but for `rest` bytes."""
    with ballast.open("wb") as stream:
        while (more := shutil.disk_usage(ballast.parent).free - rest) > 0:
            try:
                os.posix_fallocate(stream.fileno(), stream.seek(0, os.SEEK_END), more)
            except OSError:  # the run has written in between
                continue
            if more < 4096:
                break


# ---- a NaN


def nan(bench: Bench, place: Path, choose: random.Random, references: References) -> Record | None:
    """The loss of one random step is NaN, or that of all from it on."""
    stage = choose.choice(STAGES)
    steps = int(bench.fields[f"{STEPS.get(stage, 'spiking.optimisation')}.steps"])
    if choose.random() < 0.5:
        return one_nan(bench, place, (stage, 1 + choose.randrange(steps)), references)
    return only_nan(bench, place, (stage, 1 + choose.randrange(steps - MOST_SKIPPED)), references)


def planned(place: Path, how: str, stage: str, first: int, last: int | None) -> Path:
    """A plan for fault_child.py; what it records goes beside the run."""
    recorded = place.with_name(f"{place.name}-{how}")
    recorded.mkdir(exist_ok=True)
    plan = {"stage": stage, "first": first, "last": last, "how": how, "record": str(recorded)}
    (recorded / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return recorded / "plan.json"


def one_nan(bench: Bench, place: Path, where: tuple[str, int], references: References) -> Record:
    """That update is left out and said so; the rest is as if the optimizer had done nothing at it."""
    stage, step = where
    plan, control = planned(place, "nan", stage, step, step), place.with_name(f"{place.name}-control")
    done = repeat(bench.command(place, plan), place)
    said = told(done.runs, "is left out", struck_at(plan, step), place)
    problems = nan_problems(place, plan, stage, [step]) if done.ended else ["does not come to its end"]
    problems += [] if said["message"] else ["no warning"]
    repeat(bench.command(control, planned(place, "leave_out", stage, step, step)), control, most=1)
    record: Record = {"variant": "one NaN", "stage": stage, "step": step, "told": said, "problems": problems}
    record |= outcome(done, place, result_of(control), ("models", "figures"))
    record |= {"status": done.statuses[0], "again_s": []}
    shutil.rmtree(control)
    return record


def only_nan(bench: Bench, place: Path, where: tuple[str, int], references: References) -> Record:
    """It stops with one line; then, without the NaN, the run goes on from a checkpoint to the reference's result."""
    stage, step = where
    plan = planned(place, "nan", stage, step, None)
    with started(bench.command(place, plan)) as run:
        status = run.wait()
    since = struck_at(plan, step)
    said = told([run], r"^error: ", since, place)
    problems = stopped_with_one_line(run, status, since)
    for part in (f"step {step + MOST_SKIPPED}", f"step-{step + MOST_SKIPPED}.safetensors"):
        problems += [] if part in (said["message"] or "") else [f"{part} is not named"]
    named = re.search(r"checkpoint-(\d+)", said["message"] or "")
    kept = list(range(step, int(named[1]) + 1)) if named else []  # updates left out before the last checkpoint
    done = repeat(bench.command(place), place)
    wanted = references["one"]["result"]
    parts: tuple[str, ...] = ("models", "figures", "training")
    if kept:
        control = place.with_name(f"{place.name}-control")
        repeat(bench.command(control, planned(place, "leave_out", stage, step, kept[-1])), control, most=1)
        wanted, parts = result_of(control), ("models", "figures")
        shutil.rmtree(control)
    if done.ended and skipped_updates(place)[stage] != len(kept):
        problems.append(f"{skipped_updates(place)[stage]} skipped_updates in the record, {len(kept)} were left out")
    record: Record = {"variant": "NaN from there on", "stage": stage, "step": step, "told": said, "problems": problems}
    record |= {"status": status, "left_out_before_the_checkpoint": kept}
    return record | outcome(done, place, wanted, parts)


def struck_at(plan: Path, step: int) -> float:
    """When the loss became NaN."""
    recorded = plan.parent / f"step-{step}.safetensors"
    return recorded.stat().st_mtime if recorded.exists() else time.time()


def nan_problems(place: Path, plan: Path, stage: str, steps: list[int]) -> list[str]:
    """What is missing of an update that is left out: it is counted, its batch is kept, all that is logged is finite."""
    import torch
    from safetensors.torch import load_file

    problems = []
    counted = skipped_updates(place)[stage]
    if counted != len(steps):
        problems.append(f"{counted} skipped_updates in the record, {len(steps)} were left out")
    for step in steps:
        name = f"step-{step}.safetensors"
        saved = place / "training" / stage / "non_finite" / name
        seen = load_file(plan.parent / name)["input_ids"]
        if not saved.exists():
            problems.append(f"{name} is not kept")
        elif (kept := load_file(saved).get("micro_batch_0.input_ids")) is None or not torch.equal(kept, seen):
            problems.append(f"{name} holds another batch")
    log = (place / "training" / stage / "log.jsonl").read_text(encoding="utf-8")
    return problems + (["a log line is not finite"] if re.search(r"NaN|Infinity", log) else [])


# ---- a lost process


def rank(bench: Bench, place: Path, choose: random.Random, references: References) -> Record | None:
    """SIGKILL or SIGSTOP of one of two processes: the other ends by itself, and the two go on when started again."""
    agent, number = choose.random() < 0.5, choose.choice((0, 1))
    blow = choose.choice((signal.SIGKILL, signal.SIGSTOP))
    moment = choose.uniform(0, references["two"]["ranks_seconds"])
    with started_ranks(bench, place, agent) as runs:
        while len(ranks_of(place)) < 2 and runs[0].process.poll() is None:
            time.sleep(0.02)
        if runs[0].ends_before(time.time() - runs[0].started + moment):
            return None
        stage, target = stage_of(place), ranks_of(place).get(number)
        if target is None:
            return None
        since = time.time()
        target.send_signal(blow)
        others = runs if agent else [run for each, run in enumerate(runs) if each != number]
        statuses = [run.wait(OTHERS_LIMIT_S) for run in others]
    said = told(others, "error: .*(again to resume|start all)", since, place) | {"by": "spikelm"}
    if agent and said["message"] is None:
        said = told(others, r"Signal 9 \(SIGKILL\)", since, place) | {"by": "torchrun"}
    problems = [] if None not in statuses else [f"the other process is alive after {OTHERS_LIMIT_S:g} s"]
    problems += [] if said["message"] else [f"no message: {others[-1].tail()}"]
    problems += ["a traceback"] if said["traceback"] and not agent else []  # torchrun ends with one of its own
    launcher = "torchrun" if agent else "no agent"
    record: Record = {"variant": f"{blow.name} of rank {number}, {launcher}", "stage": stage, "told": said}
    ended_s = round(max(run.ended for run in others) - since, 3)
    record |= {"problems": problems, "status": statuses[0], "others_ended_s": ended_s}
    return record | outcome(repeat_ranks(bench, place, agent), place, references["two"]["result"])


FAULTS: dict[str, Callable[[Bench, Path, random.Random, References], Record | None]] = {
    "kill": kill,
    "shard": shard,
    "disk": disk,
    "nan": nan,
    "rank": rank,
}
