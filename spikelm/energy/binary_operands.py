"""An assertion: every product of matrices in a model is of spikes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spikelm.energy.counter import OperationCounter
from spikelm.errors import SpikelmError

_WITH_WEIGHTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::mv": (0, 1), "aten::addmv": (1, 2)}
_OF_ACTIVATIONS = {"aten::bmm": (0, 1), "aten::baddbmm": (1, 2)}
_NOT_LOOKED_INTO = ("convolution", "scaled_dot_product", "_int_mm", "linear", "aten::dot")


class BinaryOperands(OperationCounter):
    """Within it, a product with real numbers where spikes {0, 1} belong raises SpikelmError, named.

    A product with a weight (mm, addmm) takes one binary operand, a batched product (bmm: Q K^T and A V) two. The output
    head is left out. Convolutions and fused attention, whose operands are not looked at, raise too. Attention on packed
    bits has no such product: look at a model with output_attentions=True.

    Attributes:
        checked: operator -> products that were looked at.

    Example:

    >>> with BinaryOperands(model) as operands, torch.no_grad():
    ...     model(input_ids, output_attentions=True)
    >>> operands.checked
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._left_out = {name for name, module in model.named_modules() if module is head}
        self.checked: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operator, scope = func._schema.name, self._scopes[-1] if self._scopes else ""
        places = _WITH_WEIGHTS.get(operator) or _OF_ACTIVATIONS.get(operator)
        if scope not in self._left_out and any(name in operator for name in _NOT_LOOKED_INTO):
            raise SpikelmError(f"{operator} in {scope or 'the model'}: its operands are not looked at")
        if places is not None and scope not in self._left_out:
            binary = [is_binary(args[place]) for place in places]
            if not (all(binary) if operator in _OF_ACTIVATIONS else any(binary)):
                shapes = " and ".join(str(tuple(args[place].shape)) for place in places)
                wanted = "both operands" if operator in _OF_ACTIVATIONS else "an operand"
                raise SpikelmError(f"{operator} in {scope or 'the model'} of {shapes} must have {wanted} in {{0, 1}}")
            self.checked[operator] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def is_binary(tensor: torch.Tensor) -> bool:
    """Whether every element is 0 or 1."""
    return bool(((tensor == 0) | (tensor == 1)).all())
