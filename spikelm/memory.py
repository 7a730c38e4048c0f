"""What a training needs of each process's memory, found without allocating it: models and batch as fake tensors."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikelm.distill.objectives import Objective
from spikelm.distill.parallel import Parallel, _layers
from spikelm.distill.parameters import projections_attached

aten = torch.ops.aten


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process; a process keeps its part of what is sharded, and one layer of it whole while that runs.

    parameters, gradients, optimizer: of the student, float32 with two moments of what trains. teacher: its parameters.
    gathered: of sharded models what is whole at the most, two layers (the next is fetched while one runs) and what is
    outside of the layers. buckets: DDP's copy of the gradients. activations: the most that a forward and backward pass
    holds beside all these. offloaded: on the host instead of the GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    buckets: int
    activations: int
    offloaded: int

    @property
    def peak(self) -> int:
        """Bytes on the device at the most."""
        state = self.parameters + self.gradients + self.optimizer + self.teacher
        return state + self.gathered + self.buckets + self.activations - self.offloaded


def training_memory(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    *,
    batch_size: int,
    context_length: int,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    processes: int = 1,
    parallel: Parallel | None = None,
) -> TrainingMemory:
    """What `train` with AdamW needs. The models may lie on the meta device; neither is changed.

    The objective runs once, forward and backward, on fake tensors, so that what it holds is counted and not guessed:
    every tensor's storage from when it is made until it is freed. All tokens count. What a kernel needs inside of
    itself, the allocator's rounding and fragments, and the CUDA context are not in it.

    Args:
        batch_size: contexts in one forward pass of one process, see spikelm.distributed.share_of_update.
        bf16: autocast around the objective, as the trainer has it.
    """
    places = Parallel() if parallel is None or processes == 1 else parallel
    with projections_attached(student, teacher, objective):
        live = _counted_pass(student, teacher, objective, (batch_size, context_length), bf16, gradient_checkpointing)
        trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
        everything = sum(p.nbytes for p in student.parameters())
        part = 1 if places.student == "replicated" else processes
        part_of_teacher = 1 if places.teacher == "replicated" else processes
        parameters, gradients, optimizer = everything // part, trained // part, 2 * trained // part
        of_teacher = sum(p.nbytes for p in teacher.parameters()) // part_of_teacher
        gathered = 0 if places.student == "replicated" else 2 * _gathered(student)  # a layer's parameters and gradients
        gathered += 0 if places.teacher == "replicated" else _gathered(teacher)
        offloaded = parameters + gradients + optimizer if places.student == "offloaded" else 0
        offloaded += of_teacher if places.teacher == "offloaded" else 0
        buckets = trained if processes > 1 and places.student == "replicated" else 0
        # Gradients grow while activations go: of a replicated student both count as they come.
        activations = live.peak_beside_gradients if part > 1 else max(0, live.peak - trained)
        return TrainingMemory(parameters, gradients, optimizer, of_teacher, gathered, buckets, activations, offloaded)


def _gathered(model: nn.Module) -> int:
    """Of a sharded model: two layers and what is outside of them."""
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in _layers(model)]
    whole = sum(p.nbytes for p in model.parameters())
    return whole - sum(layers) + sum(sorted(layers)[-2:])


def _counted_pass(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    shape: tuple[int, int],
    bf16: bool,
    gradient_checkpointing: bool,
) -> LiveBytes:
    """One forward and backward pass on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # Stored spikes are found again by their address, which fake tensors have none of: each is then its own.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        learner, guide = _fake(student), _fake(teacher).requires_grad_(False)
        learner.train()
        if gradient_checkpointing:
            learner.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(shape, dtype=torch.long, device="cpu")
        gc.collect()  # what an earlier pass left in cycles is not freed in the middle of this one
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                count = float(shape[0] * (shape[1] - 1))
                loss = objective(learner, guide, {"input_ids": ids}, count)["loss"]
            loss.backward()
        live.leave_out([p.grad for p in learner.parameters() if p.grad is not None])
    return live


def _fake(model: nn.Module) -> Any:
    """A copy of the model, made within a FakeTensorMode, that copies no values."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made within the context, until they are freed.

    A mask that picks rows is taken to pick all of them: fake tensors have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.peak_beside_gradients = 0
        self._now = 0
        self._alive: dict[int, int] = {}  # by storage the number of its event
        self._events: list[int] = []  # bytes made (> 0) and freed (< 0), as they come

    def leave_out(self, gradients: Sequence[Tensor]) -> None:
        """Finds the peak beside these, which are still alive."""
        made = {self._alive[key] for each in gradients if (key := each.untyped_storage()._cdata) in self._alive}
        now = 0
        for number, size in enumerate(self._events):
            now += 0 if number in made else size
            self.peak_beside_gradients = max(self.peak_beside_gradients, now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picked = _with_every_row(func, args)
        result = picked() if picked is not None else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = len(self._events)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        del self._alive[key]
        self._add(-size)

    def _add(self, size: int) -> None:
        self._events.append(size)
        self._now += size
        self.peak = max(self.peak, self._now)


def _with_every_row(func: Any, args: Any) -> Callable[[], Tensor] | None:
    """In place of picking or putting rows by a mask, which needs values: the same with all rows."""
    if func is aten.index.Tensor:
        values, indices = args[0], args[1]
        mask = indices[0] if len(indices) == 1 else None
        if mask is not None and mask.dtype == torch.bool:
            return lambda: values.new_empty(mask.numel(), *values.shape[mask.ndim :])
    if func in (aten._index_put_impl_.default, aten.index_put_.default) and args[1][0].dtype == torch.bool:
        return lambda: args[0]
    if func is aten.index_put.default and args[1][0].dtype == torch.bool:
        return lambda: torch.empty_like(args[0])
    return None
