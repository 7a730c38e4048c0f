"""Several processes train what one trains: the same curve, the same checkpoints, every row once."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from spikelm.distill.callbacks import read_metrics
from spikelm.distill.parallel import Parallel
from spikelm.distill.sharing import FILLER, Share, SharedBatches, SharedRows, SharedStream, shared_loader
from spikelm.distill.trainer import collate
from spikelm.distributed import share_of_update
from spikelm.errors import SpikelmError

SCRIPT = Path(__file__).with_name("shared_training.py")
NOT_COMPARED = ("wall_s", "tokens_per_second", "sentences_per_second")
IN_PARTS = {"student": "sharded", "teacher": "offloaded"}


def run(processes: int, output_dir: Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The script, by itself or under torchrun; its exit status and output."""
    arguments = [str(SCRIPT), json.dumps({"output_dir": str(output_dir), **options})]
    if processes == 1:
        command = [sys.executable, "-W", "error", *arguments]
    else:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        # Port 0 lets the system choose: tests run beside one another.
        command = [sys.executable, *launch, "--rdzv-endpoint", "localhost:0", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
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
    options: dict[str, Any] = {"student": "spiking", "steps": 50, "save_steps": 8}
    broken = run(2, tmp_path, **options, parallel=IN_PARTS, fail_at=[20, None])
    assert broken.returncode != 0 and "error: failed at step 20" in broken.stderr
    broken = run(1, tmp_path, **options, fail_at=[30, None])
    assert broken.returncode == 2 and len(curve(tmp_path)) == 29  # a step that fails is not logged
    assert_same(finished(2, tmp_path, **options), one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"student": "spiking", "objective": "spad", "gradient_checkpointing": True},
        {"student": "llamba", "objective": "orientation", "trainable": ["*.mixer.*"]},
        {"student": "bert", "objective": "internal"},
        {"streaming": True, "steps": 7, "gradient_accumulation": 3, "batch_size": 2},
    ],
    ids=["spad", "orientation", "internal", "stream"],
)
def test_what_is_called_beside_the_student_is_shared_too(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"steps": 10} | options
    teacher = "replicated" if options.get("student") == "bert" else "sharded"
    one = finished(1, tmp_path / "one", **options)
    two = finished(2, tmp_path / "two", **options, parallel={"student": "sharded", "teacher": teacher})
    # Diagnostics of an equilibrium are means over batches that are padded differently.
    for lines in (one, two):
        for line in lines:
            for name in [name for name in line if name.startswith("rate_gap")]:
                del line[name]
    assert_same(two, one)


@pytest.mark.slow
def test_what_one_process_finds_not_finite_stops_all(tmp_path: Path) -> None:
    done = run(2, tmp_path, objective="nan", steps=10, parallel={"student": "sharded"})
    assert done.returncode != 0
    assert done.stderr.count("error: the loss is nan at step 5 (no checkpoint yet)") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, time, torch\n"
        "from spikelm import distributed\n"
        "from spikelm.run import command_line\n"
        "def main():\n"
        "    distributed.start()\n"
        "    assert distributed.on_first_rank(lambda: distributed.on_first_rank(lambda: [1])) == [1]\n"
        f"    if distributed.rank() == 1: os.kill(os.getpid(), {how.value})\n"
        "    torch.distributed.all_reduce(torch.zeros(1))\n"
        "    time.sleep(100)\n"
        "command_line(main)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ
            | {"WORLD_SIZE": "2", "RANK": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            | {"SPIKELM_RANK_PATIENCE": "4", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for port in [random.randint(20000, 29000)]
        for number in range(2)
    ]
    try:
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1 and "rank 1" in errors and "resume" in errors, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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
    assert found == wanted
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
    from spikelm import distributed

    assert distributed.on_first_rank(lambda: torch) is torch  # any value: nothing is sent
    assert distributed.is_first() and distributed.lost_rank(RuntimeError("Connection closed by peer")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert distributed.rank() == 1 and not distributed.is_first()
