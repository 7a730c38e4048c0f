"""Several processes train what one trains: the same curve, the same checkpoints, every row once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler

from spikelm import distributed
from spikelm.distill.callbacks import read_metrics
from spikelm.distill.parallel import Parallel
from spikelm.distill.sharing import FILLER, Share, SharedBatches, SharedRows, SharedStream, shared_loader
from spikelm.distill.trainer import collate
from spikelm.distributed import share_of_update
from spikelm.errors import SpikelmError
from spikelm.experiment import Settings, packed_once
from spikelm.run import RunDirectory

SCRIPT = Path(__file__).with_name("shared_training.py")
NOT_COMPARED = ("wall_s", "tokens_per_second", "sentences_per_second")
IN_PARTS = {"student": "sharded", "teacher": "offloaded"}


def run(processes: int, output_dir: Path, script: Path = SCRIPT, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The script, by itself or under torchrun; its exit status and output."""
    arguments = [str(script), json.dumps({"output_dir": str(output_dir), **options})]
    if processes == 1:
        command = [sys.executable, "-W", "error", *arguments]
    else:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        # Port 0 lets the system choose: tests run beside one another.
        command = [sys.executable, *launch, "--rdzv-endpoint", "localhost:0", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


def curve(output_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(output_dir / "training" / "log.jsonl")
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def finished(processes: int, output_dir: Path, **options: Any) -> list[dict[str, float]]:
    done = run(processes, output_dir, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return curve(output_dir)


def assert_same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, one in zip(found, wanted, strict=True):
        assert line == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """50 steps of a spiking student in one process."""
    return finished(1, tmp_path_factory.mktemp("one"), student="spiking", steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, IN_PARTS], ids=["ddp", "fsdp"])
def test_two_processes_give_the_curve_of_one(
    one_process: list[dict[str, float]], tmp_path: Path, parallel: dict[str, str]
) -> None:
    # 30 rows in batches of 4: the last batch of a pass leaves a process without rows.
    assert_same(finished(2, tmp_path, student="spiking", steps=50, parallel=parallel), one_process)
    assert one_process[-1]["loss"] < 0.6 * one_process[0]["loss"]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(one_process: list[dict[str, float]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"student": "spiking", "steps": 50, "save_steps": 5}  # within a pass of 8 steps
    broken = run(2, tmp_path, **options, parallel=IN_PARTS, fail_at=[20, None])
    assert broken.returncode != 0 and "error: failed at step 20" in broken.stderr
    broken = run(1, tmp_path, **options, fail_at=[30, None])
    assert broken.returncode == 2 and len(curve(tmp_path)) == 29  # a step that fails is not logged
    assert_same(finished(2, tmp_path, **options), one_process)


SHORT: dict[str, dict[str, Any]] = {
    "spad": {"student": "spiking", "gradient_checkpointing": True},
    "activity": {"student": "spiking", "gradient_checkpointing": True},
    "orientation": {"student": "llamba", "trainable": ["*.mixer.*"]},
    "alignment": {"student": "llamba", "trainable": ["*.mixer.*"]},
    "internal": {"student": "bert"},
    "prediction": {"student": "bert"},
    "kl": {"streaming": True, "steps": 7, "gradient_accumulation": 3, "batch_size": 2},
}


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with each objective, by one process in one/ and by two in two/."""
    directory = tmp_path_factory.mktemp("short")
    for name, processes in (("one", 1), ("two", 2)):
        runs = {objective: {"steps": 10, "objective": objective} | options for objective, options in SHORT.items()}
        for options in runs.values() if processes == 2 else ():
            teacher = "replicated" if options.get("student") == "bert" else "sharded"
            options["parallel"] = {"student": "sharded", "teacher": teacher}
        done = run(processes, directory / name, runs=runs)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("objective", SHORT)
def test_what_is_called_beside_the_student_is_shared_too(short_runs: Path, objective: str) -> None:
    one, two = (without_gaps(curve(short_runs / directory / objective)) for directory in ("one", "two"))
    assert_same(two, one)


def without_gaps(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the diagnostics of an equilibrium: they are means over batches that are padded differently."""
    return [{name: value for name, value in line.items() if not name.startswith("rate_gap")} for line in lines]


@pytest.mark.slow
def test_what_one_process_finds_not_finite_all_leave_out_and_then_stop(tmp_path: Path) -> None:
    done = run(2, tmp_path, objective="nan", steps=10, parallel={"student": "sharded"}, max_skipped_updates=1)
    assert done.stderr.count("at step 5: this update is left out (1 of at most 1)") == 1
    assert done.returncode != 0
    said = [
        line for line in done.stderr.splitlines() if "the loss is nan at step 7, and 1 were left out before" in line
    ]
    assert len(said) == 2 and len({line.partition("likely cause: ")[2] for line in said}) == 1
    kept = sorted(path.name for path in (tmp_path / "training" / "non_finite").iterdir())
    assert kept == [f"step-{step}-rank{rank}.safetensors" for step in (5, 7) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_is_stopped_ends_the_others(tmp_path: Path, how: signal.Signals) -> None:
    processes = without_launcher(
        tmp_path,
        2,
        "from spikelm.run import command_line\n"
        "def main():\n"
        "    distributed.start()\n"
        "    assert distributed.on_first_rank(lambda: distributed.on_first_rank(lambda: [1])) == [1]\n"
        f"    if distributed.rank() == 1: os.kill(os.getpid(), {how.value})\n"
        "    torch.distributed.all_reduce(torch.zeros(1))\n"
        "    time.sleep(100)\n"
        "command_line(main)\n",
    )
    try:
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1 and "rank 1" in errors and "resume" in errors, errors
    finally:
        end(processes)


@pytest.mark.slow
def test_a_program_of_ones_own_may_end_earlier_on_some_ranks(tmp_path: Path) -> None:
    # Rank 1 has ended for longer than the patience while rank 0 works; rank 0 keeps the store, and rank 2 ends last.
    processes = without_launcher(
        tmp_path,
        3,
        "distributed.start()\n"
        "assert distributed.on_first_rank(lambda: (1, 2)) == [1, 2]\n"
        "time.sleep([4, 0, 6][distributed.rank()])\n"
        "print('done', distributed.rank(), file=sys.stderr)\n",
        patience=2,
    )
    try:
        for number, process in enumerate(processes):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0 and f"done {number}" in errors and "error" not in errors, errors
    finally:
        end(processes)


def without_launcher(directory: Path, count: int, program: str, patience: float = 4) -> "list[subprocess.Popen[str]]":
    """All ranks of a program."""
    script = directory / "program.py"
    script.write_text("import os, sys, time, torch\nfrom spikelm import distributed\n" + program)
    port = random.randint(20000, 29000)
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ
            | {"WORLD_SIZE": str(count), "RANK": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            | {"SPIKELM_RANK_PATIENCE": str(patience), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def end(processes: "list[subprocess.Popen[str]]") -> None:
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def store_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """This process is rank 0 of two; the store that the other would share."""
    from torch.distributed import HashStore

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    store = HashStore()
    monkeypatch.setattr(distributed._Watch, "current", distributed._Watch(store, 0.5))
    yield store


def test_every_rank_gets_what_json_makes_of_a_result(store_of_two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.on_first_rank(lambda: {"pair": (1, 2)}) == {"pair": [1, 2]}
    monkeypatch.setenv("RANK", "1")
    assert distributed._Watch.current is not None
    distributed._Watch.current.calls = 0
    assert distributed.on_first_rank(dict) == {"pair": [1, 2]}
    store_of_two.set("spikelm/done/0", "1")
    with pytest.raises(SpikelmError, match="rank 0 has ended while rank 1 waits"):
        distributed.on_first_rank(dict)


def test_the_first_stays_until_the_others_know_but_not_for_ever(store_of_two: Any) -> None:
    watch = distributed._Watch.current
    assert watch is not None
    store_of_two.set("spikelm/done/1", "1")
    started = time.monotonic()
    watch.part(wait=True)
    assert 0.5 <= time.monotonic() - started < 5  # its patience: the other was lost after it was done
    store_of_two.add("spikelm/known", 1)
    started = time.monotonic()
    watch.part(wait=True)
    assert time.monotonic() - started < 0.4


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number >= 1, given 'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number >= 1, given ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be .* given '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be .* given '-1'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE = 2, given 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "gpu"}, "LOCAL_RANK must be .* given 'gpu'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "SPIKELM_RANK_PATIENCE": "abc"}, "PATIENCE must be .* given 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "SPIKELM_COLLECTIVE_TIMEOUT": "nan"}, "TIMEOUT must be .* given 'nan'"),
    ],
    ids=str,
)
def test_variables_of_a_launcher_are_checked_first(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpikelmError, match=message):
        distributed.start()
    assert not torch.distributed.is_initialized() and distributed.is_first()  # which reports it


@pytest.mark.parametrize(("rows", "batch_size", "processes"), [(30, 2, 2), (29, 1, 8), (3, 4, 2), (16, 4, 4)])
def test_every_row_is_taken_once_in_the_order_of_one_process(rows: int, batch_size: int, processes: int) -> None:
    data = [{"input_ids": [number]} for number in range(rows)]

    def taken(batches: Iterable[Any]) -> list[list[int]]:
        return [[] if FILLER in batch else batch["input_ids"].flatten().tolist() for batch in batches]

    for sampler in (SequentialSampler(data), None):
        shares = [Share(batch_size, rank, processes) for rank in range(processes)]
        of_ranks = [taken(shared_loader(data, sampler, collate, share)) for share in shares]
        assert len({len(batches) for batches in of_ranks}) == 1  # in step
        whole = [sum(parts, []) for parts in zip(*of_ranks, strict=True)]
        size = batch_size * processes
        assert whole == [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]


def test_a_filler_is_marked() -> None:
    batches = list(SharedBatches(SequentialSampler(range(5)), Share(2, 1, 2)))
    assert batches == [[2, 3], [~4]]
    assert SharedRows([{"input_ids": [7]}])[~0] == {"input_ids": [7], FILLER: True}
    assert [FILLER in row for row in SharedStream([{"input_ids": [1]}], Share(2, 1, 2))] == [True]


def test_a_shared_stream_is_shuffled_anew_for_each_pass() -> None:
    rows = Dataset.from_dict({"input_ids": [[number] for number in range(32)]})

    def passes(share: Share | None) -> list[list[int]]:
        stream: Any = rows.to_iterable_dataset().shuffle(seed=0, buffer_size=32)
        found: Any = stream if share is None else SharedStream(stream, share)
        orders = []
        for epoch in range(2):
            found.set_epoch(epoch)
            orders.append([row["input_ids"][0] for row in found])
        return orders

    alone = passes(None)
    assert alone[0] != alone[1] and passes(Share(4, 0, 1)) == alone
    SharedStream([{"input_ids": [1]}], Share(2, 1, 2)).set_epoch(1)  # nothing to tell a list


def test_packed_contexts_serve_the_data_they_were_made_from_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "stories.txt"
    text.write_text("first")
    settings = Settings(output_dir=str(tmp_path / "run"), data=str(text))

    def read() -> Any:
        rows = Dataset.from_dict({"input_ids": [list(text.read_bytes())]})
        return rows, rows

    class Tokenizer:
        """A vocabulary."""

        def __init__(self, *tokens: str) -> None:
            self.tokens = tokens

        def get_vocab(self) -> dict[str, int]:
            """Numbers of tokens."""
            return {token: number for number, token in enumerate(self.tokens)}

    with RunDirectory(settings.output_dir, {}) as run:

        def packed(tokenizer: Any = Tokenizer("a", "b")) -> bytes:  # noqa: B008
            return bytes(packed_once(run, read, settings, tokenizer)[0]["input_ids"][0])

        assert packed() == b"first" and not run.is_done("contexts")  # one process keeps nothing
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        assert packed() == packed() == b"first" and run.is_done("contexts")
        with pytest.raises(SpikelmError, match="packed from other data .vocabulary="):
            packed(Tokenizer("b", "a"))
        text.write_text("other")
        with pytest.raises(SpikelmError, match="contexts was packed from other data .files"):
            packed()
        monkeypatch.delenv("WORLD_SIZE")
        with pytest.raises(SpikelmError, match="packed from other data"):
            packed()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "wanted"),
    [
        (16, 1, 2, (8, 1)),
        (4, 8, 8, (4, 1)),
        (4, 8, 2, (4, 4)),
        (1, 32, 8, (1, 4)),
        (6, 2, 4, (3, 1)),
        (3, 1, 1, (3, 1)),
    ],
)
def test_processes_share_an_update(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, accumulation: int, processes: int, wanted: tuple[int, int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found = share_of_update(batch_size, accumulation)
    assert found == wanted == share_of_update(float(batch_size), accumulation)  # type: ignore[arg-type]
    assert all(type(value) is int for value in share_of_update(float(batch_size), float(accumulation)))  # type: ignore[arg-type]
    assert found[0] <= batch_size and found[0] * found[1] * processes == batch_size * accumulation


def test_an_update_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SpikelmError, match="16 rows cannot be shared evenly by 3 processes"):
        share_of_update(16, 1)


def test_the_launcher_may_ask_for_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpikelmError, match="parallel.teacher must be replicated, sharded or offloaded, given 'halved'"):
        Parallel(teacher="halved")  # type: ignore[arg-type]
    assert Parallel().launched() == Parallel()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SPIKELM_LAUNCHED_FSDP", "true")
    with pytest.raises(SpikelmError, match="FSDP 1 is not supported"):
        Parallel().launched()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert Parallel().launched() == Parallel(student="sharded")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert Parallel().launched() == Parallel(student="offloaded")
    assert Parallel(student="sharded").launched() == Parallel(student="sharded")


def test_one_process_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.on_first_rank(lambda: torch) is torch  # any value: nothing is sent
    assert distributed.is_first() and distributed.lost_rank(RuntimeError("Connection closed by peer")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert distributed.rank() == 1 and not distributed.is_first()
