"""Counts what a model really runs, operator by operator and module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikelm.energy.operations import Kind, operations
from spikelm.errors import SpikelmError
from spikelm.neurons import DynamicsNode


class Entry(NamedTuple):
    """Where, by which operator, and what it does."""

    scope: str
    operator: str
    kind: Kind


class OperationCounter(TorchDispatchMode):
    """Within it, the calls of operators are counted and what they do is told apart.

    Kinds are "multiplication" (products of matrices, convolutions, elementwise products, quotients and powers),
    "accumulation" (the bookkeeping of a gather too, such as counting its rows), "function" (exp, silu, ...), "neuron"
    (a kernel of spikelm), "other" (comparing, selecting, rounding, moving) and "unknown": an operator that is not known
    is never put elsewhere; see :meth:`operators`.

    Args:
        model: its modules' names become the scopes, a neuron's encoding within a projection too. Without it, and
            outside of its modules, the scope is "".

    Attributes:
        calls: Entry -> number of calls.
        numbers: Entry -> number of scalar operations; a product of matrices counts its multiply-accumulates.

    Example:

    >>> with OperationCounter(model) as counter, torch.no_grad():
    ...     model(input_ids)
    >>> counter.number("multiplication", "backbone.layers.0")
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise SpikelmError(f"model must be an nn.Module or None; got a {type(model).__name__}")
        super().__init__()
        self.model = model
        self.calls: Counter[Entry] = Counter()
        self.numbers: Counter[Entry] = Counter()
        self._scopes: list[str] = []
        self._undo: list[Callable[[], Any]] = []

    def number(self, kind: Kind, scope: str = "", *, below: bool = True) -> int:
        """Scalar operations of a kind in a scope ("" is everywhere); with the modules below it, or in it alone."""
        return sum(self.numbers[entry] for entry in self._select(kind, scope, below))

    def operators(self, kind: Kind, scope: str = "", *, below: bool = True) -> dict[str, int]:
        """Operator -> calls, e.g. {"aten::mm": 4}; arguments as of :meth:`number`."""
        found: Counter[str] = Counter()
        for entry in self._select(kind, scope, below):
            found[entry.operator] += self.calls[entry]
        return dict(found)

    def _select(self, kind: Kind, scope: str, below: bool) -> list[Entry]:
        if kind not in get_args(Kind):
            raise SpikelmError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
        modules = {} if self.model is None else dict(self.model.named_modules())
        if scope and scope not in modules:
            raise SpikelmError(f"scope must name a module of the counter's model, or be ''; got {scope!r}")
        within = scope + "." if scope else ""
        entries = [entry for entry in self.calls if entry.kind == kind]
        return [e for e in entries if e.scope == scope or (below and e.scope.startswith(within))]

    def __enter__(self) -> OperationCounter:
        if self.model is not None:
            for name, module in self.model.named_modules():
                self._follow(name, module)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._undo:
            self._undo.pop()()
        self._scopes.clear()

    def _follow(self, name: str, module: nn.Module) -> None:
        """Keeps the scope while the module runs; a bank of neurons is run by its methods, which have no hooks."""
        before = module.register_forward_pre_hook(lambda *_: self._scopes.append(name))
        after = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
        self._undo += [before.remove, after.remove]
        for method in ("encode", "encode_sum", "steps"):
            if isinstance(module, DynamicsNode) and hasattr(module, method):
                module.__dict__[method] = self._within(name, getattr(module, method))
                self._undo.append(lambda method=method: module.__dict__.pop(method))  # type: ignore[misc]

    def _within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._scopes.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return run

    def _leave(self) -> None:
        self._scopes.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # inference mode leaves composed operators whole: look at their parts
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    @property
    def _scope(self) -> str:
        return self._scopes[-1] if self._scopes else ""

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        scope, operator = self._scope, func._schema.name
        for kind, number in operations(operator, args, kwargs, out):
            entry = Entry(scope, operator, kind)
            self.calls[entry] += 1
            self.numbers[entry] += number
