"""Runs train.py with a fault in one of its trainings, else as its own command line does. For benchmarks/faults.py.

    python benchmarks/fault_child.py PLAN train.py --preset smoke ...

PLAN is a JSON file: {"stage", "first", "last" (null: to the end), "how", "record"}. how="nan" multiplies the loss of
the steps first to last of that training by NaN and keeps their input_ids in the directory `record`; how="leave_out" has
the optimizer do nothing at those steps.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spikelm.distill.trainer import DistillationTrainer

compute_loss = DistillationTrainer.compute_loss
adamw_step = torch.optim.AdamW.step


class Fault:
    """What is done at the steps of the plan."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.leave_out = False

    def struck(self, trainer: Any) -> bool:
        """Whether the step that is computed now is one of the plan's."""
        step, last = trainer.state.global_step + 1, self.plan["last"]
        in_time = self.plan["first"] <= step and (last is None or step <= last)
        return in_time and Path(str(trainer.args.output_dir)).name == self.plan["stage"]

    def loss(self, trainer: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """In place of DistillationTrainer.compute_loss."""
        now = self.struck(trainer)
        if now and self.plan["how"] == "nan":
            path = Path(self.plan["record"]) / f"step-{trainer.state.global_step + 1}.safetensors"
            save_file({"input_ids": inputs["input_ids"].contiguous()}, path)
        loss = compute_loss(trainer, model, inputs, *args, **options)
        if now and self.plan["how"] == "leave_out":
            self.leave_out = True
        return loss * float("nan") if now and self.plan["how"] == "nan" else loss

    def step(self, optimizer: Any, *args: Any, **options: Any) -> Any:
        """In place of AdamW.step."""
        if self.leave_out:
            self.leave_out = False
            return None
        return adamw_step(optimizer, *args, **options)


def main() -> None:
    """Puts the fault in and runs the script."""
    plan, script, *arguments = sys.argv[1:]
    fault = Fault(json.loads(Path(plan).read_text(encoding="utf-8")))
    DistillationTrainer.compute_loss = lambda self, *args, **options: fault.loss(self, *args, **options)  # type: ignore[assignment]
    torch.optim.AdamW.step = lambda self, *args, **options: fault.step(self, *args, **options)  # type: ignore[assignment]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)  # what python itself would put there
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
