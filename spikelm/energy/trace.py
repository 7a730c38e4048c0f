"""One pass of a model, counted: products with the spikes that enter them, neurons, and everything elementwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spikelm.energy.counter import OperationCounter
from spikelm.energy.operations import operations
from spikelm.energy.populations import (
    Population,
    emitted_spikes,
    is_neuron,
    leaks,
    repeats_of,
    restarts_of,
    states_of,
)
from spikelm.energy.products import Product, add_call, describe, merge, sides_of
from spikelm.energy.spikes import Flow, Spikes, flow_of, mark, spread, tensors_in
from spikelm.energy.time_axis import entries_taken
from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.spiking_attention import SpikingSelfAttention, StatelessBinaryIF
from spikelm.layers.ternary_linear import TernaryLinear
from spikelm.neurons import TILIF

_COUNTED = ("multiplication", "accumulation", "function")
_ENCODINGS = ("encode", "encode_sum", "steps")
_RESETS = ("reset", "reset_mem")  # of SpikingJelly, of snnTorch


@dataclass
class Work:
    """Elementwise work of one operator on one size: numbers of one pass and as executed."""

    calls: int = 0
    once: float = 0.0
    executed: float = 0.0


class Trace(OperationCounter):
    """Within it, what the model runs is counted, with the spikes that neurons emit followed to the products.

    What depends on no input (dequantising weights, rotary tables, masks of a fixed shape) is made once and not counted;
    neither are the operators inside a neuron, whose updates are. Attention on packed bits runs by matrices instead.

    Attributes:
        products: (scope, operator, shape, spiking or not) -> Product.
        populations: scope of a neuron -> Population.
        elementwise: (scope, group, kind, operator, numbers of a time step) -> Work.
        unknown: operators that nothing is known of -> calls.

    Args:
        time_steps: that the network runs; None where its neurons say it.
    """

    def __init__(self, model: nn.Module, time_steps: int | None = None) -> None:
        super().__init__(model)
        self.time_steps = time_steps
        self.products: dict[tuple[str, str, str, bool], Product] = {}
        self.populations: dict[str, Population] = {}
        self.elementwise: dict[tuple[str, str, str, str, float], Work] = {}
        self.unknown: Counter[str] = Counter()
        self._modules = dict(model.named_modules())
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._heads = {name for name, module in self._modules.items() if module is head and head is not None}
        self._silent = 0  # how deep in what is counted as a whole
        self._input_given_whole: bool | None = None  # to the first multi-step module
        self._entries_taken: set[int] = set()  # of the input's first axis

    def repeats(self) -> int:
        """How many calls make one pass, see repeats_of."""
        return repeats_of(self.populations.values(), self.time_steps)

    def restarts(self) -> int:
        """How often the neurons ran from rest to rest."""
        return restarts_of(self.populations.values())

    def takes_sequence(self) -> bool:
        """Whether the first axis of the input is time: a multi-step module gets it, or every step takes an entry."""
        repeats = self.repeats()
        stepwise = repeats > 1 and self._entries_taken == set(range(repeats))
        return stepwise or bool(self._input_given_whole)

    # ---- what is counted as a whole

    def _follow(self, name: str, module: nn.Module) -> None:
        super()._follow(name, module)
        if getattr(module, "step_mode", "s") == "m":
            entered = module.register_forward_pre_hook(
                lambda _, args, kwargs: self._enter_multi_step(args, kwargs), with_kwargs=True
            )
            self._undo.append(entered.remove)
        if is_neuron(module):
            before = module.register_forward_pre_hook(lambda *_: self._hush(1))
            after = module.register_forward_hook(
                lambda module, inputs, out: self._fired(name, module, "forward", inputs, out), always_call=True
            )
            self._undo += [before.remove, after.remove]
            for method in _ENCODINGS:
                if method in module.__dict__:  # which the counter has put there, and takes away again
                    module.__dict__[method] = self._encoding(name, module, method, module.__dict__[method])
            for method in _RESETS:
                if callable(getattr(module, method, None)):
                    self._replace(module, method, self._resetting(name, getattr(module, method)))
        if isinstance(module, BitLinear):
            self._replace(module, "unscaled", self._within(name, module.unscaled))
        if isinstance(module, TernaryLinear):
            self._replace(module, "accumulate", self._accumulation(name, module, module.accumulate))
        if isinstance(module, SpikingSelfAttention):
            self._replace(module, "_by_bits", lambda *args, module=module: module._by_matrices(*args, False)[0])

    def _replace(self, module: nn.Module, method: str, function: Callable[..., Any]) -> None:
        module.__dict__[method] = function
        self._undo.append(lambda: module.__dict__.pop(method))

    def _enter_multi_step(self, args: Any, kwargs: Any) -> None:
        """The first axis of what a multi-step module takes is time, wherever it comes from."""
        x_seq = next(tensors_in((args, kwargs)), None)
        flow = flow_of(x_seq)
        if self._silent or x_seq is None or flow is None or x_seq.dim() == 0:
            return
        if self._input_given_whole is None:
            self._input_given_whole = 0 < flow.input_length == len(x_seq)
        if flow.steps == 1:
            mark(x_seq, replace(flow, steps=len(x_seq)))

    def _resetting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._silent and name in self.populations:
                self.populations[name].rested()
            return function(*args, **kwargs)

        return run

    def _hush(self, change: int) -> None:
        self._silent += change

    def _quietly(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._silent += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._silent -= 1

    def _encoding(self, name: str, module: nn.Module, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._silent:
                return function(*args, **kwargs)
            self._silent += 1
            out = None
            try:
                out = function(*args, **kwargs)
            finally:
                self._fired(name, module, method, args, out)
            return out

        return run

    def _accumulation(self, name: str, module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(spikes: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self._quietly(function, spikes)
            if not self._silent:
                rows = spikes.reshape(-1, spikes.shape[-1])
                known = flow_of(spikes)
                found = Spikes(spikes.abs().float()) if known is None or known.spikes is None else known.spikes
                count = None if found.count is None else found.count.reshape(rows.shape)
                flow = Flow(1 if known is None else known.steps, Spikes(count, found.frames, found.span, found.signed))
                mark(rows, flow)
                self._multiply("spikelm::accumulate", "mm", (rows, module.weight.t()), out, name)
                mark(out, Flow(flow.steps))
            return out

        return run

    def _fired(self, name: str, module: nn.Module, method: str, inputs: Any, out: Any) -> None:
        """Counts a bank of neurons and marks what it has emitted."""
        self._silent -= 1
        emitted = next(tensors_in(out), None)
        if self._silent or emitted is None:
            return
        x = next(tensors_in(inputs), emitted)
        before = flow_of(x)
        several = method in ("encode", "steps") or getattr(module, "step_mode", "s") == "m"
        timed = several or isinstance(module, StatelessBinaryIF)
        steps = len(emitted) if timed and emitted.dim() else (1 if before is None else before.steps)
        spikes = self._quietly(emitted_spikes, module, method, x, emitted)
        for tensor in tensors_in((out, states_of(module))):
            mark(tensor, Flow(1 if tensor.shape == emitted.shape[1:] else steps))
        stored = getattr(module, "v_seq", None)
        if isinstance(stored, torch.Tensor):
            mark(stored, Flow(len(stored)))
        goes_on = before is not None and emitted.shape == x.shape
        mark(emitted, Flow(steps, spikes, before.input_length if before and goes_on else 0))
        self._count_neurons(name, module, method, x, emitted, spikes, len(emitted) if timed else 1)

    def _count_neurons(
        self,
        name: str,
        module: nn.Module,
        method: str,
        x: torch.Tensor,
        emitted: torch.Tensor,
        spikes: Spikes | None,
        steps: int,
    ) -> None:
        population = self.populations.setdefault(name, Population())
        frames = 1 if spikes is None else spikes.frames
        encodes = method in ("encode", "encode_sum")
        one_frame = x.numel() if encodes else emitted.numel() // max(steps, 1)
        updates = one_frame * (frames if method == "encode_sum" else steps * frames)
        population.updates += updates
        if leaks(module) and not (encodes and isinstance(module, TILIF)):
            population.leaks += updates - (one_frame if encodes else 0)
        if spikes is None or spikes.count is None:
            population.spikes = None
        elif population.spikes is not None:
            population.spikes += float(spikes.count.double().sum())
        if not encodes:  # an encoding keeps nothing
            population.stepped(steps)
            population.kept += one_frame

    # ---- operators

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        if self._silent:
            return
        flows = [flow for tensor in tensors_in((args, dict(kwargs))) if (flow := flow_of(tensor)) is not None]
        if not flows:
            return
        operator = func._schema.name
        name = operator.split("::")[1].removesuffix("_")
        first = flow_of(args[0]) if args else None
        if first is not None and first.input_length and first.input_length == len(args[0]):
            self._entries_taken.update(entries_taken(name, args[0], args))
        if sides_of(name, args) is not None and operator.startswith("aten::"):
            self._multiply(operator, name, args, out, self._scope)
        else:
            self._add_elementwise(operator, args, kwargs, out, max(flow.steps for flow in flows))
        spread(func, args, kwargs, out)

    def _multiply(self, operator: str, name: str, args: Any, out: torch.Tensor, scope: str) -> None:
        sides = sides_of(name, args)
        assert sides is not None
        both = flow_of(sides.left) is not None and flow_of(sides.right) is not None
        role = "convolution" if sides.convolution else "mixing" if both else "projection"
        if scope in self._heads and role == "projection":
            role = "head"
        module: Any = self._modules.get(scope)
        packed = isinstance(module, BitLinear) and module.packed
        stored = module.packed_weight.nbytes + module.weight_scale.nbytes if packed and not both else None
        if _adds_bias(operator, name, args, module):
            steps = max(flow.steps for side in sides[:2] if (flow := flow_of(side)) is not None)
            self._add((scope, "bias", "accumulation"), operator, out.numel(), steps)
        call = Product(scope, operator, role, describe(sides), False)
        add_call(call, sides, args, out, stored)
        key = (scope, operator, call.shape, call.spiking)
        product = self.products.get(key)
        if product is None:
            self.products[key] = call
        else:
            merge(product, call)

    def _add_elementwise(self, operator: str, args: Any, kwargs: Any, out: Any, steps: int) -> None:
        scope = self._scope
        if operator == "aten::embedding":
            self._add((scope, "embedding", "bytes"), operator, out.nbytes, 1)
            return
        group = "softmax" if "softmax" in operator else "norm" if self._is_norm(scope, operator) else "elementwise"
        for kind, number in operations(operator, args, kwargs, out):
            if kind in _COUNTED:
                self._add((scope, group, kind), operator, number, steps)
            elif kind in ("unknown", "neuron"):
                self.unknown[operator] += 1

    def _is_norm(self, scope: str, operator: str) -> bool:
        return "_norm" in operator or "norm" in type(self._modules.get(scope)).__name__.lower()

    def _add(self, key: tuple[str, str, str], operator: str, number: int, steps: int) -> None:
        entry = self.elementwise.setdefault((*key, operator, number / steps), Work())
        entry.calls += 1
        entry.once += number / steps
        entry.executed += number


def _adds_bias(operator: str, name: str, args: Any, module: Any) -> bool:
    if operator.startswith("spikelm::"):
        return module.bias is not None
    return name in ("addmm", "baddbmm", "addmv") or (name == "convolution" and args[2] is not None)
