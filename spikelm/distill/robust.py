"""What every trainer here adds to transformers.Trainer: it stops at what is not finite, its checkpoints are whole."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from spikelm.distill.callbacks import StopAtStepEnd, loss_on_bar
from spikelm.distill.checkpoints import checkpoint_step, checkpoints, keep_latest, latest_checkpoint, mark_complete
from spikelm.distill.diagnosis import last_good_checkpoint, likely_cause, non_finite_tensor
from spikelm.distill.parallel import whole
from spikelm.distill.parameters import parameter_groups
from spikelm.distributed import on_first_rank
from spikelm.errors import SpikelmError
from spikelm.run import require_free_space


class RobustTrainer(Trainer):
    """Base of the trainers, alone or before another one of transformers' (as a mixin).

    A loss or gradient that is not finite stops the run before the optimizer's step, and a student that is not finite is
    never saved; the error names the step, the last whole checkpoint and the likely cause. Weight decay spares
    parameters of less than two dimensions and thresholds ("*neuron.a"). A checkpoint counts only when marked COMPLETE;
    `save_total_limit` counts those, and the disk's free space is asked for before each.
    """

    student: nn.Module
    threshold_learning_rate: float | None = None

    def frozen_models(self) -> Mapping[str, nn.Module]:
        """What else the loss is computed with, by its name."""
        return {}

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        """The parts of the loss since the last log."""
        return {}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer, and stop before the optimizer step when the loss is NaN or infinite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        # One synchronisation, in place of the one of logging_nan_inf_filter, which `training_options` switches off.
        if self.on_any_rank(not math.isfinite(loss.item())):
            raise self._not_finite(
                f"the loss is {self.accelerator.reduce(loss).item()} at step {self.state.global_step + 1}",
                loss_is_finite=False,
            )
        return loss

    def on_any_rank(self, here: bool) -> bool:
        """Whether it is so on any process: what one of them stops for, all stop for."""
        if self.args.world_size == 1:
            return here
        anywhere = torch.tensor(float(here), device=self.args.device)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        return bool(anywhere.item())

    def training_ended(self) -> None:
        """Called when `train` has come to its end without an error."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor):
            norm = whole(norm)
        # DeepSpeed may know none. With fp16 an infinite one now and then is how the loss scale is found: it is skipped.
        if norm is not None and not math.isfinite(float(norm)) and self.accelerator.scaler is None:
            raise self._not_finite(f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}")
        return norm

    def _not_finite(self, what: str, loss_is_finite: bool = True) -> SpikelmError:
        cause = likely_cause(
            self.student,
            self.frozen_models(),
            self.loss_terms(),
            loss_is_finite=loss_is_finite,
            updates=self.state.global_step,
            learning_rate=self.args.learning_rate,
            max_grad_norm=self.args.max_grad_norm,
            reduced_precision=next((name for name in ("bf16", "fp16") if getattr(self.args, name)), None),
        )
        return SpikelmError(f"{what} ({last_good_checkpoint(str(self.args.output_dir))}); likely cause: {cause}")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: Trainer's estimate walks over all modules at every step and knows nothing of spikes."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups: matrices with weight decay, other parameters without, thresholds without and with their own learning
        rate.
        """
        if self.optimizer is None:
            target: Any = self.student if model is None else model  # a wrapped model under sharding
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = parameter_groups(target, self.args.weight_decay, self.threshold_learning_rate)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.on_any_rank(non_finite_tensor(self.student) is not None):
            raise self._not_finite(f"the student is not finite after step {self.state.global_step} and is not saved")
        start = time.perf_counter()
        output_dir = Path(str(self.args.output_dir))
        directory = output_dir / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                require_free_space(output_dir, _checkpoint_bytes(self.student))
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process writes its random state into the directory
        if self.args.should_save:
            mark_complete(directory, self.state.global_step)
            if limit:
                keep_latest(
                    output_dir, limit
                )  # only now: Trainer would delete the last whole one before the new one is whole
        self.checkpoint_saved(time.perf_counter() - start)

    def checkpoint_saved(self, seconds: float) -> None:
        """Called after every checkpoint, with the time that it took."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint of another model is an error; keys that are missing because they share a tensor with another are
        not.
        """
        state = self.student.state_dict(keep_vars=True)
        missing = set(load_result.missing_keys)
        loaded = {id(value) for name, value in state.items() if name not in missing}
        wrong = [name for name in load_result.missing_keys if id(state[name]) not in loaded]
        wrong += load_result.unexpected_keys
        if wrong:
            raise SpikelmError(
                f"the checkpoint in {self.args.output_dir} is of another model: "
                f"{wrong[0]} and {len(wrong) - 1} more parameters differ"
            )


def require_one_device(args: TrainingArguments) -> None:
    """SpikelmError where Trainer would replicate the model within this process."""
    if args.n_gpu > 1:
        raise SpikelmError(f"{args.n_gpu} GPUs in one process are not supported: start one process per GPU (torchrun)")


def run_to_the_end(trainer: RobustTrainer, checkpoint: Path | None, stop: StopAtStepEnd) -> None:
    """Train to the last step, from `checkpoint` if given (only load it where it is of the last step), and take off what
    Trainer leaves on the student: autocast, checkpointing, train mode.
    """
    if checkpoint is not None and checkpoint_step(checkpoint) == trainer.args.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))
        return
    student: Any = trainer.student
    was_training = student.training
    try:
        with stop.handling_interrupts(trainer.args.world_size), loss_on_bar(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.training_ended()
    finally:
        for model in (trainer.model_wrapped, student):
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if trainer.args.activation_checkpointing:
            student.activation_checkpointing_disable()
        student.train(was_training)
    if stop.requested:
        raise KeyboardInterrupt
    if trainer.state.global_step != trainer.args.max_steps:
        raise SpikelmError(
            f"training stopped at step {trainer.state.global_step} of {trainer.args.max_steps}: "
            "the dataset gave nothing more, or a callback asked for it"
        )


def find_checkpoint(output_dir: Path, steps: int, resume: bool) -> Path | None:
    """The last whole checkpoint to go on from, or None; SpikelmError for one beyond `steps`, or any without resume."""

    def find() -> str | None:
        if not resume:
            if checkpoints(output_dir):
                raise SpikelmError(
                    f"{output_dir} already holds checkpoints: resume, delete them or choose another output_dir"
                )
            return None
        checkpoint = latest_checkpoint(output_dir)
        if checkpoint is not None and (checkpoint_step(checkpoint) or 0) > steps:
            raise SpikelmError(
                f"{checkpoint} is beyond the {steps} steps asked for: raise steps or choose another output_dir"
            )
        return None if checkpoint is None else str(checkpoint)

    found = on_first_rank(find)
    return None if found is None else Path(found)


def _checkpoint_bytes(model: nn.Module) -> int:
    """Of the weights, and of two float32 moments of what is trained."""
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters) + sum(8 * p.numel() for p in parameters if p.requires_grad)
