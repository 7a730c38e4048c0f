"""What a kernel is compiled for, and the numbers it is called with: one Dynamics in the words of cuda/steps.cuh."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from spikelm.ops.surrogate import kernel_surrogate

if TYPE_CHECKING:
    from spikelm.ops.dynamics import Dynamics


class Kernel(NamedTuple):
    """The lines that specialise the source, and the numbers decay, v_reset, scale, alpha, levels and sgc_weight.

    ``scale`` and ``alpha`` are the surrogate's (:func:`~spikelm.ops.surrogate.kernel_surrogate`); for integer firing
    the window's height and 1 / levels.
    """

    definitions: str
    numbers: tuple[float, float, float, float, float, float]

    @property
    def inject_first(self) -> bool:
        """Whether input enters at the first step alone; x then is one frame."""
        return "INJECT_FIRST 1" in self.definitions


def kernel_of(dynamics: Dynamics) -> Kernel | str:
    """The kernel of these dynamics, or why there is none."""
    scale, alpha, surrogate = float(dynamics.alpha), 1 / dynamics.levels, "WINDOW"
    if dynamics.fire == "integer":
        if dynamics.sgc == "blend" and dynamics.sgc_weight:
            return "no kernel for sgc='blend', whose spikes are no integers"
        if dynamics.levels >= 2**24:
            return f"no kernel for {dynamics.levels} levels, which float32 does not count"
    else:
        found = kernel_surrogate(dynamics.surrogate_function)
        if found is None:
            function = dynamics.surrogate_function
            name = getattr(function, "__qualname__", type(function).__qualname__)
            suffix = "" if getattr(function, "spiking", True) else ", spiking=False"
            return f"no kernel for the surrogate {name}{suffix}"
        surrogate, scale, alpha = found
    smooth = dynamics.fire == "integer" and dynamics.sgc == "gradient" and dynamics.sgc_weight > 0
    definitions = _definitions(
        dynamics.fire, dynamics.reset, surrogate, dynamics.inject == "first", dynamics.detach_reset, smooth
    )
    levels, weight = float(dynamics.levels), float(dynamics.sgc_weight)
    return Kernel(definitions, (float(dynamics.decay), float(dynamics.v_reset), scale, alpha, levels, weight))


def _definitions(fire: str, reset: str, surrogate: str, inject_first: bool, detach_reset: bool, smooth: bool) -> str:
    names = {
        "FIRE": fire.upper(),
        "RESET": reset.upper(),
        "SURROGATE": surrogate,
        "INJECT_FIRST": int(inject_first),
        "DETACH_RESET": int(detach_reset),
        "SGC": int(smooth),
    }
    return "".join(f"#define {name} {value}\n" for name, value in names.items())
