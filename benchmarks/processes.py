"""Two processes against one: the loss curve of stage 2 of examples/mar, smoke preset, and the spikes behind it.

    python benchmarks/processes.py --output benchmarks/results/processes.json     # three minutes on two cores

Each training starts from the same stage 1; the student and its teacher are float32 or float64.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikelm import experiment
from spikelm.convert import spike_sites
from spikelm.distill.callbacks import read_metrics
from spikelm.distributed import rank
from spikelm.files import write_json
from spikelm.run import command_line, versions

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "examples" / "mar" / "train.py"
STEPS, BATCH = 50, 8
ALONE = "one process"
SHARDED = ("parallel.student=sharded", "parallel.teacher=sharded")
# Processes, rows of a forward pass of one process, and further fields.
TRAININGS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    ALONE: (1, BATCH, ()),
    "one process, two forward passes": (1, BATCH // 2, ("spiking.optimisation.gradient_accumulation=2",)),
    "two processes, DDP": (2, BATCH, ()),
    "two processes, FSDP2": (2, BATCH, SHARDED),
}
COMPARED = (
    ("one process, two forward passes", ALONE),
    ("two processes, DDP", ALONE),
    ("two processes, FSDP2", ALONE),
    ("two processes, DDP", "one process, two forward passes"),
)


def launch(processes: int, arguments: list[str]) -> None:
    """A python program, by itself or under torchrun, on one thread a process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")


@contextmanager
def recorded_codes(student: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every bank of neurons of the student gives in training, int8 [rows, tokens, channels] a forward pass."""
    codes: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(owner: Any, inputs: tuple[Tensor, ...]) -> None:
            codes.setdefault(name, []).append(owner.neuron.encode_sum(inputs[0].detach(), torch.int8).clone())

        return record

    handles = [owner.register_forward_pre_hook(hook(name)) for name, owner in spike_sites(student).items()]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def train_one(dtype: str, directory: Path, arguments: list[str]) -> None:
    """train.py with a student and teacher of that type; keeps every step's loss and spikes."""
    train = experiment.train

    def training(student: Any, teacher: Any, *given: Any, **options: Any) -> dict[str, float]:
        student.to(getattr(torch, dtype))
        teacher.to(getattr(torch, dtype))
        with recorded_codes(student) as codes:
            result = train(student, teacher, *given, **options, logging_steps=1)
        torch.save(codes, directory / f"codes{rank()}.pt")
        return result

    experiment.train = training
    sys.argv = [str(PROGRAM), *arguments]
    sys.path.insert(0, str(PROGRAM.parent))
    runpy.run_path(str(PROGRAM), run_name="__main__")


def trained(base: Path, name: str, dtype: str, directory: Path) -> tuple[list[float], Tensor]:
    """The loss of every step, and the spikes of every step in one row [steps, all]."""
    processes, batch, more = TRAININGS[name]
    directory.mkdir()
    fields = {
        "teacher": base / "teacher", "stage1": base / "stage1", "stages": "[student]", "evaluation_contexts": 1,
        "sample_tokens": 1, "spiking.optimisation.steps": STEPS, "spiking.optimisation.batch_size": batch,
        "output_dir": directory / "run",
    }  # fmt: skip
    program = ["--preset", "smoke", *(f"{key}={value}" for key, value in fields.items()), *more]
    launch(processes, [__file__, "--child", dtype, str(directory), *program])
    losses = [line["loss"] for line in read_metrics(directory / "run" / "training" / "student" / "log.jsonl")]
    parts = [torch.load(directory / f"codes{number}.pt") for number in range(processes)]
    return losses, torch.cat([by_step(parts, site) for site in parts[0]], 1)


def by_step(parts: list[dict[str, list[Tensor]]], site: str) -> Tensor:
    """A bank's codes [steps, rows of an update * tokens * channels], rows in the order of one process."""
    passes = len(parts[0][site]) // STEPS
    steps = range(0, STEPS * passes, passes)
    return torch.stack([torch.cat([c for part in parts for c in part[site][k : k + passes]]).flatten() for k in steps])


def difference(found: tuple[list[float], Tensor], wanted: tuple[list[float], Tensor]) -> dict[str, Any]:
    """Of two trainings: of the losses, relative, and of the spikes."""
    apart = [abs(a / b - 1) for a, b in zip(found[0], wanted[0], strict=True)]
    flips = (found[1] != wanted[1]).sum(1).tolist()
    first = next((number for number, count in enumerate(flips) if count), None)
    return {
        "largest": max(apart),
        "largest_at_step": apart.index(max(apart)) + 1,
        "largest_before_a_flip": max(apart[:first], default=0.0),
        "first_flip_at_step": None if first is None else first + 1,
        "flips": sum(flips),
        "codes": found[1].numel(),
        "relative_differences": apart,
        "flips_by_step": flips,
    }


def main() -> None:
    """Train, compare, write."""
    if sys.argv[1:2] == ["--child"]:
        train_one(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = ["--preset", "smoke", "stages=[orientation,alignment,stage1]", f"output_dir={root / 'base'}"]
        launch(1, [str(PROGRAM), *base])
        for dtype in ("float32", "float64"):
            found = {
                training: trained(root / "base", training, dtype, root / f"{dtype}{number}")
                for number, training in enumerate(TRAININGS)
            }
            for training, other in COMPARED:
                rows.append({"dtype": dtype, "training": training, "against": other})
                rows[-1] |= difference(found[training], found[other])
                shown = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
                print(shown, file=sys.stderr)
    command = "python benchmarks/processes.py --output benchmarks/results/processes.json"
    write_json(output, {"command": command, "steps": STEPS, "batch": BATCH, "rows": rows, "versions": versions()})


if __name__ == "__main__":
    command_line(main)
