"""ATMN, the adaptive ternary multi-step neuron of MAR."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from spikelm.neurons.base import DynamicsNode, check_count, check_positive
from spikelm.ops import multistep
from spikelm.ops.dynamics import Dynamics, Fire, Inject
from spikelm.ops.spike_linear import Encoder
from spikelm.ops.spike_storage import SpikeCode


class ATMN(DynamicsNode):
    r"""Adaptive ternary multi-step neuron (MAR, arXiv 2601.21503, Eq. 1-4).

    .. math::
        h_t &= I_t\,\delta(t, 0) + u_{t-1} / \tau \\
        s_t &= [h_t \ge V] - [h_t \le -V] \\
        u_t &= h_t - s_t V, \qquad V = e^{a}

    t counts internal steps; nothing crosses tokens or calls of :meth:`encode`.

    Args:
        tau: membrane time constant, > 0. 1 makes the sum of frames an exact integer code; 0.5 doubles the residual
            each step, a signed binary expansion when frame t weighs 0.5**t [ours].
        v_threshold: initial V, a float > 0.
        num_channels, channel_dim: one threshold for every index of that axis of an input [N, *].
        learn_threshold: whether a = log V is a parameter.
        T: number of frames of :meth:`encode`, >= 1. A network in step_mode "m" brings its own T.
        inject: "first" (the paper): input enters at the first step after a reset; "every" [ours]: at each step of an
            x_seq. :meth:`encode` has one input and always takes it at the first.
        frame_weight: frame t of :meth:`encode_sum` weighs frame_weight**t, > 0 [ours].
        surrogate_function: derivative of a step for each of the two thresholds, a surrogate of SpikingJelly or
            snnTorch; None is ATan(alpha=2) [ours].
        detach_reset: no gradient through the spike in the reset; the explicit V stays.
        step_mode, store_v_seq, backend: see :class:`~spikelm.neurons.base.DynamicsNode`.

    Shape:
        step_mode "s": x [N, *] -> [N, *]; "m": x_seq [T, N, *] -> [T, N, *], values in {-1, 0, 1}, the input's dtype.

    Attributes:
        started: whether a step was taken since the last reset.
    """

    fire: ClassVar[Fire] = "ternary"  # a subclass may fire otherwise: examples/mar/ablate.py

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
        channel_dim: int = -1,
    ) -> None:
        check_positive("tau", tau)
        check_positive("frame_weight", frame_weight)
        check_count("T", T)
        super().__init__(
            v_threshold=v_threshold,
            v_reset=None,
            num_channels=num_channels,
            channel_dim=channel_dim,
            learn_threshold=learn_threshold,
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
            backend=backend,
        )
        self.tau, self.T, self.inject, self.frame_weight = float(tau), T, inject, float(frame_weight)
        self.register_memory("started", False)  # no count: torch.compile would compile anew at every value of it
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
    def spike_code(self) -> SpikeCode | None:
        """The values that ``encode_sum`` has; None where frames weigh other than 1 or 1/2."""
        signed = self.fire != "binary"
        if self.frame_weight == 1 or self.T == 1:
            return SpikeCode(self.T, signed=signed)
        return SpikeCode(2**self.T - 1, 2.0 ** (1 - self.T), signed) if self.frame_weight == 0.5 else None

    def encode(self, x: torch.Tensor, spike_dtype: torch.dtype | None = None) -> torch.Tensor:
        """T ternary frames of x [*]: [T, *] in x's dtype, or in torch.int8 without gradient.

        Neither reads nor changes the membrane ``v``.
        """
        self._check_input(x, x.shape)
        threshold, dynamics = self._threshold(x, x.dim()), self._current_dynamics()
        return multistep.encode(x, threshold, dynamics, self.T, spike_dtype=spike_dtype, backend=self.backend)

    def encode_sum(self, x: torch.Tensor, spike_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The frames' weighted sum, sum_t frame_weight**t s_t, of x [*]: same shape and dtype as x.

        W @ encode_sum(x) is what a projection accumulates over the T frames of one token. With ``spike_dtype``
        torch.int8, without gradient, it is the count itself for frame_weight 1, and 2**(T - 1) times it for 0.5.
        """
        self._check_input(x, x.shape)
        threshold, dynamics = self._threshold(x, x.dim()), self._current_dynamics()
        return multistep.encode_sum(
            x, threshold, dynamics, self.T, self.frame_weight, spike_dtype=spike_dtype, backend=self.backend
        )

    def encoder(self, x: torch.Tensor) -> Encoder:
        """What :meth:`encode_sum` computes of an input like x, for a kernel that writes no sums."""
        threshold, dynamics, code = self._threshold(x, x.dim()).detach(), self._current_dynamics(), self.spike_code
        unit = None if code is None or code.bits is None else code.unit
        return Encoder(threshold, dynamics, self.T, self.frame_weight, unit)

    def fires(self, x: torch.Tensor) -> torch.Tensor:
        """1 where any of the T frames of x [*] has a spike, else 0, up to rounding: shape and dtype of x.

        The gradient, also of a silent element, is the surrogate's at the smallest \\|x\\| that fires [ours].
        """
        self._check_input(x, x.shape)
        # An input below V at the first step reaches it only where the membrane grows: h_t = x / tau^t.
        lowest = self._threshold(x, x.dim()) * min(1.0, self.tau ** (self.T - 1))
        spikes = multistep.encode_sum(x, lowest, self._current_dynamics(), 1, 1.0, backend=self.backend)
        return spikes if self.fire == "binary" else spikes * x.detach().sign()

    def spike_count(self, x: torch.Tensor) -> torch.Tensor:
        """sum_t |s_t| of x [*], 0..T: shape and dtype of x. No gradient through frames that are silent."""
        return self.encode(x).abs().sum(0)

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return (
            f"tau={self.tau:g}, T={self.T}, frame_weight={self.frame_weight:g}, inject={self.inject}, "
            f"{super().extra_repr()}"
        )
