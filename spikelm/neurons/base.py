"""What every neuron shares: SpikingJelly's contract around one Dynamics, and the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.ops import multistep, reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.multistep import BACKENDS, check_backend

_STATE = {"v", "v_seq", "started"}


class DynamicsNode(BaseNode):
    """A SpikingJelly node whose steps are those of a :class:`~spikelm.ops.dynamics.Dynamics`.

    A subclass gives the property :attr:`dynamics`. If its input enters at the first step alone, it also registers the
    memory ``started``, False: whether a step was taken since the last reset.

    Args:
        v_threshold: V, a float > 0.
        v_reset: None for the soft resets; the membrane after a hard one, which is also its first value.
        num_channels: size of ``channel_dim`` for one threshold a channel; None for a single threshold.
        channel_dim: the channels' axis in an input of one step, [N, *]: -1 for [N, *, C], 1 for [N, C, H, W].
        learn_threshold: whether log V is a parameter.
        surrogate_function: derivative of a firing step, SpikingJelly's or snnTorch's; None is ATan(alpha=2) [ours].
        detach_reset: no gradient through the spike in the reset.
        step_mode, store_v_seq: as in SpikingJelly.
        backend: "auto", the kernel of the input's device or else the reference; or one of these by name: "torch" (the
            reference), "cpu", "cupy" (CUDA).

    Shape:
        step_mode "s": x [N, *] -> [N, *]; "m": x_seq [T, N, *] -> [T, N, *]; spikes come in the input's dtype.

    Attributes:
        a: log V, shape [] or [num_channels]; None for a single fixed threshold, which stays a float.
        v: membrane, float32 (float64 for float64 input); a float before the first step.
    """

    v_seq: torch.Tensor | None

    def __init__(
        self,
        *,
        v_threshold: float,
        v_reset: float | None,
        num_channels: int | None,
        channel_dim: int,
        learn_threshold: bool,
        surrogate_function: Callable[[torch.Tensor], torch.Tensor] | None,
        detach_reset: bool,
        step_mode: str,
        store_v_seq: bool,
        backend: str,
    ) -> None:
        check_threshold(v_threshold)
        if num_channels is not None:
            check_count("num_channels", num_channels)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise SpikelmError(f"channel_dim must be an integer; got {channel_dim!r}")
        check_flag("learn_threshold", learn_threshold)
        check_flag("detach_reset", detach_reset)
        super().__init__(
            v_threshold=v_threshold,
            v_reset=v_reset,
            surrogate_function=surrogate.ATan(alpha=2.0) if surrogate_function is None else surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.num_channels, self.channel_dim = num_channels, channel_dim
        a = torch.full(() if num_channels is None else (num_channels,), math.log(v_threshold))
        if learn_threshold:
            self.a = nn.Parameter(a)
        else:
            self.register_buffer("a", None if num_channels is None else a)
        self.backend = backend

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step."""
        raise NotImplementedError(f"{type(self).__name__} has no dynamics")

    @property
    def v_threshold(self) -> float | torch.Tensor:
        """V: a float if single and fixed, else exp(a), shape [] or [num_channels]."""
        return self._v_threshold if self.a is None else self.a.exp()

    @v_threshold.setter
    def v_threshold(self, value: float | torch.Tensor) -> None:
        check_threshold(value)
        a = getattr(self, "a", None)  # BaseNode.__init__ assigns before it exists
        shape = () if a is None else tuple(a.shape)
        if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != shape:
            raise SpikelmError(
                f"{type(self).__name__} has a v_threshold of shape {shape}; got one of shape {tuple(value.shape)}. "
                "num_channels gives one a channel"
            )
        if a is None:
            self._v_threshold = float(value)
        else:
            with torch.no_grad():
                a.copy_(torch.as_tensor(value, dtype=a.dtype, device=a.device).log())

    @property
    def backend(self) -> str:
        """Where the steps are computed."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        check_backend(value)
        self._backend = value

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Accepted by SpikingJelly's set_backend where that exists."""
        return BACKENDS

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _STATE:
            self.__dict__["_known"] = None

    def _current_dynamics(self) -> Dynamics:
        """:attr:`dynamics`, built anew only after an attribute of the neuron or its surrogate has changed."""
        if torch.compiler.is_compiling():
            return self.dynamics  # what it is built from is guarded; a cache would be guarded too, and filled once
        function = self.surrogate_function
        settings = (getattr(function, "alpha", None), getattr(function, "spiking", None))
        known: tuple[Any, Dynamics] | None = self.__dict__.get("_known")
        if known is None or known[0] != settings:
            known = self.__dict__["_known"] = (settings, self.dynamics)
        return known[1]

    def materialize_states(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """SpikingJelly 2's hook: a fresh or wrongly shaped membrane starts every state anew."""
        x = inputs[0]
        v, *others = self._checked_states(x, states, step_mode)
        if not isinstance(v, torch.Tensor):
            shape = x.shape[1:] if step_mode == "m" else x.shape
            v = torch.full(shape, v, dtype=reference.state_dtype(x.dtype), device=x.device)
        return (v, *others)

    def _checked_states(self, x: torch.Tensor, states: tuple[Any, ...], step_mode: str) -> tuple[Any, ...]:
        """The states that go with x; a fresh membrane stays the number that it is everywhere."""
        if isinstance(x, torch.fx.Proxy):
            raise SpikelmError(
                f"{type(self).__name__} cannot be traced symbolically, as an export to NIR does; "
                "spikelm.interop.nir.to_spikingjelly puts in SpikingJelly's nodes, which can"
            )
        if step_mode == "m" and x.dim() < 2:
            raise SpikelmError(f"step_mode 'm' takes x_seq [T, N, *]; got shape {tuple(x.shape)}")
        shape = x.shape[1:] if step_mode == "m" else x.shape
        self._check_input(x, shape)
        v, *others = states
        if isinstance(v, torch.Tensor) and v.shape == shape:
            return (v.to(device=x.device, dtype=reference.state_dtype(x.dtype)), *others)
        return tuple(self._memories_rv.values()) if isinstance(v, torch.Tensor) else states

    def single_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
        """One step with explicit states: v [N, *] (or a number, everywhere) first, then the other memories."""
        (spikes,), states = self.multi_step_functional_forward((inputs[0].unsqueeze(0),), states)
        return (spikes.squeeze(0),), states

    def multi_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
        """All steps of x_seq [T, N, *] with explicit states."""
        x_seq, memories = inputs[0], dict(zip(self._memories, states, strict=True))
        v, started = memories["v"], memories.get("started", False)
        fresh = not isinstance(v, torch.Tensor)
        spikes, memories["v"] = multistep.multi_step(
            x_seq,
            None if fresh else v,
            self._threshold(x_seq, x_seq.dim() - 1),
            self._current_dynamics(),
            start=v if fresh else 0.0,
            started=started,
            backend=self.backend,
        )
        if "started" in memories:
            memories["started"] = started or len(x_seq) > 0
        return (spikes,), tuple(memories.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, *] in step_mode "s", x_seq [T, N, *] in "m"."""
        return self.single_step_forward(x) if self.step_mode == "s" else self.multi_step_forward(x)

    # SpikingJelly 2 has these two; 0.0.0.0.14 has other ones, built on methods that this class does not define.

    def single_step_forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step of x [N, *], carrying the states from earlier calls."""
        states = self._checked_states(x, tuple(self._memories.values()), "s")
        (spikes,), states = self.single_step_functional_forward((x,), states)
        self._memories.update(zip(self._memories, states, strict=True))
        if self.store_v_seq:
            earlier, v = self.v_seq, self.v
            if earlier is None or (earlier.shape[1:], earlier.dtype, earlier.device) != (v.shape, v.dtype, v.device):
                earlier = v.new_empty(0, *v.shape)
            self.v_seq = torch.cat((earlier, v.unsqueeze(0)))
        return spikes

    def multi_step_forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """All steps of x_seq [T, N, *], carrying the states from earlier calls."""
        states = self._checked_states(x_seq, tuple(self._memories.values()), "m")
        membranes: torch.Tensor | None = None
        if self.store_v_seq:
            spikes, membranes, states = self._step_by_step(x_seq, states)
        else:
            (spikes,), states = self.multi_step_functional_forward((x_seq,), states)
        self._memories.update(zip(self._memories, states, strict=True))
        if membranes is not None:  # after the others: in SpikingJelly 0.0.0.0.14 it is a memory too
            self.v_seq = membranes
        return spikes

    def _step_by_step(
        self, x_seq: torch.Tensor, states: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        """Spikes, the membrane after every step, both [T, N, *], and the states."""
        if len(x_seq) == 0:
            (spikes,), states = self.multi_step_functional_forward((x_seq,), states)
            return spikes, x_seq.new_empty(x_seq.shape, dtype=reference.state_dtype(x_seq.dtype)), states
        steps, membranes = [], []
        for x in x_seq.unbind(0):
            (spikes,), states = self.single_step_functional_forward((x,), states)
            steps.append(spikes)
            membranes.append(states[0])
        return torch.stack(steps), torch.stack(membranes), states

    def _threshold(self, x: torch.Tensor, frame_dims: int) -> torch.Tensor:
        """V in the state's type, shaped to broadcast over a frame [N, *] of ``frame_dims`` axes."""
        dtype = reference.state_dtype(x.dtype)
        if self.a is None:
            # A tensor on the device: CUDA would multiply by the reciprocal of a plain number, and miss ties.
            return torch.full((), self._v_threshold, dtype=dtype, device=x.device)
        V = self.a.to(dtype).exp()
        behind = (frame_dims if self.channel_dim >= 0 else 0) - 1 - self.channel_dim
        return V.view(-1, *[1] * behind) if V.dim() and behind else V

    def _check_input(self, x: torch.Tensor, frame_shape: torch.Size) -> None:
        if not x.is_floating_point():
            raise SpikelmError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        if self.num_channels is None:
            return
        there = -len(frame_shape) <= self.channel_dim < len(frame_shape)
        if not there or frame_shape[self.channel_dim] != self.num_channels:
            axis = "the last axis" if self.channel_dim == -1 else f"axis {self.channel_dim}"
            raise SpikelmError(
                f"{type(self).__name__} has {self.num_channels} channels on {axis}; got input of shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        threshold = f"v_threshold={self._v_threshold:g}" if self.a is None else f"num_channels={self.num_channels}"
        axis = "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        return (
            f"{threshold}{axis}, detach_reset={self.detach_reset}, step_mode={self.step_mode}, backend={self.backend}"
        )


def set_backend(net: nn.Module, backend: str) -> None:
    """Sets the backend of every spikelm neuron in ``net``; SpikingJelly 2 has no such function any more.

    Raises:
        SpikelmError: unknown backend, or ``net`` holds no spikelm neuron. Nothing is changed then.
    """
    neurons = [module for module in net.modules() if isinstance(module, DynamicsNode)]
    if not neurons:
        raise SpikelmError(f"set_backend({backend!r}): the network holds no spikelm neuron")
    for neuron in neurons:
        neuron.backend = backend


def check_threshold(value: float | torch.Tensor) -> None:
    """A float, or a floating-point tensor, that float32 holds as positive normal numbers."""
    limits = torch.finfo(torch.float32)
    accepted = f"v_threshold must be a float within [{limits.tiny:.4g}, {limits.max:.4g}]"
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, float) or not limits.tiny <= value <= limits.max:
            raise SpikelmError(f"{accepted}; got {value!r}")
    elif not value.is_floating_point():
        raise SpikelmError(f"{accepted}, or a tensor of such; got {value.dtype}")
    elif not bool(((value >= limits.tiny) & (value <= limits.max)).all()):
        smallest, largest = float(value.min()), float(value.max())
        raise SpikelmError(f"{accepted}, or a tensor of such; got values from {smallest:g} to {largest:g}")


def check_positive(name: str, value: float) -> None:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise SpikelmError(f"{name} must be a finite number > 0; got {value!r}")


def check_count(name: str, value: int) -> None:
    """An integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpikelmError(f"{name} must be an integer >= 1; got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """True or False; any other object would count as one of them."""
    if not isinstance(value, bool):
        raise SpikelmError(f"{name} must be True or False; got {value!r}")


def check_beta(beta: float, allow_growth: bool) -> None:
    """A decay per step within (0, 1], or any finite one > 0 where growth is allowed."""
    check_positive("beta", beta)
    check_flag("allow_growth", allow_growth)
    if beta > 1 and not allow_growth:
        raise SpikelmError(f"beta must be within (0, 1]; got {beta!r}. allow_growth=True accepts a membrane that grows")
