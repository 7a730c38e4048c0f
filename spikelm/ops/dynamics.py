"""A neuron as data: which equations one step of it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from spikelm.errors import SpikelmError
from spikelm.ops.kernel import Kernel, kernel_of
from spikelm.ops.surrogate import check_surrogate

Fire = Literal["binary", "ternary", "integer"]
Reset = Literal["soft", "soft_delayed", "hard"]
Inject = Literal["every", "first"]
Compensation = Literal["gradient", "blend"]


@dataclass(frozen=True)
class Dynamics:
    """One step of a neuron, for a membrane ``v``, an input ``x`` and a threshold ``V`` per channel::

        h_t = decay * v_{t-1} + x_t            inject "first": x only at the first step after a reset
        s_t = fire(h_t / V)                    binary {0, 1}; ternary {-1, 0, 1}; integer {-levels..levels}
        soft:          v_t = h_t - s_t V
        soft_delayed:  v_t = h_t, and h_{t+1} = decay * v_t + x_{t+1} - s_t V
        hard:          v_t = v_reset where s_t != 0, else h_t

    Args:
        fire: the firing function. Binary fires at h >= V, ternary at |h| >= V, integer rounds half away from zero.
        surrogate_function: derivative of a step at 0, called as ``surrogate_function(h / V - 1)``: a surrogate of
            SpikingJelly (``spiking=False`` puts its smooth primitive in place of the step), or any callable whose
            gradient is taken, such as snnTorch's. Integer firing has a window, ``alpha`` high, instead.
        decay: factor on the membrane between steps, > 0 and finite (1 / tau for ATMN).
        reset: see above; ``v_reset`` belongs to "hard".
        inject: "every" step, or the "first" alone (MAR, Eq. 1).
        levels: the largest integer spike, for ``fire="integer"``.
        detach_reset: no gradient through the spike in the reset.
        sgc: for integer firing, mixes in g(x) = levels tanh(x / levels) with ``sgc_weight``, into
            the derivative alone ("gradient") or into the spike itself ("blend").

    Attributes:
        kernel: what computes it quickly, with the surrogate as it is now, or why nothing does.
    """

    fire: Fire
    surrogate_function: Callable[[torch.Tensor], torch.Tensor] | None = None
    decay: float = 1.0
    reset: Reset = "soft"
    inject: Inject = "every"
    levels: int = 1
    v_reset: float = 0.0
    detach_reset: bool = False
    alpha: float = 1.0
    sgc: Compensation | None = None
    sgc_weight: float = 0.0
    kernel: Kernel | str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {"fire": Fire, "reset": Reset, "inject": Inject, "sgc": Compensation}
        for name, choice in choices.items():
            value, accepted = getattr(self, name), get_args(choice)
            optional = "None or " if name == "sgc" else ""
            if value not in accepted and not (optional and value is None):
                raise SpikelmError(f"{name} must be {optional}one of {', '.join(accepted)}; got {value!r}")
        for name in ("decay", "alpha"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise SpikelmError(f"{name} must be a finite number > 0; got {getattr(self, name)!r}")
        if not (_is_number(self.sgc_weight) and 0 <= self.sgc_weight <= 1):
            raise SpikelmError(f"sgc_weight must be a number within [0, 1]; got {self.sgc_weight!r}")
        if not (_is_number(self.v_reset) and abs(self.v_reset) < 3.4e38):  # what float32 holds
            raise SpikelmError(f"v_reset must be a finite number within float32; got {self.v_reset!r}")
        if isinstance(self.levels, bool) or not (isinstance(self.levels, int) and self.levels >= 1):
            raise SpikelmError(f"levels must be an integer >= 1; got {self.levels!r}")
        if self.fire != "integer":
            check_surrogate(self.surrogate_function)
        object.__setattr__(self, "kernel", kernel_of(self))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
