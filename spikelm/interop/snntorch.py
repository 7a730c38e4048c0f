"""ATMN, TILIF and BinaryIF for snnTorch networks, in the place of ``snn.Leaky``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

try:
    import snntorch
except ModuleNotFoundError as error:
    if error.name != "snntorch":
        raise
    raise ImportError(
        "spikelm.interop.snntorch needs snnTorch: pip install 'snntorch>=1.0' (see docs/install.md)"
    ) from error

from spikelm.errors import SpikelmError
from spikelm.neurons.base import check_count, check_flag
from spikelm.ops import reference
from spikelm.ops.dynamics import Compensation, Dynamics, Fire, Reset

# isort: split
# Last: where SpikingJelly is missing, spikelm.neurons says how to install it.
from spikingjelly.activation_based import surrogate

__all__ = ["ATMN", "TILIF", "BinaryIF", "DynamicsLeaky", "reset"]

SMALLEST_THRESHOLD = 2.0**-23  # h / V and its gradient h / V**2 stay finite in float32
# Options of snn.Leaky that exist here at one value alone.
NOT_OFFERED = {
    "surrogate_disable": False,
    "inhibition": False,
    "state_quant": False,
    "graded_spikes_factor": 1.0,
    "learn_graded_spikes_factor": False,
}


class DynamicsLeaky(snntorch.Leaky):
    """snnTorch's calling convention around a :class:`~spikelm.ops.dynamics.Dynamics`; a subclass says how it fires.

    A subclass of snn.Leaky, because ``utils.reset`` and ``backprop.BPTT`` find neurons by that class. Differences from
    it: fires at h >= V (snn.Leaky: h > V); the surrogate is taken at h / V - 1 (snn.Leaky: h - V), so slopes agree at
    V = 1 and the gradient of V has a factor h / V**2; 16-bit input keeps its type in the spikes and has a float32
    membrane; a learned threshold is clamped to at least 2**-23, as beta is to [0, 1].

    Args:
        beta: factor on the membrane between steps, within [0, 1]; a number, or a tensor that broadcasts over a frame
            [N, *], such as [C] or [C, 1, 1].
        threshold: V, at least 2**-23; a number or such a tensor.
        spike_grad: derivative of a firing step, a surrogate of snnTorch or SpikingJelly; None is
            SpikingJelly's ATan(alpha=2), which has the derivative of snn.Leaky's default and can be pickled.
        init_hidden: the neuron keeps its membrane itself, and is called without one.
        learn_beta, learn_threshold: whether these are parameters or buffers.
        reset_mechanism: "subtract" V, or "zero". There is no "none".
        output: return the membrane with ``init_hidden`` too.
        reset_delay: the membrane is returned before its reset, which the next step begins with. "subtract" does not
            decay it then (BiSpikCLM, arXiv 2605.13859, Eq. 1). Otherwise every step ends with its reset.
        detach_reset: no gradient through the spike in the reset; None is as snn.Leaky: True with ``reset_delay``.

    Shape:
        input_ [N, *], mem [N, *] -> spk [N, *] in the input's dtype, mem [N, *] in float32 (float64 for float64).
        A mem of another shape starts from zeros, as in snnTorch, where ``reset_mem`` returns such a one.

    Attributes:
        mem: the last membrane, not in the state dict.
    """

    fires: ClassVar[Fire]

    def __init__(
        self,
        beta: float | torch.Tensor = 1.0,
        threshold: float | torch.Tensor = 1.0,
        spike_grad: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        init_hidden: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        output: bool = False,
        reset_delay: bool = True,
        detach_reset: bool | None = None,
        **not_offered: Any,
    ) -> None:
        name = type(self).__name__
        for option, value in not_offered.items():
            if option not in NOT_OFFERED:
                raise SpikelmError(f"{name} has no argument {option!r}")
            if isinstance(value, torch.Tensor) or value != NOT_OFFERED[option]:
                raise SpikelmError(f"{name} offers {option}={NOT_OFFERED[option]} alone; got {value!r}")
        detach_reset = reset_delay if detach_reset is None else detach_reset
        flags = {"init_hidden": init_hidden, "learn_beta": learn_beta, "learn_threshold": learn_threshold}
        flags |= {"output": output, "reset_delay": reset_delay, "detach_reset": detach_reset}
        for option, value in flags.items():
            check_flag(option, value)
        if spike_grad is not None and not callable(spike_grad):
            raise SpikelmError(f"spike_grad must be a surrogate function or None; got {spike_grad!r}")
        super().__init__(
            beta=_number_or_tensor("beta", beta, 0.0, 1.0),
            threshold=_number_or_tensor("threshold", threshold, SMALLEST_THRESHOLD, torch.finfo(torch.float32).max),
            spike_grad=spike_grad or surrogate.ATan(alpha=2.0),
            init_hidden=init_hidden,
            learn_beta=learn_beta,
            learn_threshold=learn_threshold,
            reset_mechanism=reset_mechanism,
            output=output,
            reset_delay=reset_delay,
        )
        self.detach_reset = detach_reset
        Dynamics(fire=self.fires, surrogate_function=self.spike_grad)  # refuses a surrogate here, not at the first call

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step; ``beta`` takes the place of their decay."""
        return Dynamics(
            fire=self.fires,
            surrogate_function=self.spike_grad,
            reset=self._reset,
            detach_reset=self.detach_reset,
        )

    @property
    def _reset(self) -> Reset:
        if self.reset_mechanism == "zero":
            return "hard"
        return "soft_delayed" if self.reset_delay else "soft"

    def forward(self, input_: torch.Tensor, mem: torch.Tensor | None = None) -> Any:
        """One step: (spk, mem), or spk alone with ``init_hidden`` and without ``output``."""
        if not input_.is_floating_point():
            raise SpikelmError(f"{type(self).__name__} takes a floating-point tensor; got {input_.dtype}")
        if mem is not None:
            if self.init_hidden:
                raise SpikelmError(f"{type(self).__name__} with init_hidden=True keeps its membrane; got a mem")
            self.mem = mem
        dtype = reference.state_dtype(input_.dtype)
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_, dtype=dtype)
        beta, V = self._over_frame("beta", input_).to(dtype), self._over_frame("threshold", input_).to(dtype)
        spk, self.mem = self._step(
            input_.to(dtype), self.mem.to(dtype), V.clamp(min=SMALLEST_THRESHOLD), beta.clamp(0, 1)
        )
        spk = spk.to(input_.dtype)
        return (spk, self.mem) if self.output or not self.init_hidden else spk

    def _step(
        self, x: torch.Tensor, mem: torch.Tensor, V: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dynamics = self.dynamics
        if dynamics.reset != "hard" or not self.reset_delay:
            return reference.step(x, mem, V, dynamics, decay=beta)
        _, mem = reference.step(None, mem, V, dynamics)  # the reset that was put off, without a decay
        h = mem * beta + x
        return reference.fire(h / V, dynamics), h

    def _over_frame(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """beta or threshold, once it is known to broadcast over x without making it larger."""
        value = getattr(self, name)
        sizes = zip(reversed(value.shape), reversed(x.shape), strict=False)
        if value.dim() > x.dim() or any(size not in (1, there) for size, there in sizes):
            raise SpikelmError(
                f"{name} of shape {tuple(value.shape)} does not broadcast over an input of shape {tuple(x.shape)}"
            )
        return value

    def _reset_cases(self, reset_mechanism: str) -> None:
        """snnTorch's check of the argument and of later assignments, which also accepts "none"."""
        if reset_mechanism not in ("subtract", "zero"):
            raise SpikelmError(f"reset_mechanism must be one of subtract, zero; got {reset_mechanism!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Refuses the state of a snn.Leaky that does something else: it would load, and be ignored."""
        factor = state_dict.get(f"{prefix}graded_spikes_factor")
        if factor is not None and bool((torch.as_tensor(factor) != 1).any()):
            raise SpikelmError(f"{prefix}graded_spikes_factor is offered at 1 alone; got {factor}")
        mechanism = state_dict.get(f"{prefix}reset_mechanism_val")
        if mechanism is not None and int(mechanism) != self.reset_dict[self.reset_mechanism]:
            saved = next(name for name, value in self.reset_dict.items() if value == int(mechanism))
            raise SpikelmError(
                f"{prefix.rstrip('.') or type(self).__name__} has reset_mechanism={self.reset_mechanism!r}; "
                f"got a state dict of {saved!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        shown = (
            f"{name}={value.item():g}" if value.numel() == 1 else f"{name}=[{', '.join(map(str, value.shape))}]"
            for name, value in (("beta", self.beta), ("threshold", self.threshold))
        )
        return f"{', '.join(shown)}, reset_mechanism={self.reset_mechanism}, reset_delay={self.reset_delay}"


class BinaryIF(DynamicsLeaky):
    """:class:`spikelm.neurons.BinaryIF` in snnTorch's convention: ``BinaryIF(beta=0.9)`` for ``snn.Leaky(beta=0.9)``.

    Away from h = V, spikes and membranes are those of snn.Leaky, bit for bit in float32; with two exceptions, where
    snn.Leaky takes a membrane above V for one that is due a reset, even with ``reset_delay=False``: a "subtract" that
    leaves more than V, and a "zero" that is called with such a mem. Here the reset is over then.

    Args: see :class:`DynamicsLeaky`.
    """

    fires = "binary"


class ATMN(DynamicsLeaky):
    """:class:`spikelm.neurons.ATMN` in snnTorch's convention, with beta = 1 / tau; spikes in {-1, 0, 1}.

    The input enters at every step (``inject="every"``). The paper's code of a static x is x at the first step and
    zeros at the others.

    Args: see :class:`DynamicsLeaky`. Here ``reset_delay=False`` is the default, the reset of the paper.
    """

    fires = "ternary"

    def __init__(
        self,
        beta: float | torch.Tensor = 1.0,
        threshold: float | torch.Tensor = 1.0,
        spike_grad: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        reset_delay: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(beta, threshold, spike_grad, reset_delay=reset_delay, **options)


class TILIF(DynamicsLeaky):
    """:class:`spikelm.neurons.TILIF` in snnTorch's convention; integer spikes in -D..D.

    Args: D, alpha, sgc, sgc_weight: see :class:`spikelm.neurons.TILIF`; alpha is the height of the surrogate's window,
        and there is no spike_grad. The others: see :class:`DynamicsLeaky`, with ``reset_delay=False`` as the default.
    """

    fires = "integer"

    def __init__(
        self,
        beta: float | torch.Tensor = 1.0,
        threshold: float | torch.Tensor = 1.0,
        *,
        D: int = 4,
        alpha: float = 1.0,
        sgc: Compensation | None = None,
        sgc_weight: float = 0.3,
        reset_delay: bool = False,
        **options: Any,
    ) -> None:
        if options.get("spike_grad") is not None:
            raise SpikelmError(f"TILIF has a window as its surrogate, alpha high; got {options['spike_grad']!r}")
        check_count("D", D)
        super().__init__(beta, threshold, reset_delay=reset_delay, **options)
        self.spike_grad = None  # the window is in the dynamics
        self.D, self.alpha, self.sgc, self.sgc_weight = D, alpha, sgc, sgc_weight
        self.dynamics  # noqa: B018  refuses bad arguments here rather than at the first call

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step; without compensation in eval mode."""
        return Dynamics(
            fire=self.fires,
            reset=self._reset,
            detach_reset=self.detach_reset,
            levels=self.D,
            alpha=self.alpha,
            sgc=self.sgc if self.training else None,
            sgc_weight=self.sgc_weight,
        )

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return f"D={self.D}, {super().extra_repr()}, alpha={self.alpha:g}, sgc={self.sgc}"


def reset(net: nn.Module) -> None:
    """Sets the states of every snnTorch neuron in ``net``, ours among them, to zero, off the graph.

    ``snntorch.utils.reset`` sees direct children alone, resets neurons of their kind in every other network too, and
    none of a deep copy.
    """
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron) and hasattr(module, "reset_mem"):
            module.reset_mem()


def _number_or_tensor(name: str, value: float | torch.Tensor, low: float, high: float) -> float | torch.Tensor:
    """``value``, a number as a float, once it is known to lie within [low, high]."""
    accepted = f"{name} must be a number or a floating-point tensor within [{low:.4g}, {high:.4g}]"
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise SpikelmError(f"{accepted}; got {value.dtype}")
        if not bool(((value >= low) & (value <= high)).all()):
            raise SpikelmError(f"{accepted}; got values from {float(value.min()):g} to {float(value.max()):g}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SpikelmError(f"{accepted}; got {value!r}")
    return float(value)


def _guard_nir_export() -> None:
    """Makes snnTorch's NIR export refuse these neurons.

    It would write every subclass of snn.Leaky as a nir.LIF with a hard reset. It offers no hook, and maps modules by
    one function of its own module, so that function is wrapped here; a name imported earlier is guarded too.
    """
    try:
        from snntorch import export_nir
    except ImportError:
        return  # without nir or nirtorch nothing can be exported
    extract = export_nir._extract_snntorch_module

    @functools.wraps(extract)
    def refuse_or_extract(module: nn.Module) -> Any:
        if isinstance(module, DynamicsLeaky):
            raise SpikelmError(
                f"NIR has no primitive for {type(module).__name__} of spikelm.interop.snntorch; snnTorch would export "
                "a nir.LIF with a hard reset. For spikelm.neurons see spikelm.interop.nir.to_spikingjelly"
            )
        return extract(module)

    export_nir._extract_snntorch_module = refuse_or_extract


_guard_nir_export()
