"""BinaryIF, the binary integrate-and-fire neuron of BiSpikCLM and of 1/1.58-bit spiking language models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from spikelm.errors import SpikelmError
from spikelm.neurons.base import DynamicsNode, check_beta, check_flag
from spikelm.ops.dynamics import Dynamics


class BinaryIF(DynamicsNode):
    r"""Binary integrate-and-fire, leaky for beta < 1.

    .. math::
        h_t &= \beta v_{t-1} + x_t, \qquad s_t = [h_t \ge V] \\
        v_t &= h_t - s_t V \quad \text{soft;} \qquad v_t = v_{reset} \text{ where } s_t, \text{ else } h_t
        \quad \text{hard}

    With ``reset_delay`` the subtraction enters the next step and is not decayed, BiSpikCLM (arXiv 2605.13859, Eq. 1)::

        h_t = beta h_{t-1} + x_t - s_{t-1} V

    Args:
        beta: factor on the membrane between steps, within (0, 1]; 1 is IF (arXiv 2405.02543).
        v_threshold: V, a float > 0.
        v_reset: None for soft reset; a float for hard reset, which also is the first membrane.
        reset_delay: the delayed soft reset above; not with a hard reset.
        num_channels, channel_dim: one threshold for every index of that axis of an input [N, *].
        learn_threshold: whether log V is a parameter.
        surrogate_function: derivative of the step at h / V - 1, a surrogate of SpikingJelly or snnTorch; None is
            ATan(alpha=2). Firing is at h >= V with either.
        detach_reset: no gradient through the spike in the reset.
        allow_growth: accept beta > 1.
        step_mode, store_v_seq, backend: see :class:`~spikelm.neurons.base.DynamicsNode`.

    Shape:
        step_mode "s": x [N, *] -> [N, *]; "m": x_seq [T, N, *] -> [T, N, *], values in {0, 1}, the input's dtype.

    Attributes:
        v: membrane after the reset; with ``reset_delay`` before it (h of the equation).
    """

    def __init__(
        self,
        beta: float = 1.0,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        reset_delay: bool = False,
        num_channels: int | None = None,
        learn_threshold: bool = False,
        surrogate_function: Callable[[torch.Tensor], torch.Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str = "auto",
        channel_dim: int = -1,
        allow_growth: bool = False,
    ) -> None:
        check_beta(beta, allow_growth)
        check_flag("reset_delay", reset_delay)
        if v_reset is not None and not (isinstance(v_reset, float) and math.isfinite(v_reset)):
            raise SpikelmError(f"v_reset must be a finite float (hard reset) or None (soft reset); got {v_reset!r}")
        super().__init__(
            v_threshold=v_threshold,
            v_reset=v_reset,
            num_channels=num_channels,
            channel_dim=channel_dim,
            learn_threshold=learn_threshold,
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
            backend=backend,
        )
        self.beta, self.reset_delay = float(beta), reset_delay
        self.dynamics  # noqa: B018  refuses bad arguments here rather than at the first call

    @property
    def dynamics(self) -> Dynamics:
        """The equations of one step."""
        if self.reset_delay and self.v_reset is not None:
            raise SpikelmError(f"reset_delay=True is a soft reset and takes v_reset=None; got v_reset={self.v_reset!r}")
        return Dynamics(
            fire="binary",
            surrogate_function=self.surrogate_function,
            decay=self.beta,
            reset="hard" if self.v_reset is not None else "soft_delayed" if self.reset_delay else "soft",
            v_reset=self.v_reset or 0.0,
            detach_reset=self.detach_reset,
        )

    def extra_repr(self) -> str:
        """The arguments that differ between instances."""
        return f"beta={self.beta:g}, v_reset={self.v_reset}, reset_delay={self.reset_delay}, {super().extra_repr()}"
