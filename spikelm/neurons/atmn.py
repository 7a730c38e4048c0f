"""ATMN, the adaptive ternary multi-step neuron of MAR."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.ops import multistep, reference
from spikelm.ops.dynamics import Dynamics, Fire, Inject

BACKENDS = ("auto", "torch")


class ATMN(BaseNode):
    r"""Adaptive ternary multi-step neuron (MAR, arXiv 2601.21503, Eq. 1-4).

    .. math::
        h_t &= I_t\,\delta(t, 0) + u_{t-1} / \tau \\
        s_t &= [h_t \ge V] - [h_t \le -V] \\
        u_t &= h_t - s_t V, \qquad V = e^{a}

    t counts internal steps; nothing crosses tokens or calls of :meth:`encode`.

    Args:
        tau: membrane time constant, > 0. 1 makes the sum of frames an exact integer code; 0.5 doubles the residual
            each step, a signed binary expansion when frame t weighs 0.5**t [ours].
        v_threshold: initial V, > 0.
        num_channels: size of the last axis for one threshold a channel; None for a single threshold.
        learn_threshold: whether a = log V is a parameter (else a buffer).
        T: number of frames of :meth:`encode`, >= 1. A network in step_mode "m" brings its own T.
        inject: "first" (the paper): input enters at the first step after a reset; "every" [ours]: at each step of an
            x_seq. :meth:`encode` has one input and always takes it at the first.
        frame_weight: frame t of :meth:`encode_sum` weighs frame_weight**t, > 0 [ours].
        surrogate_function: a SpikingJelly surrogate for each of the two thresholds; None is ATan(alpha=2) [ours].
        detach_reset: no gradient through the spike in the reset; the explicit V stays.
        step_mode, store_v_seq: as in SpikingJelly.
        backend: "auto" or "torch".

    Shape:
        step_mode "s": x [N, *] -> [N, *]; "m": x_seq [T, N, *] -> [T, N, *], values in {-1, 0, 1}, the input's dtype.

    Attributes:
        a: log of the threshold, shape [] or [num_channels].
        v: membrane, float32 (float64 for float64 input); 0.0 before the first step.
        steps_taken: steps since the last reset.
    """

    fire: ClassVar[Fire] = "ternary"

    def __init__(
        self,
        tau: float = 1.0,
        v_threshold: float = 1.0,
        num_channels: int | None = None,
        learn_threshold: bool = True,
        T: int = 4,
        inject: Inject = "first",
        frame_weight: float = 1.0,
        surrogate_function: Callable[[torch.Tensor], torch.Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str = "auto",
    ) -> None:
        _check_positive("tau", tau)
        _check_positive("v_threshold", v_threshold)
        _check_positive("frame_weight", frame_weight)
        _check_count("T", T)
        if num_channels is not None:
            _check_count("num_channels", num_channels)
        super().__init__(
            v_threshold=float(v_threshold),
            v_reset=None,
            surrogate_function=surrogate_function or surrogate.ATan(alpha=2.0),
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        a = torch.full(() if num_channels is None else (num_channels,), math.log(v_threshold))
        if learn_threshold:
            self.a = nn.Parameter(a)
        else:
            self.register_buffer("a", a)
        self.tau, self.T, self.inject, self.frame_weight = float(tau), T, inject, float(frame_weight)
        self.num_channels = num_channels
        self.backend = backend
        self.register_memory("steps_taken", 0)
        self.dynamics  # noqa: B018  refuses bad arguments here rather than at the first call

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step."""
        return Dynamics(
            fire=self.fire,
            surrogate_function=self.surrogate_function,
            decay=1.0 / self.tau,
            inject=self.inject,
            detach_reset=self.detach_reset,
        )

    @property
    def v_threshold(self) -> torch.Tensor:
        """V = exp(a), shape [] or [num_channels]."""
        return self.a.exp()

    @v_threshold.setter
    def v_threshold(self, value: float | torch.Tensor) -> None:
        if "a" not in self._parameters and "a" not in self._buffers:
            return  # BaseNode.__init__ assigns before a exists; __init__ sets it right after
        value = torch.as_tensor(value, dtype=self.a.dtype, device=self.a.device)
        if not bool((value > 0).all()):
            raise SpikelmError(f"v_threshold must be > 0; got a smallest value of {float(value.min())}")
        with torch.no_grad():
            self.a.copy_(value.log())

    @property
    def backend(self) -> str:
        """Where the steps are computed."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in BACKENDS:
            raise SpikelmError(f"backend must be one of {', '.join(BACKENDS)}; got {value!r}")
        self._backend = value

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Accepted by SpikingJelly's set_backend where that exists."""
        return BACKENDS

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """T ternary frames of x [*]: [T, *] in x's dtype. Neither reads nor changes the membrane ``v``."""
        self._check_input(x, x.shape)
        return torch.stack(reference.encode(x, self._threshold(x), self.dynamics, self.T)).to(x.dtype)

    def encode_sum(self, x: torch.Tensor) -> torch.Tensor:
        """The frames' weighted sum, sum_t frame_weight**t s_t, of x [*]: same shape and dtype as x.

        W @ encode_sum(x) is what a projection accumulates over the T frames of one token.
        """
        self._check_input(x, x.shape)
        return multistep.encode_sum(x, self._threshold(x), self.dynamics, self.T, self.frame_weight)

    def _threshold(self, x: torch.Tensor) -> torch.Tensor:
        return self.a.to(reference.state_dtype(x.dtype)).exp()

    def _check_input(self, x: torch.Tensor, frame_shape: torch.Size) -> None:
        if not x.is_floating_point():
            raise SpikelmError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        if self.num_channels is not None and (not frame_shape or frame_shape[-1] != self.num_channels):
            raise SpikelmError(
                f"{type(self).__name__} has {self.num_channels} channels on the last axis; got input of shape "
                f"{tuple(x.shape)}"
            )

    def materialize_states(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """SpikingJelly 2's hook: a fresh or wrongly shaped membrane becomes zeros, and the step count starts anew."""
        x_seq = inputs[0]
        if step_mode == "m" and x_seq.dim() == 0:
            raise SpikelmError(f"step_mode 'm' takes x_seq [T, N, *]; got shape {tuple(x_seq.shape)}")
        shape = x_seq.shape[1:] if step_mode == "m" else x_seq.shape
        self._check_input(x_seq, shape)
        v, steps_taken, *others = states
        dtype = reference.state_dtype(x_seq.dtype)
        if not isinstance(v, torch.Tensor) or v.shape != shape:
            return (torch.zeros(shape, dtype=dtype, device=x_seq.device), 0, *others)
        return (v.to(device=x_seq.device, dtype=dtype), steps_taken, *others)

    def single_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
        """One step with explicit states (v [N, *], steps_taken)."""
        x, (v, steps_taken, *others) = inputs[0], states
        current = None if self.inject == "first" and steps_taken > 0 else x.to(v.dtype)
        s, v = reference.step(current, v, self._threshold(x), self.dynamics)
        return (s.to(x.dtype),), (v, steps_taken + 1, *others)

    def multi_step_functional_forward(
        self, inputs: tuple[torch.Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
        """All steps of x_seq [T, N, *] with explicit states (v [N, *], steps_taken)."""
        spikes, membranes, states = self._multi_step(inputs[0], states)
        del membranes
        return (spikes,), states

    def multi_step_forward(self, x_seq: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """All steps of x_seq [T, N, *], carrying the membrane from earlier calls."""
        states = self.materialize_states((x_seq,), tuple(self._memories.values()), "m")
        spikes, membranes, states = self._multi_step(x_seq, states)
        self._memories.update(zip(self._memories, states, strict=True))
        if self.store_v_seq:
            self.v_seq = membranes
        return spikes

    def _multi_step(
        self, x_seq: torch.Tensor, states: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        v, steps_taken, *others = states
        spikes, membranes = reference.multi_step(x_seq, v, self._threshold(x_seq), self.dynamics, steps_taken)
        v = membranes[-1].clone() if len(membranes) else v  # a view would break reset() and detach()
        return spikes, membranes, (v, steps_taken + len(x_seq), *others)

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return (
            f"tau={self.tau}, T={self.T}, num_channels={self.num_channels}, frame_weight={self.frame_weight}, "
            f"inject={self.inject}, detach_reset={self.detach_reset}, step_mode={self.step_mode}, "
            f"backend={self.backend}"
        )


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise SpikelmError(f"{name} must be a finite number > 0; got {value!r}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpikelmError(f"{name} must be an integer >= 1; got {value!r}")
