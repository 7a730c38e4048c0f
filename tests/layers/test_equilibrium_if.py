"""One IF population: its average spiking rate against the clamp."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import SpikelmError
from spikelm.layers.equilibrium_if import EquilibriumIF
from spikelm.neurons import BinaryIF


def asr(neuron: EquilibriumIF, current: torch.Tensor, T: int) -> torch.Tensor:
    return neuron.steps(current.expand(T, *current.shape))[0].mean(0)


@given(
    T=st.integers(1, 128),
    v_threshold=st.floats(0.25, 4.0),
    currents=st.lists(st.floats(-2.0, 3.0), min_size=1, max_size=8),
    initial_membrane=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_rate_is_the_clamp_within_one_over_T(
    T: int, v_threshold: float, currents: list[float], initial_membrane: float
) -> None:
    neuron = EquilibriumIF(v_threshold, initial_membrane)
    current = torch.tensor(currents, dtype=torch.float64) * v_threshold
    gap = (asr(neuron, current, T) - neuron.rate(current)).abs().max().item()
    assert gap <= (1 - initial_membrane) / T + 1e-9


def test_half_a_threshold_at_first_halves_the_bias() -> None:
    current = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = {start: (asr(EquilibriumIF(1.0, start), current, 16) - current).mean().item() for start in (0.0, 0.5)}
    assert bias[0.0] == pytest.approx(-1 / 32, abs=1e-3) and abs(bias[0.5]) < 1e-3


def test_currents_that_change_average_out() -> None:
    current = 0.5 + 0.3 * torch.randn(256, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spikes, _ = EquilibriumIF().steps(current)
    assert (spikes.mean(0) - current.mean(0)).abs().max() <= 2 / 256  # the membrane stays within -1..1


def test_membranes_go_on() -> None:
    neuron, current = EquilibriumIF(1.0, 0.5), torch.rand(8, 3, 5, dtype=torch.float64)
    whole, last = neuron.steps(current)
    first, between = neuron.steps(current[:3])
    second, after = neuron.steps(current[3:], between)
    assert torch.equal(torch.cat((first, second)), whole) and torch.equal(after, last)


def test_is_the_public_neuron() -> None:
    current = torch.randn(16, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(EquilibriumIF().steps(current)[0], BinaryIF(step_mode="m")(current))


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.5, 2.0, 4.0])])
def test_scaled_threshold(scale: torch.Tensor) -> None:
    """Powers of 2 round nothing: the same spikes."""
    neuron, current = EquilibriumIF(1.0, 0.5), torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(neuron.steps(current)[0], neuron.steps(current / scale, scale=scale)[0])


@pytest.mark.parametrize("initial_membrane", [-0.1, 1.0, float("nan"), True])
def test_first_membrane_out_of_range(initial_membrane: float) -> None:
    with pytest.raises(SpikelmError, match=r"initial_membrane must be within \[0, 1\)"):
        EquilibriumIF(1.0, initial_membrane)
