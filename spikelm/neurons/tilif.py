"""TILIF, the ternary-integer LIF neuron of SpikingMamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.neurons.base import DynamicsNode, check_beta, check_count
from spikelm.ops import multistep, reference
from spikelm.ops.dynamics import Compensation, Dynamics
from spikelm.ops.spike_linear import LARGEST, Encoder
from spikelm.ops.spike_storage import SpikeCode


class TILIF(DynamicsNode):
    r"""Ternary-integer LIF (SpikingMamba, arXiv 2510.04595; SI-LIF in its second version).

    .. math::
        h_t = \beta v_{t-1} + x_t, \qquad
        s_t = \mathrm{clip}\big(\mathrm{sign}(h_t) \lfloor |h_t| / V + 1/2 \rfloor, -D, D\big), \qquad
        v_t = h_t - s_t V

    The paper's form is a single step from v = 0 (:meth:`encode_sum`); the recurrence over steps is ours. The
    derivative of the firing is ``alpha`` where |h| <= D V, else 0.

    Args:
        D: the largest spike, >= 1; 1 is a ternary neuron. bfloat16 rounds integers above 256, float16 above 2048.
        beta: factor on the membrane between steps, within (0, 1].
        v_threshold: V, a float > 0.
        num_channels, channel_dim: one threshold for every index of that axis of an input [N, *].
        learn_threshold: whether log V is a parameter.
        alpha: height of the surrogate's window, > 0.
        sgc: smoothed gradient compensation in training, with h(x) = D tanh(x / D) and w = ``sgc_weight`` [ours].
            "gradient": the spike stays s, its derivative becomes (1 - w) alpha [|x| <= D] + w h'(x).
            "blend": the output itself becomes (1 - w) s + w h(x); see :func:`anneal_sgc`. Neither in eval mode.
        sgc_weight: w, within [0, 1].
        detach_reset: no gradient through the spike in the reset.
        allow_growth: accept beta > 1.
        step_mode, store_v_seq, backend: see :class:`~spikelm.neurons.base.DynamicsNode`.

    Shape:
        step_mode "s": x [N, *] -> [N, *]; "m": x_seq [T, N, *] -> [T, N, *], integers in -D..D, the input's dtype.
    """

    def __init__(
        self,
        D: int = 4,
        beta: float = 1.0,
        v_threshold: float = 1.0,
        num_channels: int | None = None,
        learn_threshold: bool = False,
        alpha: float = 1.0,
        sgc: Compensation | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str = "auto",
        channel_dim: int = -1,
        sgc_weight: float = 0.3,
        allow_growth: bool = False,
    ) -> None:
        check_count("D", D)
        check_beta(beta, allow_growth)
        super().__init__(
            v_threshold=v_threshold,
            v_reset=None,
            num_channels=num_channels,
            channel_dim=channel_dim,
            learn_threshold=learn_threshold,
            surrogate_function=None,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
            backend=backend,
        )
        self.surrogate_function = None  # the window is in the dynamics
        self.D, self.beta, self.alpha = D, float(beta), alpha
        self.sgc, self.sgc_weight = sgc, sgc_weight
        self.dynamics  # noqa: B018  refuses bad arguments here rather than at the first call

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step; without compensation in eval mode."""
        return Dynamics(
            fire="integer",
            decay=self.beta,
            levels=self.D,
            detach_reset=self.detach_reset,
            alpha=self.alpha,
            sgc=self.sgc if self.training else None,
            sgc_weight=self.sgc_weight,
        )

    @property
    def spike_code(self) -> SpikeCode | None:
        """The values that ``encode_sum`` has; None while compensation "blend" mixes real numbers in."""
        return None if self.sgc == "blend" and self.training else SpikeCode(self.D)

    def encode_sum(self, x: torch.Tensor, spike_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The spikes of one step from v = 0, the paper's form: shape and dtype of x, or torch.int8 without gradient.

        Leaves the membrane alone.
        """
        self._check_input(x, x.shape)
        return self._one_step(x, self._current_dynamics(), spike_dtype)

    def encoder(self, x: torch.Tensor) -> Encoder:
        """What :meth:`encode_sum` computes of an input like x, for a kernel that writes no spikes."""
        unit = 1.0 if self.D <= LARGEST else None
        return Encoder(self._threshold(x, x.dim()).detach(), self._current_dynamics(), unit=unit)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The D ternary frames whose sum is ``encode_sum(x)``: [D, *x.shape] in x's dtype, without gradient."""
        self._check_input(x, x.shape)
        wide = x.detach().to(reference.state_dtype(x.dtype))  # 16 bits do not hold every integer
        return self._frames(self._one_step(wide, Dynamics(fire="integer", levels=self.D), None).detach()).to(x.dtype)

    def fires(self, x: torch.Tensor) -> torch.Tensor:
        """1 where x [*] has a spike, else 0: shape and dtype of x.

        The gradient is that of a single level, also of a silent element: ``alpha / V`` within \\|x\\| <= V [ours].
        """
        self._check_input(x, x.shape)
        one_level = Dynamics(fire="integer", levels=1, alpha=self.alpha)
        return self._one_step(x, one_level, None) * x.detach().sign()

    def spike_count(self, x: torch.Tensor) -> torch.Tensor:
        """\\|s\\| of x [*], 0..D: shape and dtype of x; with sgc "blend" of what it blends."""
        return self.encode_sum(x).abs()

    def _one_step(self, x: torch.Tensor, dynamics: Dynamics, spike_dtype: torch.dtype | None) -> torch.Tensor:
        threshold = self._threshold(x, x.dim())
        return multistep.encode_sum(x, threshold, dynamics, 1, 1.0, spike_dtype=spike_dtype, backend=self.backend)

    def to_ternary(self, spikes: torch.Tensor) -> torch.Tensor:
        """Spikes [*] in -D..D as D frames [D, *]: frame i (from 1) is sign(s) where \\|s\\| >= i. No gradient.

        Raises:
            SpikelmError: an unsigned or complex type, or a value that is not an integer in -D..D.
        """
        if not spikes.dtype.is_signed or spikes.is_complex():
            raise SpikelmError(f"to_ternary takes a signed integer or floating-point tensor; got {spikes.dtype}")
        wide = spikes.detach().to(torch.float64)
        if not bool(((wide == wide.round()) & (wide.abs() <= self.D)).all()):
            raise SpikelmError(
                f"to_ternary takes integers within -{self.D}..{self.D}; got values from {wide.min().item():g} to "
                f"{wide.max().item():g}"
            )
        return self._frames(wide).to(spikes.dtype)

    def _frames(self, spikes: torch.Tensor) -> torch.Tensor:
        """The frames of spikes in a type that compares with every level exactly."""
        levels = range(1, self.D + 1)
        return torch.stack([(spikes >= i).to(spikes.dtype) - (spikes <= -i).to(spikes.dtype) for i in levels])

    @staticmethod
    def from_ternary(frames: torch.Tensor) -> torch.Tensor:
        """Sums ternary frames [D, *] back to spikes [*], in their dtype."""
        return frames.sum(0, dtype=frames.dtype)

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return f"D={self.D}, beta={self.beta:g}, alpha={self.alpha:g}, sgc={self.sgc}, {super().extra_repr()}"


def anneal_sgc(net: nn.Module, progress: float, *, start: float = 0.3, end: float = 0.9) -> float:
    """Sets sgc_weight of every TILIF in ``net``: ``start`` at progress 0, linearly to 0 at progress ``end`` [ours].

    Args:
        progress: share of the training that is done, within [0, 1].
        end: where the weight reaches 0, within (0, 1]: the rest trains on what inference computes.

    Returns:
        The weight.

    Raises:
        SpikelmError: a share outside of its range, or ``net`` holds no TILIF.
    """
    if not (0 <= progress <= 1 and 0 <= start <= 1 and 0 < end <= 1):
        raise SpikelmError(
            f"progress and start must be within [0, 1] and end within (0, 1]; got {progress!r}, {start!r} and {end!r}"
        )
    neurons: list[Any] = [module for module in net.modules() if hasattr(module, "sgc_weight")]
    if not neurons:
        raise SpikelmError("anneal_sgc: the network holds no TILIF")
    weight = start * max(0.0, 1 - progress / end)
    for neuron in neurons:  # also the TILIF of spikelm.interop.snntorch
        neuron.sgc_weight = weight
    return weight
