"""A student and its teacher on several processes: replicated (DDP), or in parts (FSDP2), and whole again afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state

from spikelm.distill.sharing import FILLER, part_of_batch
from spikelm.distill.taps import decoder_layers
from spikelm.distributed import LAUNCHED_FSDP, is_first, world_size
from spikelm.errors import SpikelmError

Place = Literal["replicated", "sharded", "offloaded"]
Terms = dict[str, Tensor]

# Beside forward, what mixers and neurons are called by.
CALLED = ("mixing_matrix", "encode", "encode_sum", "fires", "spike_count")
# What sharding puts into a module's tables at once is taken out again; transformers may have hooks of its own there.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# These it also fills later, and they become what they were.
TABLES = (
    "_parameters",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Parallel:
    """Where several processes keep a training's models; one process, which keeps everything, does not look at it.

    "replicated": every process holds all of it (DDP for the student). "sharded": parameters, and of the student the
    gradients and the optimizer's state, lie in parts on the processes, and a block's are gathered while it runs
    (FSDP2). "offloaded": the parts lie on the CPU between uses, where the student's optimizer steps too.
    """

    student: Place = "replicated"
    teacher: Place = "replicated"

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            if getattr(self, name) not in ("replicated", "sharded", "offloaded"):
                given = getattr(self, name)
                raise SpikelmError(f"parallel.{name} must be replicated, sharded or offloaded, given {given!r}")

    def launched(self) -> Parallel:
        """As the launcher has it: `accelerate launch --use_fsdp --fsdp_version 2` shards a replicated student."""
        if world_size() == 1 or os.environ.get(LAUNCHED_FSDP) != "true":
            return self
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise SpikelmError("FSDP 1 is not supported: accelerate launch --use_fsdp --fsdp_version 2")
        offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        return self if self.student != "replicated" else replace(self, student="offloaded" if offload else "sharded")


class UnderObjective(nn.Module):
    """The student with the whole objective as its forward pass: (batch, num_items) -> terms.

    So everything that trains, projections beside the student and mixers called by themselves included, is used within
    the forward pass of the module that is wrapped, where gradients are shared and parameters gathered.
    """

    def __init__(self, student: nn.Module, terms_of: Callable[[Mapping[str, Tensor], Any], Terms]) -> None:
        super().__init__()
        self.student = student
        self._terms_of = terms_of

    def forward(self, batch: Mapping[str, Tensor], num_items: Tensor | float | None) -> Terms:
        """Only the loss keeps its graph. A batch that is a filler says so to sharing.sum_over_parts alone."""
        with part_of_batch(FILLER in batch):
            terms = self._terms_of({name: value for name, value in batch.items() if name != FILLER}, num_items)
        return {name: value if name == "loss" else value.detach() for name, value in terms.items()}


def wrapped(module: UnderObjective, place: Place, device: torch.device) -> nn.Module:
    """What the trainer calls: DistributedDataParallel, or the module itself where `sharded` has it in parts."""
    if place != "replicated":
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,  # a mixer's matrix needs no output projection, a spiking layer may be silent
    )


@contextmanager
def sharded(
    module: nn.Module, model: nn.Module, place: Place, device: torch.device, called: Collection[str] = ()
) -> Iterator[None]:
    """Within the context the parameters of `module`, the model or what wraps it, lie in parts; they are whole after it.

    What an error ends stays in parts: to gather them would wait for processes that may be gone.

    Args:
        model: whose decoder layers are gathered one at a time; what is outside of them stays gathered during a step.
        device: of this process.
        called: methods that an objective calls by themselves, outside of a layer's forward pass. What has one of them
            is gathered by itself.
    """
    layers = _layers(model)
    # transformers asks an encoder's own class for its hidden states, and sharding changes that.
    if module is model and not layers:
        raise SpikelmError(
            f"a {type(model).__name__} has no decoder layers to shard: parallel.teacher must be replicated"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method

    cuda = device.type == "cuda"
    before = [_Undo(each) for each in module.modules()]
    originals = dict(module.named_parameters())
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size(),))}
    if place == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
    for layer in layers:
        for part in reversed(list(layer.modules())):  # what is within a part comes before it
            if part is not layer and any(hasattr(part, name) for name in called):
                fully_shard(part, **options)
                for name in CALLED:
                    if hasattr(part, name):
                        register_fsdp_forward_method(part, name)
        fully_shard(layer, **options)
    fully_shard(module, **options)
    for parameter in originals.values():
        parameter.data = parameter.data.new_empty(0)  # kept for its identity: the parts hold the values now
    for each in before:
        each.remember_what_is_new()
    yield
    values = {name: whole(parameter.detach()) for name, parameter in module.named_parameters()}
    for each in before:
        each.undo()
    for name, parameter in originals.items():
        parameter.data, parameter.grad = values[name].to(device), None


class _Undo:
    """A module's class, tables and attributes as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.tables = {name: table.copy() for name in TABLES if (table := module.__dict__.get(name)) is not None}
        self.names = set(module.__dict__)
        self.hooks = self._hooks()
        self.added: set[Any] = set()
        self.added_hooks: set[tuple[str, Any]] = set()

    def remember_what_is_new(self) -> None:
        self.added = set(self.module.__dict__) - self.names
        self.added_hooks = self._hooks() - self.hooks

    def undo(self) -> None:
        self.module.__class__ = self.kind
        for name in self.added:
            self.module.__dict__.pop(name, None)
        for table, key in self.added_hooks:
            self.module.__dict__[table].pop(key, None)
        self.module.__dict__.update(self.tables)
        # torch keeps a table of what was ever sharded, and has no word for taking it back.
        _composable_state._module_state_mapping.pop(self.module, None)

    def _hooks(self) -> set[tuple[str, Any]]:
        return {(table, key) for table in HOOKS for key in self.module.__dict__.get(table) or ()}


def is_part(tensor: object) -> bool:
    """Whether a tensor lies in parts on the processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in parts, gathered on every process; any other as it is."""
    gathered: Any = tensor
    return gathered.full_tensor() if is_part(tensor) else tensor


def for_a_file(value: Any, gathered: dict[int, Tensor] | None = None) -> Any:
    """A state dict, or anything in one, with whole tensors on the CPU; those of the first process are for saving.

    All processes call it together. Tensors that are one stay one.
    """
    gathered = {} if gathered is None else gathered
    if isinstance(value, Tensor):
        if id(value) not in gathered:
            found = whole(value.detach())
            gathered[id(value)] = found.cpu() if is_first() else found.new_empty(0)
        return gathered[id(value)]
    if isinstance(value, Mapping):
        return {name: for_a_file(each, gathered) for name, each in value.items()}
    return [for_a_file(each, gathered) for each in value] if isinstance(value, list) else value


def in_parts(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole optimizer state dict with the moments split like the parameters that they belong to."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split: dict[int, dict[str, Any]] = {}
    for number, moments in state["state"].items():
        like = parameters[number]
        split[number] = {
            name: distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)
            if is_part(like) and isinstance(value, Tensor) and value.shape == like.shape
            else value
            for name, value in moments.items()
        }
    return {**state, "state": split}


@torch.no_grad()
def same_on_all(model: nn.Module) -> None:
    """Every process takes the first one's parameters and buffers."""
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.distributed.broadcast(tensor.data, 0)


def _layers(model: nn.Module) -> list[nn.Module]:
    """A decoder's; none of an encoder at equilibrium, whose layers run many times in one pass: it is gathered whole."""
    try:
        return list(decoder_layers(model))
    except SpikelmError:
        return []
