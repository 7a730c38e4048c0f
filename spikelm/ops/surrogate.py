"""The step that fires with a surrogate's gradient, which surrogates are taken, and which have a closed derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate

from spikelm.errors import SpikelmError


def heaviside(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """1 where x >= 0, else 0 (also for NaN), with the gradient of ``function``; in x's dtype.

    SpikingJelly's surrogates fire so themselves, or return their smooth primitive (``spiking=False``). Of any other
    callable the gradient alone is taken: snnTorch's fire at x > 0 and return float32.
    """
    if hasattr(function, "spiking"):
        return function(x)
    step, value = (x >= 0).to(x.dtype), function(x).to(x.dtype)
    return torch.where(value.isfinite(), step + (value - value.detach()), step)


def check_surrogate(function: Any) -> None:
    """Raises SpikelmError for what is no derivative of a step: nothing to call, a class, a count, a random draw."""
    if isinstance(function, type) or not callable(function):
        raise SpikelmError(f"surrogate_function must be an object that can be called, no class; got {function!r}")
    if hasattr(function, "max_spike_count"):
        raise SpikelmError(
            f"surrogate_function must stand for a step from 0 to 1; {function} counts spikes. "
            "fire='integer' (TILIF) does"
        )
    if isinstance(function, getattr(surrogate, "PoissonPass", ())):
        raise SpikelmError(f"surrogate_function must stand for a step from 0 to 1; {function} draws at random")


def atan_derivative(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """(alpha / 2) / (1 + (pi/2 alpha x)^2), the derivative of SpikingJelly's ATan."""
    return (x * (math.pi / 2 * alpha)).square_().add_(1).reciprocal_().mul_(alpha / 2)


def derivative_of(function: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The derivative that a spiking surrogate uses at x, out of place; None for one that is not listed."""
    if type(function) is surrogate.ATan and function.spiking:
        alpha = float(function.alpha)
        return lambda x: atan_derivative(x, alpha)
    return None
