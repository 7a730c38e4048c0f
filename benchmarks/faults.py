"""Faults at random moments of examples/mar/train.py: is a run lost, is a result silently wrong, what is said and when.

    python benchmarks/faults.py --output benchmarks/results/faults.json
    python benchmarks/faults.py --faults kill,disk --injections 2 --output faults.json

kill: SIGKILL. shard: SIGKILL, and a file of a stage, a checkpoint or the packed contexts is cut off or has a byte
changed. disk: the file system (a tmpfs, which root alone can mount) is full. nan: the loss is NaN, once or from a step
on. rank: one of two processes is killed or stopped. After each of them the same command is given again until it comes
to its end, at most five times; its models and figures are compared, bit for bit, with those of undisturbed runs.

The file is written after every injection; --continue keeps what it holds and does the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from fault_kinds import FAULTS, Record, References, can_mount
from fault_runs import (
    COLLECTIVE_TIMEOUT_S,
    FIELDS,
    PATIENCE_S,
    ROOT,
    Bench,
    differences,
    ranks_of,
    result_of,
    started,
    started_ranks,
    summary,
    verdict,
)
from tqdm import tqdm


def reference_of_one(bench: Bench, workers: int) -> Record:
    """As many uninterrupted runs at once as there will be: their time, and their result, which must be one."""

    def one(number: int) -> tuple[float, float, Any]:
        place = bench.directory / f"one-{number}"
        with started(bench.command(place)) as run:
            if run.wait() != 0:
                raise SystemExit(f"an uninterrupted run failed: {run.tail()}")
        training = run.first("^orientation: training")
        assert training is not None
        result = result_of(place)
        shutil.rmtree(place)
        return run.ended - run.started, training[0] - run.started, result

    with ThreadPoolExecutor(max(2, workers)) as pool:
        found = list(pool.map(one, range(max(2, workers))))
    require_equal([result for _, _, result in found], "runs of one process")
    return {
        "runs": len(found),
        "seconds": mean(seconds for seconds, _, _ in found),
        "training_from_s": mean(seconds for _, seconds, _ in found),
        "result": found[0][2],
    }


def reference_of_two(bench: Bench) -> tuple[Record, Path]:
    """An uninterrupted run of two processes by torchrun and one without an agent; and where one's contexts lie."""
    found = []
    for agent in (True, False):
        place = bench.directory / f"two-{agent}"
        with started_ranks(bench, place, agent) as runs:
            while len(ranks_of(place)) < 2 and runs[0].process.poll() is None:
                time.sleep(0.02)
            both = time.time()
            if any(run.wait() != 0 for run in runs):
                raise SystemExit(f"an uninterrupted run of two processes failed: {runs[0].tail()}")
        found.append((runs[0].ended - both, result_of(place)))
    require_equal([result for _, result in found], "runs of two processes")
    packed = bench.directory / "packed"
    packed.mkdir()
    shutil.copy(place / "run.json", packed)
    shutil.copytree(place / "contexts", packed / "contexts")
    return {"runs": 2, "ranks_seconds": mean(seconds for seconds, _ in found), "result": found[0][1]}, packed


def require_equal(results: list[Any], what: str) -> None:
    """Bit for bit, or nothing can be compared with them."""
    different = [place for result in results[1:] for place in differences(result, results[0])]
    if different:
        raise SystemExit(f"uninterrupted {what} differ: {', '.join(different[:5])}")


def inject(bench: Bench, fault: str, number: int, seed: int, references: References) -> Record:
    """One injection; where a moment comes too late to strike anything, another one is drawn."""
    for draw in count():
        choose = random.Random(f"{seed} {fault} {number} {draw}")
        place = bench.directory / f"{fault}-{number}-{draw}"
        record = FAULTS[fault](bench, place, choose, references)
        if record is not None:
            record = {"fault": fault, "number": number, "too_late": draw, **record}
        if record is None or verdict(record) == "right" and not record["problems"]:
            for leftover in bench.directory.glob(f"{fault}-{number}-{draw}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        else:
            print(f"\n{fault} {number}: {verdict(record)}, {record['problems']}, kept in {place}", file=sys.stderr)
        if record is not None:
            return record
    raise AssertionError


class Results:
    """The result file, written after every injection."""

    def __init__(self, path: Path, head: Record, kept: list[Record]) -> None:
        self.path, self.head, self.records = path, head, kept
        self.start = time.perf_counter()
        self.lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Writes the file with one more."""
        from spikelm.files import write_json

        with self.lock:
            self.records.append(record)
            self.records.sort(key=lambda each: (list(FAULTS).index(each["fault"]), each["number"]))
            seconds = self.head.get("seconds_before", 0.0) + time.perf_counter() - self.start
            done = {fault: [each for each in self.records if each["fault"] == fault] for fault in FAULTS}
            summaries = {fault: summary(records) for fault, records in done.items() if records}
            write_json(self.path, self.head | {"seconds": seconds, "summary": summaries, "injections": self.records})


def run_all(bench: Bench, given: argparse.Namespace, results: Results, references: References) -> None:
    """Every injection that is not there yet; of two processes half as many at once."""
    done = {(record["fault"], record["number"]) for record in results.records}
    with tqdm(total=len(given.faults) * given.injections, initial=len(done), file=sys.stderr) as progress:
        for fault in given.faults:
            progress.set_description(fault)
            left = [number for number in range(given.injections) if (fault, number) not in done]
            workers = max(1, given.workers // 2) if fault == "rank" else given.workers
            for record in side_by_side(workers, bench, fault, left, given.seed, references):
                results.add(record)
                progress.update()


def side_by_side(
    workers: int, bench: Bench, fault: str, numbers: list[int], seed: int, references: References
) -> Iterator[Record]:
    """inject() of every number, in the order in which they end."""
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(inject, bench, fault, number, seed, references) for number in numbers]
        for future in as_completed(waiting):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(FAULTS), help="separated by commas")
    parser.add_argument("--injections", type=int, default=20, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--work", type=Path, help="where the runs lie (a directory of the system's)")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the injections of the output file")
    given = parser.parse_args()
    if unknown := [name for name in given.faults if name not in FAULTS]:
        parser.error(f"unknown faults {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    return given


def main() -> int:
    """0 where no run is lost and no result is wrong."""
    from spikelm.run import versions

    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    before = json.loads(given.output.read_text(encoding="utf-8")) if given.go_on and given.output.exists() else {}
    if before and before["seed"] != given.seed:
        raise SystemExit(f"{given.output} is of seed {before['seed']}")
    with tempfile.TemporaryDirectory(prefix="faults-", dir=given.work) as work:
        bench = Bench(Path(work))
        if "disk" in given.faults and (reason := can_mount(bench)):
            print(f"disk is left out: {reason}", file=sys.stderr)
            given.faults.remove("disk")
        bench.prepare()
        references: References = {"one": reference_of_one(bench, given.workers)}
        if {"rank", "shard"} & set(given.faults):
            references["two"], references["packed"] = reference_of_two(bench)
        known = {
            name: {key: value for key, value in each.items() if key != "result"}
            for name, each in references.items()
            if name != "packed"
        }
        head = {"command": shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]), "versions": versions()}
        head |= {
            "seed": given.seed,
            "fields": FIELDS,
            "references": known,
            "seconds_before": before.get("seconds", 0.0),
        }
        head |= {"patience_s": PATIENCE_S, "collective_timeout_s": COLLECTIVE_TIMEOUT_S}
        results = Results(given.output, head, before.get("injections", []))
        run_all(bench, given, results, references)
    verdicts = [verdict(record) for record in results.records]
    print(", ".join(f"{name} {verdicts.count(name)}" for name in ("right", "lost", "wrong")))
    return int(verdicts.count("right") < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
