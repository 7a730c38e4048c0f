"""DistillationTrainer: transformers.Trainer for a student, a frozen teacher and an objective; and `train`, which sets
it up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from spikelm import distributed
from spikelm.distill.arguments import training_options
from spikelm.distill.callbacks import MetricsFile, StopAtStepEnd, last_metrics
from spikelm.distill.objectives import Batch, Objective, batch_mask, called_methods
from spikelm.distill.parallel import Parallel, UnderObjective, for_a_file, in_parts, same_on_all, sharded, wrapped
from spikelm.distill.parameters import only_trainable, projections_attached
from spikelm.distill.robust import RobustTrainer, find_checkpoint, require_one_device, run_to_the_end
from spikelm.distill.sharing import FILLER, loader_of_trainer
from spikelm.errors import SpikelmError


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


def counted_tokens(batch: Batch) -> Tensor:
    """The tokens whose prediction counts."""
    return batch_mask(batch).sum()


class DistillationTrainer(RobustTrainer):
    """Minimise `objective(student, teacher, batch, num_items)`.

    Beyond RobustTrainer: losses are means over the counted tokens (or what the objective counts instead) of the whole
    update, so that gradient accumulation equals one big batch; every term of the objective and the tokens per second
    are logged as the mean since the last log; thresholds ("*neuron.a") may have a learning rate of their own. The
    teacher is put on the student's device, frozen and set to eval mode, and stays so.

    Args:
        student, teacher: transformers causal language models.
        objective: see spikelm.distill.objectives.
        args: transformers.TrainingArguments; save_total_limit counts whole checkpoints.
        threshold_learning_rate: > 0, or None for the one of all other parameters.
        max_skipped_updates: left out for what is not finite before the training stops, see RobustTrainer.
        parallel: where several processes keep the two models; see Parallel.
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
        max_skipped_updates: int = RobustTrainer.max_skipped_updates,
        parallel: Parallel | None = None,
        **options: Any,
    ) -> None:
        if teacher is student:
            raise SpikelmError("teacher and student are the same object: give the student as a copy")
        require_one_device(args)
        self.student = student
        super().__init__(model=student, args=args, data_collator=options.pop("data_collator", collate), **options)
        self.parallel = Parallel() if parallel is None or args.world_size == 1 else parallel
        self.teacher = teacher.eval().requires_grad_(False)
        if self.parallel.teacher == "replicated":
            self.teacher.to(args.device)
        self._shared = UnderObjective(student, self._terms_of)
        self._in_parts = ExitStack()
        self.objective = objective
        self.threshold_learning_rate = threshold_learning_rate
        self.max_skipped_updates = max_skipped_updates
        self.loss_is_scaled_for_ga = True  # objectives divide by the tokens of the whole update
        self._count = getattr(objective, "count_items", counted_tokens)
        self._terms: dict[str, Tensor] = {}  # of the update that runs
        self._sums: dict[str, Tensor] = {}  # of those since the last log
        self._items = torch.zeros((), dtype=torch.long, device=args.device)
        self._log_time = time.perf_counter()

    def frozen_models(self) -> dict[str, nn.Module]:
        """The teacher."""
        return {"teacher": self.teacher}

    def loss_terms(self) -> dict[str, Tensor]:
        """The objective's terms in this update."""
        return self._terms

    def update_ends(self, loss_is_finite: bool) -> None:
        """Its terms count with its loss."""
        for name, value in self._terms.items() if loss_is_finite else ():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._terms = {}

    def checkpoint_saved(self, seconds: float) -> None:
        """Saving is no training time in tokens_per_second."""
        self._log_time += seconds

    def get_train_dataloader(self) -> Any:
        """As in Trainer; several processes share each batch of one process, row by row."""
        return super().get_train_dataloader() if self.args.world_size == 1 else loader_of_trainer(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(train_dataset)
        grouped = isinstance(sampler, LengthGroupedSampler)
        if grouped and self.args.world_size > 1:
            sampler.batch_size *= self.args.world_size  # it groups what one update sees
            # Else it draws from the generator that dropout draws from, and the processes' orders would drift apart.
            generator, seed = torch.Generator(), self.args.seed
            sampler.generator, sampler.set_epoch = generator, lambda epoch: generator.manual_seed(seed + epoch)
        return sampler

    def _prepare_for_training(self, *args: Any) -> tuple[Any, Any]:
        if self.args.world_size > 1:
            self._share_models()
        prepared: tuple[Any, Any] = super()._prepare_for_training(*args)
        self._log_time = time.perf_counter()  # loading and wrapping is no training time in tokens_per_second
        return prepared

    def _share_models(self) -> None:
        """Before the optimizer is made, which holds the parameters that there are then."""
        same_on_all(self.student)
        device, called = self.args.device, called_methods(self.objective)
        if self.parallel.teacher != "replicated" and any(True for _ in self.teacher.parameters()):
            self._in_parts.enter_context(sharded(self.teacher, self.teacher, self.parallel.teacher, device))
        if self.parallel.student != "replicated":
            parts = sharded(self._shared, self.student, self.parallel.student, device, called)
            self._in_parts.enter_context(parts)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self.args.world_size == 1:
            return super()._wrap_model(model, training, dataloader)
        if self.args.mixed_precision != "no":  # autocast around the student's forward, as for one process
            self.accelerator.prepare_model(self.student, device_placement=False, evaluation_mode=True)
        return wrapped(self._shared, self.parallel.student, self.args.device)

    def training_ended(self) -> None:
        """Every process has the whole student and teacher again."""
        self._in_parts.close()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._student_in_parts:
            state_dict = for_a_file(self.student.state_dict(keep_vars=True))
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._student_in_parts:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, schedule = self._stateful()
        state = for_a_file(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._student_in_parts:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, schedule = self._stateful()
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(in_parts(state, optimizer))
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _stateful(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler

    @property
    def _student_in_parts(self) -> bool:
        return self.args.world_size > 1 and self.parallel.student != "replicated"

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Counted tokens, or the objective's own items, of one update, over all its micro-batches and processes."""
        if not batch_samples:  # a streamed dataset that has ended
            return None
        counts = [self._count(batch) * (0 if FILLER in batch else 1) for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self._items += count
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
        processes = self.args.world_size
        weight = 0 if FILLER in inputs else processes
        # The heads run outside the student's forward, which alone accelerate puts under autocast.
        with self.accelerator.autocast():
            if processes > 1:
                terms = model(inputs, num_items_in_batch)
            else:  # a launcher's only process has a wrapper too, which has nobody to average with
                student = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
                terms = self.objective(student, self.teacher, inputs, num_items_in_batch)
        for name, value in terms.items():
            if name != "loss":
                value = value.detach() * weight
                self._terms[name] = self._terms[name] + value if name in self._terms else value
        return terms["loss"] * weight

    def _terms_of(self, batch: Batch, num_items: Tensor | float | None) -> dict[str, Tensor]:
        return self.objective(self.student, self.teacher, batch, num_items)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's terms (mean per step) and items per second since the last log to Trainer's step logs."""
        if "loss" in logs:
            now = time.perf_counter()
            for name, value in self._sums.items():
                if self.args.world_size > 1:
                    value = self.accelerator.reduce(value, reduction="mean")
                logs[name] = value.item() / self._losses_since_log
            items = getattr(self.objective, "items", "tokens")
            logs[f"{items}_per_second"] = self._items.item() / (now - self._log_time)
            self._sums, self._log_time = {}, now
            self._items.zero_()
        super().log(logs, start_time)


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
    keep_checkpoints: int = 2,
    max_skipped_updates: int = 3,
    logging_steps: int = 10,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    resume: bool = True,
    schedule: str = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    trainable: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] = collate,
    group_by_length: bool = False,
    parallel: Parallel | None = None,
) -> dict[str, float]:
    """Train `student` in place with AdamW to `steps` updates, from the last whole checkpoint of output_dir if any.

    Args:
        dataset: rows {"input_ids": [ids], optional "labels", "attention_mask"}; shuffled by seed, or in its own order
            where it is streamed.
        output_dir: gets log.jsonl (a line every `logging_steps`), checkpoint-<step>/ (every `save_steps` and at the
            end; the last `keep_checkpoints` stay) and, where tensorboard is installed, its event files.
        batch_size: contexts per forward pass; an update sees batch_size * gradient_accumulation of them. Several
            processes share an update, in smaller forward passes or fewer: it is the same for any number of them.
        max_skipped_updates: updates whose loss or gradient is not finite that are left out, with a warning and their
            batches in non_finite/, before the training stops.
        warmup_fraction: part of the steps over which the rate rises from 0, in [0, 1).
        schedule: "cosine" or "linear" (both down to 0), or "constant".
        max_grad_norm: 0 for no clipping.
        resume: from the last checkpoint that is as it was written; a damaged one is named and put aside. False wants an
            output_dir without checkpoints.
        trainable: patterns (fnmatch) over parameter names, for example ["*.mixer.*"]; others are frozen for this call.
            None leaves requires_grad as it is.
        callbacks: further transformers callbacks.
        data_collator: rows to a batch.
        group_by_length: batches of contexts of about one length, drawn at random.
        parallel: where several processes keep student and teacher; see spikelm.distill.parallel.Parallel.

    Under torchrun or accelerate launch all processes call this together, with equal models and data, and each has the
    trained student at the end; the first one writes. A checkpoint does not tell how many processes made it.

    What an objective trains beside the student (`SpAD.build_projections`) is part of the student and its checkpoints
    during this call, and taken off it at its end.

    Returns:
        {"steps", "wall_s" (seconds, over all resumed parts), "loss", the objective's terms and what else the last log
        line holds}.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt (one process only); a second one stops at
    once.
    """
    distributed.start()
    output_dir = Path(output_dir)
    options = training_options(
        student,
        output_dir=output_dir,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        threshold_learning_rate=threshold_learning_rate,
        gradient_accumulation=gradient_accumulation,
        warmup_fraction=warmup_fraction,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        schedule=schedule,
        betas=betas,
        seed=seed,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        max_skipped_updates=max_skipped_updates,
        logging_steps=logging_steps,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
    )
    checkpoint = find_checkpoint(output_dir, steps, resume)
    stop = StopAtStepEnd()
    # Attached last: projections train whatever `trainable` names.
    with only_trainable(student, trainable), projections_attached(student, teacher, objective):
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            TrainingArguments(**options, train_sampling_strategy="group_by_length" if group_by_length else "random"),
            threshold_learning_rate=threshold_learning_rate,
            max_skipped_updates=max_skipped_updates,
            parallel=(Parallel() if parallel is None else parallel).launched(),
            train_dataset=dataset,
            data_collator=data_collator,
            callbacks=[*callbacks, MetricsFile(output_dir / "log.jsonl"), stop],  # what they add to a log is written
        )
        run_to_the_end(trainer, checkpoint, stop)
    metrics = distributed.on_first_rank(lambda: last_metrics(output_dir / "log.jsonl"))
    return {"steps": steps, "wall_s": metrics.pop("wall_s"), **{k: v for k, v in metrics.items() if k != "step"}}
