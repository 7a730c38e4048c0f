"""Where a step of MAR's stage 2 spends its time, on each backend, and whether the losses are the same.

    python benchmarks/mar_profile.py teacher=PATH data=stories.txt --output benchmarks/results/mar_profile.json

Trains the `tiny` preset's student for a few steps from the same seed on the reference ("torch") and on the fused
kernels ("auto"), and once more on the reference with one thread: sums in another order, which is how far rounding alone
takes two runs apart. A neuron's time is that of its encoding and of the encoding's backward, between the gradient that
arrives and the one that leaves; what is not the neurons' is the rest of the step. Fields as of examples/mar/train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "mar"
sys.path.insert(0, str(EXAMPLE))

import train as mar  # noqa: E402  the example itself

import spikelm  # noqa: E402
from spikelm.distill.objectives import SBDS  # noqa: E402
from spikelm.distill.trainer import train  # noqa: E402
from spikelm.models.llamba import LlambaForCausalLM  # noqa: E402
from spikelm.neurons import ATMN  # noqa: E402
from spikelm.presets import load_config, to_dict  # noqa: E402
from spikelm.run import RunDirectory, keep_freed_memory, versions  # noqa: E402


class Clock:
    """Adds up the seconds of forward and backward; on a GPU each is waited for."""

    def __init__(self) -> None:
        self.forward = self.backward = 0.0
        self.calls = 0

    @staticmethod
    def now() -> float:
        """Seconds, after everything that was started has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def neurons_timed(clock: Clock) -> Iterator[None]:
    """Within it every ATMN.encode_sum adds to the clock."""
    plain = ATMN.encode_sum

    def timed(self: ATMN, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        start = clock.now()
        # aliases, so that the hooks see this encoding's gradients alone
        source = x.view_as(x)
        total = plain(self, source, *arguments)
        clock.forward += clock.now() - start
        clock.calls += 1
        if total.requires_grad and source.requires_grad:
            began: list[float] = []
            total.register_hook(lambda gradient: began.append(clock.now()))

            def ended(gradient: torch.Tensor) -> None:
                clock.backward += clock.now() - began.pop()

            source.register_hook(ended)
        return total

    ATMN.encode_sum = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        ATMN.encode_sum = plain  # type: ignore[method-assign]


def run(config: mar.Config, backend: str, steps: int, directory: Path) -> dict[str, Any]:
    """Losses of every step, and the seconds of one, of the student trained on this backend."""
    with RunDirectory(directory / backend, {"backend": backend}) as place, spikelm.use_backend(backend):
        experiment = mar.prepare(config, place)
        torch.manual_seed(config.seed)
        dense = LlambaForCausalLM.from_llama(experiment.teacher, **to_dict(config.mixer))
        student = experiment.spiking_copy(dense, config.spiking.neuron.recipe(), config.spiking.calibration_contexts)
        dense.requires_grad_(False).eval()
        clock, stamps = Clock(), [time.perf_counter()]

        class Objective(SBDS):
            def __call__(self, *arguments: Any, **named: Any) -> Any:
                stamps.append(clock.now())
                return super().__call__(*arguments, **named)

        spiking = config.spiking
        objective = Objective(spiking.alpha, spiking.beta, spiking.feature_weight, spiking.taps, spiking.chunk_size)
        settings = to_dict(spiking.optimisation) | {"steps": steps, "logging_steps": 1, "save_steps": steps}
        with neurons_timed(clock):
            train(
                student, dense, experiment.train_data, objective,
                output_dir=place.path("training"), seed=config.seed, **settings,
            )  # fmt: skip
        log = [json.loads(line) for line in (place.path("training") / "log.jsonl").read_text().splitlines()]
    differences = [later - earlier for earlier, later in zip(stamps[2:], stamps[3:], strict=False)]
    return {
        "losses": [line["loss"] for line in log if "loss" in line][:steps],
        "step_s": statistics.median(differences),
        "neurons_forward_s": clock.forward / steps,
        "neurons_backward_s": clock.backward / steps,
        "encodings_per_step": clock.calls / steps,
    }


def apart(losses: list[float], others: list[float]) -> dict[str, float]:
    """How far two runs' losses are from each other, relative to the first's."""
    differences = [abs(one - other) / abs(one) for one, other in zip(losses, others, strict=True)]
    return {"first": differences[0], "median": statistics.median(differences), "largest": max(differences)}


def main() -> None:
    """Profile, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", metavar="field=value")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    config = load_config(mar.Config, arguments.preset, arguments.fields, mar.PRESETS)
    with tempfile.TemporaryDirectory() as directory:
        results = {name: run(config, name, arguments.steps, Path(directory)) for name in ("torch", "auto")}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        control = run(config, "torch", arguments.steps, Path(directory) / "control")
        torch.set_num_threads(threads)
    figures = {
        "relative_difference_of_losses": apart(results["torch"]["losses"], results["auto"]["losses"]),
        "relative_difference_with_one_thread": apart(results["torch"]["losses"], control["losses"]),
        "results": results,
        "steps": arguments.steps,
        "preset": arguments.preset,
        "versions": versions(),
    }
    text = json.dumps(figures, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
