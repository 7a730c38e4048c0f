"""Trainer callbacks: the metrics file, and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spikelm.errors import SpikelmError
from spikelm.files import write_text
from spikelm.neurons.tilif import TILIF, anneal_sgc


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that was cut short is left out. Empty where there is no file.

    Raises:
        SpikelmError: a line is no JSON, by its number.
    """
    # Bytes first: a damaged one need not be UTF-8.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found = []
    # What follows the last newline is empty, or a line that a killed process could not finish.
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise SpikelmError(f"{path} is damaged in line {number}: delete that line, or the file") from error
    return found


def last_metrics(path: Path) -> dict[str, Any]:
    """The last line of a log.jsonl."""
    return read_metrics(path)[-1]


class MetricsFile(TrainerCallback):
    """Append every step log as one JSON line: step, loss, the objective's terms, learning_rate, grad_norm, wall_s, ...
    Loss and terms are absent where no update since the line before had a finite one (skipped_updates counts them).

    wall_s counts training seconds over all resumed parts. On resume the lines beyond the resumed step are dropped.
    Saving and the last step always log, so that a resumed run writes the same lines as one that was never stopped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._start = time.perf_counter() - (kept[-1]["wall_s"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "skipped_updates" not in logs or not state.is_world_process_zero:
            return
        line = {"step": state.global_step, **logs, "wall_s": round(time.perf_counter() - self._start, 3)}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


class CompensationWeight(TrainerCallback):
    """Logs ``sgc_weight`` of the student's TILIF neurons, which it lowers during the training where ``end`` is given.

    The weight goes from what the student comes with to 0 at ``end``, a share of the steps; see
    :func:`spikelm.neurons.tilif.anneal_sgc`. None keeps it. [ours]
    """

    def __init__(self, student: nn.Module, end: float | None) -> None:
        self.neurons = [module for module in student.modules() if isinstance(module, TILIF)]
        if not self.neurons:
            raise SpikelmError(f"{type(student).__name__} has no TILIF neuron, hence no sgc_weight")
        self.student, self.start, self.end = student, self.neurons[0].sgc_weight, end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.end is not None:
            # The last step is at progress 1, so that the log's last line holds the weight training ended with.
            progress = state.global_step / max(1, state.max_steps - 1)
            anneal_sgc(self.student, min(1.0, progress), start=self.start, end=self.end)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            neuron = self.neurons[0]
            logs["sgc_weight"] = neuron.sgc_weight if neuron.sgc else 0.0


class LossOnBar(ProgressCallback):
    """transformers' progress bar with the loss behind it, on stderr, instead of a line on stdout at every log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)


@contextmanager
def loss_on_bar(trainer: Trainer) -> Iterator[None]:
    """LossOnBar in place of the bar of `trainer`, if it shows one. A training that fails within the context has its bar
    closed, so that the message about it stands on a line of its own.
    """
    bar = None
    if trainer.pop_callback(ProgressCallback) is not None:
        bar = LossOnBar()
        trainer.add_callback(bar)
    try:
        yield
    finally:
        if bar is not None and bar.training_bar is not None:
            bar.training_bar.close()


class StopAtStepEnd(TrainerCallback):
    """Turns Ctrl-C into: finish this step, log, save a checkpoint, stop. Raising at once could save a half-made
    optimizer step.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def handling_interrupts(self, world_size: int) -> Iterator[None]:
        """Catch SIGINT within the context; the second one raises KeyboardInterrupt at once.

        Not outside the main thread, where Python allows no handler, and not with several processes, which would have to
        agree on the step.
        """
        if world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True)

        signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.requested:
            control.should_log = control.should_save = control.should_training_stop = True
