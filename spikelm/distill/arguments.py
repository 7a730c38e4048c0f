"""The options that all training functions share, checked, as arguments of transformers.TrainingArguments."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikelm.distributed import share_of_update
from spikelm.errors import SpikelmError

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_options(
    student: nn.Module,
    *,
    output_dir: Path,
    betas: tuple[float, float],
    seed: int,
    gradient_checkpointing: bool,
    **checked: Any,
) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments or a class derived from it; see `spikelm.distill.trainer.train`.

    checked: the options of check_options, which names one that is out of range; keep_checkpoints is among them. Several
    processes share an update.
    """
    check_options(**checked)
    batch_size, gradient_accumulation = share_of_update(checked["batch_size"], checked["gradient_accumulation"])
    return {
        "output_dir": str(output_dir),
        "max_steps": checked["steps"],
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "learning_rate": checked["learning_rate"],
        "lr_scheduler_type": SCHEDULES[checked["schedule"]],
        "warmup_steps": round(checked["warmup_fraction"] * checked["steps"]),
        "weight_decay": checked["weight_decay"],
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "max_grad_norm": checked["max_grad_norm"],
        "seed": seed,
        "bf16": checked["bf16"],
        "use_cpu": not torch.cuda.is_available(),  # else TrainingArguments refuses bf16 where there is no GPU
        "activation_checkpointing": gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if gradient_checkpointing else None,
        "logging_steps": checked["logging_steps"],
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": checked["save_steps"],
        "save_total_limit": checked["keep_checkpoints"],
        "eval_strategy": "no",
        "report_to": ["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cache": getattr(getattr(student, "config", None), "use_cache", True),
    }


def check_options(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    gradient_accumulation: int,
    warmup_fraction: float,
    weight_decay: float,
    max_grad_norm: float,
    schedule: str,
    save_steps: int,
    keep_checkpoints: int,
    max_skipped_updates: int,
    bf16: bool,
    logging_steps: int = 10,
    threshold_learning_rate: float | None = None,
    gradient_checkpointing: bool = False,
) -> None:
    """SpikelmError names an option of a training function that is out of range."""
    counts = {"steps": steps, "batch_size": batch_size, "save_steps": save_steps, "logging_steps": logging_steps}
    counts |= {"gradient_accumulation": gradient_accumulation, "keep_checkpoints": keep_checkpoints}
    for name, count in {**counts, "max_skipped_updates": max_skipped_updates}.items():
        least = 0 if name == "max_skipped_updates" else 1
        if not math.isfinite(count) or count < least or count != int(count):
            raise SpikelmError(f"{name} must be a whole number >= {least}, given {count}")
    check_rate("learning_rate", learning_rate)
    check_rate("threshold_learning_rate", threshold_learning_rate)
    if not 0 <= warmup_fraction < 1:
        raise SpikelmError(f"warmup_fraction must be in [0, 1), given {warmup_fraction}")
    if schedule not in SCHEDULES:
        raise SpikelmError(f"schedule must be one of {', '.join(SCHEDULES)}, given {schedule!r}")
    for name, value in {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm}.items():
        if not (math.isfinite(value) and value >= 0):
            raise SpikelmError(f"{name} must be finite and >= 0, given {value}")
    if bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise SpikelmError(f"bf16 is not supported by {torch.cuda.get_device_name()}: set bf16=false")


def check_rate(name: str, rate: float | None) -> None:
    """SpikelmError unless the rate is None or finite and > 0."""
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise SpikelmError(f"{name} must be finite and > 0, given {rate}")
