"""Measures of a spike tensor [T, *]: time on axis 0, any neuron axes behind it, binary, ternary or integer spikes.

Taken are bool, int8 to int64, uint8, float16, bfloat16, float32 and float64. A mean over nothing (T = 0, or no neuron)
is NaN; without two spikes of a neuron there is no interval.
"""

import math

import torch

from spikelm.errors import SpikelmError


def firing_rate(spikes: torch.Tensor) -> torch.Tensor:
    """Mean of \\|s\\| over time for each neuron: [T, *] -> [*], float32 (float64 for float64). T = 0 gives NaN.

    In units of one spike a step: within [0, 1] for binary and ternary spikes, [0, D] for integers up to D, and there
    the number of accumulations a step that a projection behind the neuron pays. Differentiable.
    """
    _check(spikes)
    return spikes.to(torch.float64 if spikes.dtype == torch.float64 else torch.float32).abs().mean(0)


def sparsity(spikes: torch.Tensor) -> float:
    """Share of zeros among all entries of [T, *], within [0, 1]; NaN without entries."""
    _check(spikes)
    return 1 - int(spikes.count_nonzero()) / spikes.numel() if spikes.numel() else math.nan


def inter_spike_intervals(spikes: torch.Tensor) -> torch.Tensor:
    """Steps between successive spikes (s != 0) of the same neuron: [T, *] -> [intervals], int64, each >= 1.

    Neuron after neuron, in time order within each. A neuron with n spikes has n - 1 intervals; signs and sizes of the
    spikes do not matter.
    """
    _check(spikes)
    by_neuron = spikes.detach().reshape(len(spikes), math.prod(spikes.shape[1:])).T
    neuron, step = by_neuron.nonzero(as_tuple=True)
    return step.diff()[neuron[1:] == neuron[:-1]]


def entropy(spikes: torch.Tensor) -> float:
    """Shannon entropy in bits of the distribution of spike values over all entries of [T, *]; NaN without entries.

    0 where every entry has the same value; at most log2 of the number of values, such as log2(3) for ternary spikes.
    Entries count as independent draws: this is the cost of a spike under an ideal code that knows the rates alone.
    """
    _check(spikes)
    if not spikes.numel():
        return math.nan
    share = spikes.detach().unique(return_counts=True)[1].double() / spikes.numel()
    return float(-(share * share.log2()).sum()) + 0.0  # no -0.0 for a single value


def _check(spikes: torch.Tensor) -> None:
    if not isinstance(spikes, torch.Tensor) or spikes.is_complex() or spikes.dim() == 0:
        given = f"{spikes.dtype} {list(spikes.shape)}" if isinstance(spikes, torch.Tensor) else type(spikes).__name__
        raise SpikelmError(f"spikes must be a real tensor [T, *] with time on axis 0; got {given}")
    if bool(spikes.isnan().any()):
        raise SpikelmError(
            f"spikes must be numbers; got {int(spikes.isnan().sum())} NaN among {spikes.numel()} entries"
        )
