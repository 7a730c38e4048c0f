"""What every trainer here adds to transformers.Trainer: no step with what is not finite, and whole checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainingArguments

from spikelm.distill.callbacks import StopAtStepEnd, loss_on_bar
from spikelm.distill.checkpoints import (
    checkpoint_step,
    checkpoints,
    finish_checkpoint,
    keep_latest,
    latest_checkpoint,
    unfinished,
)
from spikelm.distill.diagnosis import last_good_checkpoint, likely_cause, non_finite_tensor, save_batches
from spikelm.distill.parallel import whole
from spikelm.distill.parameters import parameter_groups
from spikelm.distill.sharing import FILLER
from spikelm.distributed import is_first, on_first_rank
from spikelm.errors import SpikelmError
from spikelm.files import remove, require_free_space

NON_FINITE = "non_finite"  # directory of a training: batches of updates that were left out

logger = logging.getLogger(__name__)


class RobustTrainer(Trainer):
    """Base of the trainers, alone or before another one of transformers' (as a mixin).

    An update whose loss or gradient is not finite is left out: weights and optimizer stay, the step counts, its batches
    go to output_dir/non_finite, a warning says so, and every log holds "skipped_updates". Beyond `max_skipped_updates`
    of a training, or where the student or a frozen model is not finite, it stops; the error names the step, the
    batches, the last whole checkpoint and the likely cause. A student that is not finite is never saved. Steps that
    fp16's loss scale skips are not counted.

    Weight decay spares parameters of less than two dimensions and thresholds ("*neuron.a"). A checkpoint appears when
    it is whole; `save_total_limit` counts those, and the disk's free space is asked for before each. Every save logs.
    """

    student: nn.Module
    threshold_learning_rate: float | None = None
    max_skipped_updates: int = 3

    # Of the update that runs: its batches, Trainer's sum of losses before it, and what of it is not finite.
    _batches: tuple[Mapping[str, Any], ...] = ()
    _loss_before: Tensor | None = None
    _problem: str | None = None
    _losses_since_log = _updates_since_log = _skipped_since_log = 0

    def frozen_models(self) -> Mapping[str, nn.Module]:
        """What else the loss is computed with, by its name."""
        return {}

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        """The parts of the loss since the last log."""
        return {}

    def update_ends(self, loss_is_finite: bool) -> None:
        """Called for every update before the optimizer's step; the parts of a loss that is not finite do not count."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer, but 0 for a loss that is NaN or infinite, whose update is then left out."""
        if not self._batches:
            self._loss_before = self._tr_loss.clone()
        self._batches += (inputs,)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # One synchronisation, in place of the one of logging_nan_inf_filter, which `training_options` switches off.
        if not self.on_any_rank(not math.isfinite(loss.item())):
            return loss
        self._problem = f"the loss is {self.accelerator.reduce(loss).item()}"
        return torch.zeros_like(loss)

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
        loss_is_finite, finite = self._problem is None, norm is None or math.isfinite(float(norm))
        if loss_is_finite and not finite and self.accelerator.scaler is None:
            self._problem = f"the gradient's norm is {float(norm)}"
        self._updates_since_log += 1
        self._losses_since_log += loss_is_finite
        problem, batches, self._problem, self._batches = self._problem, self._batches, None, ()
        if not loss_is_finite and self._loss_before is not None:
            self._tr_loss.copy_(self._loss_before)  # without the losses of its other micro-batches
        if problem is not None:
            self._leave_out(problem, batches, loss_is_finite)
            optimizer: Any = self.optimizer
            optimizer.zero_grad(set_to_none=True)
        self.update_ends(loss_is_finite)
        return norm if problem is None else None

    def _leave_out(self, problem: str, batches: tuple[Mapping[str, Any], ...], loss_is_finite: bool) -> None:
        """Say and count it; SpikelmError where the training cannot go on."""
        what, before = f"{problem} at step {self.state.global_step + 1}", self.skipped_updates
        own = [batch for batch in batches if FILLER not in batch]
        directory = Path(str(self.args.output_dir)) / NON_FINITE
        saved = save_batches(directory, own, self.state.global_step + 1, problem)
        models = (self.student, *self.frozen_models().values())
        hopeless = self.on_any_rank(any(non_finite_tensor(model) is not None for model in models))
        if hopeless or before >= self.max_skipped_updates:
            what += f", and {before} were left out before" if before else ""
            raise self._not_finite(f"{what}; its batch is in {saved}", loss_is_finite)
        self._skipped_since_log += 1
        if is_first():
            counted = f"{before + 1} of at most {self.max_skipped_updates}"
            logger.warning("%s: this update is left out (%s); its batch is in %s", what, counted, saved)

    @property
    def skipped_updates(self) -> int:
        """Updates left out so far, in all parts of a training that was resumed."""
        logged = (line["skipped_updates"] for line in reversed(self.state.log_history) if "skipped_updates" in line)
        return int(next(logged, 0)) + self._skipped_since_log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add skipped_updates to Trainer's step logs; their loss is a mean over the updates that have a finite one."""
        if "loss" in logs:
            if self._losses_since_log:
                logs["loss"] *= self._updates_since_log / self._losses_since_log  # Trainer divides by all of them
            else:
                del logs["loss"]
            logs["skipped_updates"] = self.skipped_updates
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]  # JSON has no word for it
        super().log(logs, start_time)
        if "skipped_updates" in logs:
            self._losses_since_log = self._updates_since_log = self._skipped_since_log = 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # So that a resumed training knows what was left out before, and writes the lines of one that was not stopped.
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _not_finite(self, what: str, loss_is_finite: bool = True) -> SpikelmError:
        causes = [
            likely_cause(
                self.student,
                self.frozen_models(),
                self.loss_terms(),
                loss_is_finite=loss_is_finite,
                updates=self.state.global_step,
                learning_rate=self.args.learning_rate,
                max_grad_norm=self.args.max_grad_norm,
                reduced_precision=next((name for name in ("bf16", "fp16") if getattr(self.args, name)), None),
            )
        ]
        if self.args.world_size > 1:  # each sees its own part of the models and of the batch
            causes *= self.args.world_size
            torch.distributed.all_gather_object(causes, causes[0])
        checkpoint = on_first_rank(lambda: last_good_checkpoint(str(self.args.output_dir)))
        return SpikelmError(f"{what} ({checkpoint}); likely cause: {min(causes)[1]}")

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
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                require_free_space(output_dir, _checkpoint_bytes(self.student))
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes its random state into the directory
            if self.args.should_save:
                finish_checkpoint(output_dir, self.state.global_step)
        except BaseException:
            remove(unfinished(output_dir))
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            keep_latest(output_dir, limit)  # only now: Trainer would delete the last one before the new one is whole
        self.checkpoint_saved(time.perf_counter() - start)

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes a checkpoint; it is put in place when it is whole."""
        return str(unfinished(str(self.args.output_dir)))

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
        # A warning gets a line of its own above the bar.
        with stop.handling_interrupts(trainer.args.world_size), loss_on_bar(trainer), logging_redirect_tqdm():
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
    if trainer.skipped_updates == trainer.args.max_steps:
        raise SpikelmError(
            f"none of the {trainer.args.max_steps} updates had a finite loss and gradient: nothing is trained"
        )
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
