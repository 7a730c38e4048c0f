"""DistillationTrainer: transformers.Trainer for a student, a frozen teacher and an objective; and `train`, which sets
it up.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from spikelm.distill.callbacks import MetricsFile, StopAtStepEnd, last_metrics, loss_on_bar
from spikelm.distill.checkpoints import checkpoint_step, checkpoints, keep_latest, latest_checkpoint, mark_complete
from spikelm.distill.objectives import Objective, batch_mask
from spikelm.distill.parameters import only_trainable, parameter_groups
from spikelm.errors import SpikelmError
from spikelm.run import require_free_space

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Dataset rows to a batch: input_ids [B, L], and labels and attention_mask [B, L] where rows have them.

    Shorter rows are padded on the right (id 0, label -100, attention_mask 0), and then there is always an
    attention_mask. Other columns are left out.
    """
    if "input_ids" not in rows[0]:
        raise SpikelmError(f"a dataset row has no input_ids; it has {', '.join(rows[0]) or 'nothing'}")
    batch: dict[str, Tensor] = {}
    ragged = len({len(row["input_ids"]) for row in rows}) > 1
    if ragged and "attention_mask" not in rows[0]:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    for name, padding in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        if name in rows[0]:
            columns = [torch.as_tensor(row[name], dtype=torch.long) for row in rows]
            batch[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
    return batch


class DistillationTrainer(Trainer):
    """Minimise `objective(student, teacher, batch, num_items)`.

    Beyond transformers.Trainer: losses are means over the counted tokens of the whole update, so that gradient
    accumulation equals one big batch; every term of the objective and the tokens per second are logged as the mean
    since the last log; a loss that is not finite stops the run; weight decay spares parameters of less than two
    dimensions and thresholds ("*.neuron.a"), which may have a learning rate of their own; a checkpoint counts only when
    marked COMPLETE. The teacher is put on the student's device, frozen and set to eval mode, and stays so.

    Args:
        student, teacher: transformers causal language models.
        objective: see spikelm.distill.objectives.
        args: transformers.TrainingArguments; save_total_limit counts whole checkpoints.
        threshold_learning_rate: > 0, or None for the one of all other parameters.
        **options: further arguments of transformers.Trainer.
    """

    objective: Objective

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        objective: Objective,
        args: TrainingArguments,
        *,
        threshold_learning_rate: float | None = None,
        **options: Any,
    ) -> None:
        if teacher is student:
            raise SpikelmError("teacher and student are the same object: give the student as a copy")
        if args.n_gpu > 1:
            raise SpikelmError(
                f"{args.n_gpu} GPUs in one process are not supported: start one process per GPU (torchrun)"
            )
        self.student = student
        super().__init__(model=student, args=args, data_collator=options.pop("data_collator", collate), **options)
        self.teacher = teacher.to(args.device).eval().requires_grad_(False)
        self.objective = objective
        self.threshold_learning_rate = threshold_learning_rate
        self.loss_is_scaled_for_ga = True  # objectives divide by the tokens of the whole update
        self._terms: dict[str, Tensor] = {}
        self._tokens = torch.zeros((), dtype=torch.long, device=args.device)
        self._term_steps = 0
        self._log_time = time.perf_counter()

    def _prepare_for_training(self, *args: Any) -> tuple[Any, Any]:
        prepared: tuple[Any, Any] = super()._prepare_for_training(*args)
        self._log_time = time.perf_counter()  # loading and wrapping is no training time in tokens_per_second
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Counted tokens of one update, over all its micro-batches and processes."""
        if not batch_samples:  # a streamed dataset that has ended
            return None
        count = torch.stack([batch_mask(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self._tokens += count
        self._term_steps += 1
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective's loss; under several processes times their number, because their gradients are averaged."""
        if return_outputs:
            raise SpikelmError("DistillationTrainer does not evaluate: use spikelm.evaluate.evaluate")
        # The heads run outside the student's forward, which alone accelerate puts under autocast.
        with self.accelerator.autocast():
            terms = self.objective(model, self.teacher, inputs, num_items_in_batch)
        for name, value in terms.items():
            if name != "loss":
                value = value.detach() * self.args.world_size
                self._terms[name] = self._terms[name] + value if name in self._terms else value
        return terms["loss"] * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in Trainer, and stop before the optimizer step when the loss is NaN or infinite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # One synchronisation, in place of the one of logging_nan_inf_filter, which `train` switches off.
        if not math.isfinite(loss.item()):
            raise SpikelmError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate, or look for "
                "bad values in the models"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's terms (mean per step) and tokens per second since the last log to Trainer's step logs."""
        if "loss" in logs and self._term_steps:
            now = time.perf_counter()
            for name, value in self._terms.items():
                if self.args.world_size > 1:
                    value = self.accelerator.reduce(value, reduction="mean")
                logs[name] = value.item() / self._term_steps
            logs["tokens_per_second"] = self._tokens.item() / (now - self._log_time)
            self._terms, self._term_steps, self._log_time = {}, 0, now
            self._tokens.zero_()
        super().log(logs, start_time)

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
        self._log_time += time.perf_counter() - start  # saving is no training time in tokens_per_second

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


def train(
    student: nn.Module,
    teacher: nn.Module,
    dataset: Any,
    objective: Objective,
    *,
    output_dir: str | Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    threshold_learning_rate: float | None = None,
    warmup_fraction: float = 0.1,
    weight_decay: float = 0.01,
    gradient_accumulation: int = 1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    save_steps: int = 500,
    logging_steps: int = 10,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    resume: bool = True,
    schedule: str = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    trainable: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train `student` in place with AdamW to `steps` updates, from the last whole checkpoint of output_dir if any.

    Args:
        dataset: rows {"input_ids": [ids], optional "labels", "attention_mask"}; shuffled by seed, or in its own order
            where it is streamed.
        output_dir: gets log.jsonl (a line every `logging_steps`), checkpoint-<step>/ (every `save_steps` and at the
            end; only the last is kept) and, where tensorboard is installed, its event files.
        batch_size: contexts per forward pass and process; an update sees batch_size * gradient_accumulation of them.
        warmup_fraction: part of the steps over which the rate rises from 0, in [0, 1).
        schedule: "cosine" or "linear" (both down to 0), or "constant".
        max_grad_norm: 0 for no clipping.
        resume: False wants an output_dir without checkpoints.
        trainable: patterns (fnmatch) over parameter names, for example ["*.mixer.*"]; others are frozen for this call.
            None leaves requires_grad as it is.
        callbacks: further transformers callbacks.

    Returns:
        {"steps", "wall_s" (seconds, over all resumed parts), "loss", the objective's terms and what else the last log
        line holds}.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt (one process only); a second one stops at
    once.
    """
    output_dir = Path(output_dir)
    _check_options(steps, batch_size, learning_rate, threshold_learning_rate, gradient_accumulation, save_steps)
    _check_settings(logging_steps, warmup_fraction, schedule, bf16)
    checkpoint = _find_checkpoint(output_dir, steps, resume)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=round(warmup_fraction * steps),
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        max_grad_norm=max_grad_norm,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),  # without it TrainingArguments refuses bf16 where there is no GPU
        activation_checkpointing=gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        eval_strategy="no",
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cache=getattr(getattr(student, "config", None), "use_cache", True),
    )
    stop = StopAtStepEnd()
    with only_trainable(student, trainable):
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            arguments,
            threshold_learning_rate=threshold_learning_rate,
            train_dataset=dataset,
            callbacks=[*callbacks, MetricsFile(output_dir / "log.jsonl"), stop],  # what they add to a log is written
        )
        if checkpoint is not None and checkpoint_step(checkpoint) == steps:
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            _run(trainer, checkpoint, stop)
    metrics = last_metrics(output_dir / "log.jsonl")
    return {"steps": steps, "wall_s": metrics.pop("wall_s"), **{k: v for k, v in metrics.items() if k != "step"}}


def _run(trainer: DistillationTrainer, checkpoint: Path | None, stop: StopAtStepEnd) -> None:
    """Train to the last step, and take off what Trainer leaves on the student: autocast, checkpointing, train mode."""
    student: Any = trainer.student
    was_training = student.training
    try:
        with stop.handling_interrupts(trainer.args.world_size), loss_on_bar(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
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


def _find_checkpoint(output_dir: Path, steps: int, resume: bool) -> Path | None:
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
    return checkpoint


def _check_options(
    steps: int,
    batch_size: int,
    learning_rate: float,
    threshold_learning_rate: float | None,
    gradient_accumulation: int,
    save_steps: int,
) -> None:
    counts = {"steps": steps, "batch_size": batch_size, "save_steps": save_steps}
    for name, count in {**counts, "gradient_accumulation": gradient_accumulation}.items():
        if count < 1 or count != int(count):
            raise SpikelmError(f"{name} must be a whole number >= 1, given {count}")
    for name, rate in {"learning_rate": learning_rate, "threshold_learning_rate": threshold_learning_rate}.items():
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise SpikelmError(f"{name} must be finite and > 0, given {rate}")


def _check_settings(logging_steps: int, warmup_fraction: float, schedule: str, bf16: bool) -> None:
    if logging_steps < 1 or logging_steps != int(logging_steps):
        raise SpikelmError(f"logging_steps must be a whole number >= 1, given {logging_steps}")
    if not 0 <= warmup_fraction < 1:
        raise SpikelmError(f"warmup_fraction must be in [0, 1), given {warmup_fraction}")
    if schedule not in SCHEDULES:
        raise SpikelmError(f"schedule must be one of {', '.join(SCHEDULES)}, given {schedule!r}")
    if bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise SpikelmError(f"bf16 is not supported by {torch.cuda.get_device_name()}: set bf16=false")


def _checkpoint_bytes(model: nn.Module) -> int:
    """Of the weights, and of two float32 moments of what is trained."""
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters) + sum(8 * p.numel() for p in parameters if p.requires_grad)
