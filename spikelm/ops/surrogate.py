"""Which surrogates have a closed derivative here; the others run on the reference through their own autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate


def atan_derivative(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """(alpha / 2) / (1 + (pi/2 alpha x)^2), the derivative of SpikingJelly's ATan."""
    return (x * (math.pi / 2 * alpha)).square_().add_(1).reciprocal_().mul_(alpha / 2)


def derivative_of(function: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The derivative that a spiking surrogate uses at x, out of place; None for one that is not listed."""
    if type(function) is surrogate.ATan and function.spiking:
        alpha = float(function.alpha)
        return lambda x: atan_derivative(x, alpha)
    return None
