"""Which parameters train, and how: optimizer groups, freezing by name, and what trains beside the student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from spikelm.errors import SpikelmError

PROJECTIONS = "distillation_projections"


def parameter_groups(
    model: nn.Module, weight_decay: float, threshold_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, empty ones left out (see DistillationTrainer).

    SpikelmError when nothing is trainable, or when a threshold learning rate is given and no threshold ("*neuron.a") is
    trainable.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    thresholds: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("neuron.a"):
            thresholds.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else others).append(parameter)
    if not (matrices or others or thresholds):
        raise SpikelmError(f"{type(model).__name__} has no trainable parameter")
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": thresholds, "weight_decay": 0.0},
    ]
    if threshold_learning_rate is not None:
        if not thresholds:
            raise SpikelmError(
                f"threshold_learning_rate={threshold_learning_rate} is given, but {type(model).__name__} has no "
                'trainable threshold (a parameter named "*neuron.a")'
            )
        groups[2]["lr"] = threshold_learning_rate
    return [group for group in groups if group["params"]]


@contextmanager
def only_trainable(student: nn.Module, patterns: Sequence[str] | None) -> Iterator[None]:
    """Within the context only parameters whose name matches a pattern require a gradient."""
    if patterns is None:
        yield
        return
    if isinstance(patterns, str):
        raise SpikelmError(f"trainable must be a list of patterns, given the string {patterns!r}")
    names = [name for name, _ in student.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SpikelmError(f"trainable pattern {pattern!r} matches no parameter of {type(student).__name__}")
    before = {parameter: parameter.requires_grad for parameter in student.parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def projections_attached(student: nn.Module, teacher: nn.Module, objective: Any) -> Iterator[None]:
    """Within the context `student.distillation_projections` is `objective.build_projections(student, teacher)`.

    So the optimizer and the checkpoints hold what trains beside the student, and the student that is left does not. An
    objective without that method has nothing to attach. Projections that the student already has stay, and train on.
    """
    build = getattr(objective, "build_projections", None)
    if build is None or hasattr(student, PROJECTIONS):
        yield
        return
    student.add_module(PROJECTIONS, build(student, teacher))
    try:
        yield
    finally:
        delattr(student, PROJECTIONS)
