"""The step that fires with a surrogate's gradient, which surrogates are taken, and which have a kernel."""

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


def kernel_surrogate(function: Any) -> tuple[str, float, float] | None:
    """The derivative's shape in cuda/steps.cuh, its scale and its alpha; None for one that has no kernel.

    Known are SpikingJelly's ATan, Sigmoid, SoftSign, SuperSpike, PiecewiseQuadratic, PiecewiseExp, Erf and Rect with
    ``spiking=True``, and snnTorch's atan, sigmoid, fast_sigmoid and straight_through_estimator.
    """
    found = _spikingjelly(function) or _snntorch(function)
    if found is None or not all(isinstance(number, float) and number == number for number in found[1:]):
        return None
    return found


def _spikingjelly(function: Any) -> tuple[str, float, float] | None:
    name, alpha = type(function).__name__, getattr(function, "alpha", None)
    if type(function) is not getattr(surrogate, name, None) or not function.spiking:
        return None  # no class of SpikingJelly's, a subclass, or its smooth primitive
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        return None
    shapes = {
        "ATan": ("ATAN", alpha / 2, math.pi / 2 * alpha),
        "Sigmoid": ("SIGMOID", float(alpha), float(alpha)),
        "SoftSign": ("INVERSE_SQUARE", alpha / 2, float(alpha)),
        "SuperSpike": ("INVERSE_SQUARE", float(alpha), 1.0),
        "PiecewiseQuadratic": ("TRIANGLE", float(alpha), float(alpha)),
        "PiecewiseExp": ("EXPONENTIAL", alpha / 2, float(alpha)),
        "Erf": ("GAUSSIAN", alpha / math.sqrt(math.pi), float(alpha)),
        "Rect": ("RECTANGLE", float(alpha), 0.5 / alpha),
    }
    return shapes.get(name)


def _snntorch(function: Any) -> tuple[str, float, float] | None:
    """snnTorch's surrogates are closures over their one parameter."""
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner")
    if getattr(function, "__module__", None) != "snntorch.surrogate":
        return None
    if name == "straight_through_estimator":
        return "RECTANGLE", 1.0, math.inf
    cells: tuple[Any, ...] = function.__closure__ or ()
    if len(cells) != 1 or isinstance(cells[0].cell_contents, bool):
        return None
    slope = cells[0].cell_contents
    if not isinstance(slope, (int, float)) or not 0 < slope < math.inf:
        return None
    shapes = {
        "atan": ("ATAN", slope / 2, math.pi / 2 * slope),
        "sigmoid": ("SIGMOID", float(slope), float(slope)),
        "fast_sigmoid": ("INVERSE_SQUARE", 1.0, float(slope)),
    }
    return shapes.get(name)
