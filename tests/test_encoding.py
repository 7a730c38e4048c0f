"""Measures of spikes against slow loops and closed forms."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikelm.encoding import entropy, firing_rate, inter_spike_intervals, sparsity
from spikelm.errors import SpikelmError

MEASURES = (firing_rate, sparsity, inter_spike_intervals, entropy)
SIGNED = (torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def spike_trains(draw: Any, least: int = 0) -> torch.Tensor:
    """Integer spikes [T], [T, N] or [T, N, C] of any signed dtype, every size from ``least``."""
    shape = draw(st.lists(st.integers(least, 6), min_size=1, max_size=3))
    values = draw(st.lists(st.integers(-3, 3), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values).reshape(shape).to(draw(st.sampled_from(SIGNED)))


def trains(spikes: torch.Tensor) -> list[list[float]]:
    """Every neuron's values in time order, one list a neuron, by plain indexing."""
    steps = [step.flatten().tolist() for step in spikes]
    neurons = math.prod(spikes.shape[1:])
    return [[step[neuron] for step in steps] for neuron in range(neurons)]


@given(spike_trains())
def test_firing_rate_is_the_mean_size_of_a_neurons_spikes(spikes: torch.Tensor) -> None:
    rate = firing_rate(spikes)
    assert rate.shape == spikes.shape[1:]
    assert rate.dtype == (torch.float64 if spikes.dtype == torch.float64 else torch.float32)
    expected = [sum(map(abs, train)) / len(train) if train else math.nan for train in trains(spikes)]
    assert rate.flatten().tolist() == pytest.approx(expected, nan_ok=True)


@given(spike_trains(least=1))
def test_sparsity_is_the_share_of_zeros(spikes: torch.Tensor) -> None:
    values = spikes.flatten().tolist()
    assert sparsity(spikes) == pytest.approx(values.count(0) / len(values))


@given(spike_trains())
def test_intervals_are_those_of_each_neuron_by_itself(spikes: torch.Tensor) -> None:
    expected = []
    for train in trains(spikes):
        last = None
        for step, value in enumerate(train):
            if value:
                if last is not None:
                    expected.append(step - last)
                last = step
    intervals = inter_spike_intervals(spikes)
    assert intervals.dtype == torch.int64
    assert intervals.tolist() == expected


@given(spike_trains(least=1))
def test_entropy_is_that_of_the_counted_values(spikes: torch.Tensor) -> None:
    values = spikes.flatten().tolist()
    shares = [count / len(values) for count in Counter(values).values()]
    assert entropy(spikes) == pytest.approx(sum(-share * math.log2(share) for share in shares))


@pytest.mark.parametrize("levels", [1, 2, 3, 9])
def test_entropy_of_equally_frequent_values(levels: int) -> None:
    spikes = torch.arange(4 * levels).remainder(levels).reshape(4, levels) - levels // 2
    assert entropy(spikes) == pytest.approx(math.log2(levels))
    assert math.copysign(1, entropy(spikes)) == 1


def test_entropy_of_bernoulli_spikes() -> None:
    spikes = torch.zeros(8, 4)
    spikes[0] = 1
    assert entropy(spikes) == pytest.approx(-(1 / 8) * math.log2(1 / 8) - (7 / 8) * math.log2(7 / 8))


@pytest.mark.parametrize("period", [1, 3, 7])
def test_a_regular_neuron_has_its_period_as_every_interval(period: int) -> None:
    spikes = torch.zeros(21, 2)
    spikes[::period, 1] = -2
    assert inter_spike_intervals(spikes).unique().tolist() == [period]
    assert len(inter_spike_intervals(spikes)) == len(range(0, 21, period)) - 1
    assert firing_rate(spikes).tolist() == pytest.approx([0, 2 * len(range(0, 21, period)) / 21])


def test_minus_zero_is_no_spike() -> None:
    spikes = torch.tensor([[0.0], [-0.0], [1.0], [-0.0]])
    assert sparsity(spikes) == 0.75
    assert entropy(spikes) == pytest.approx(0.811278, abs=1e-6)
    assert inter_spike_intervals(spikes).tolist() == []


def test_bool_and_the_smallest_integer() -> None:
    spikes = torch.tensor([[True, False], [True, True]])
    assert firing_rate(spikes).tolist() == [1.0, 0.5]
    assert (sparsity(spikes), inter_spike_intervals(spikes).tolist()) == (0.25, [1])
    assert firing_rate(torch.tensor([[-128]], dtype=torch.int8)).tolist() == [128.0]  # |-128| is no int8
    assert firing_rate(torch.tensor([[200], [100]], dtype=torch.uint8)).tolist() == [150.0]


def test_half_precision_rates_are_exact_over_long_times() -> None:
    spikes = torch.ones(5001, 2, dtype=torch.float16)
    spikes[1::2] = 0
    assert firing_rate(spikes).tolist() == pytest.approx([2501 / 5001] * 2)


def test_views_are_measured_like_their_copies() -> None:
    spikes = torch.randint(-1, 2, (5, 7, 6), generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    for measure in (firing_rate, inter_spike_intervals):
        torch.testing.assert_close(measure(spikes), measure(spikes.contiguous()))


def test_firing_rate_is_differentiable_and_the_others_take_graphs() -> None:
    spikes = torch.tensor([[1.0, -2.0], [0.0, 1.0]], requires_grad=True)
    firing_rate(spikes).sum().backward()
    assert spikes.grad is not None
    assert spikes.grad.tolist() == [[0.5, -0.5], [0.0, 0.5]]
    assert not inter_spike_intervals(spikes).requires_grad
    assert (sparsity(spikes), entropy(spikes)) == (0.25, 1.5)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (0, 0), (4, 0, 2)])
def test_nothing_has_no_mean(shape: tuple[int, ...]) -> None:
    spikes = torch.zeros(shape)
    assert firing_rate(spikes).shape == shape[1:]
    assert firing_rate(spikes).isnan().all()
    assert math.isnan(sparsity(spikes))
    assert math.isnan(entropy(spikes))
    assert inter_spike_intervals(spikes).shape == (0,)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_no_spike_tensor_is_refused(measure: Callable[[Any], object]) -> None:
    with pytest.raises(SpikelmError, match=r"real tensor \[T, \*\] with time on axis 0; got torch.float32 \[\]"):
        measure(torch.tensor(1.0))
    with pytest.raises(SpikelmError, match=r"got torch.complex64 \[2\]"):
        measure(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SpikelmError, match="got list"):
        measure([[0, 1]])
    with pytest.raises(SpikelmError, match="got 1 NaN among 2 entries"):
        measure(torch.tensor([math.nan, 1.0]))
