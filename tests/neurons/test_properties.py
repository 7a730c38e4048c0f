"""What holds for every input: the properties that docs/neurons.md names, for all three neurons and all resets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikelm.neurons import ATMN, TILIF, BinaryIF, DynamicsNode

SOFT = ("ATMN every", "TILIF", "BinaryIF soft", "BinaryIF soft_delayed")
KINDS = ("ATMN first", *SOFT, "BinaryIF hard")
every_kind = pytest.mark.parametrize("kind", KINDS)

SEEDS = st.integers(0, 2**31)
STEPS = st.integers(1, 12)
LEVELS = st.integers(1, 9)
THRESHOLDS = st.floats(0.05, 5.0)
DECAYS = st.one_of(st.just(1.0), st.floats(0.1, 1.0))
RESETS = st.integers(-64, 64).map(lambda k: k / 64)
# On multiples of 1/64 float32 adds, subtracts and compares without rounding, and ties are common.
GRID_THRESHOLDS = st.integers(8, 128).map(lambda k: k / 32)  # half of one is on the grid too
HALVING_DECAYS = st.sampled_from([1.0, 0.75, 0.5, 0.25])


def build(
    kind: str, V: float = 1.0, decay: float = 1.0, D: int = 4, v_reset: float = 0.0, **arguments: object
) -> DynamicsNode:
    """A neuron in multi-step mode with a fixed threshold, unless ``arguments`` say otherwise."""
    name, _, variant = kind.partition(" ")
    arguments = {"v_threshold": V, "learn_threshold": False, "step_mode": "m", **arguments}
    if name == "ATMN":
        return ATMN(tau=1 / decay, inject=variant, **arguments)
    if name == "TILIF":
        return TILIF(D=D, beta=decay, allow_growth=True, **arguments)
    arguments["v_reset"] = v_reset if variant == "hard" else None
    return BinaryIF(beta=decay, reset_delay=variant == "soft_delayed", allow_growth=True, **arguments)


def spike_range(kind: str, D: int) -> tuple[int, int]:
    return {"ATMN": (-1, 1), "TILIF": (-D, D), "BinaryIF": (0, 1)}[kind.split()[0]]


def inputs(seed: int, V: float, *shape: int) -> torch.Tensor:
    """Normal float32 numbers a few V wide; one in three is a multiple of V / 2, where neurons have their ties."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * V * torch.randn(shape, generator=generator)
    on_tie = torch.rand(shape, generator=generator) < 1 / 3
    return torch.where(on_tie, (2 * x / V).round() * (V / 2), x)


def grid(seed: int, *shape: int, low: float = -6.0, high: float = 6.0) -> torch.Tensor:
    """Random multiples of 1/64 within [low, high], in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(round(low * 64), round(high * 64) + 1, shape, generator=generator) / 64


@every_kind
@given(SEEDS, STEPS, THRESHOLDS, DECAYS, LEVELS, st.sampled_from(["float32", "bfloat16", "float16", "float64"]), RESETS)
def test_spikes_are_integers_within_range(
    kind: str, seed: int, T: int, V: float, decay: float, D: int, dtype: str, v_reset: float
) -> None:
    neuron, x_seq = build(kind, V, decay, D, v_reset), (inputs(seed, V, T, 40) * D).to(getattr(torch, dtype))
    low, high = spike_range(kind, D)
    spikes = neuron(x_seq)
    assert spikes.dtype == x_seq.dtype
    assert spikes.shape == x_seq.shape
    assert set(spikes.unique().tolist()) <= set(range(low, high + 1))
    if hasattr(neuron, "encode"):
        frames = neuron.encode(x_seq[0])
        assert set(frames.unique().tolist()) <= {-1, 0, 1}
        assert set(neuron.encode_sum(x_seq[0]).unique().tolist()) <= set(range(-len(frames), len(frames) + 1))


@pytest.mark.parametrize("kind", ["ATMN first", *SOFT])
@given(SEEDS, STEPS, st.integers(0, 5), GRID_THRESHOLDS, LEVELS)
def test_charge_is_conserved(kind: str, seed: int, T: int, earlier: int, V: float, D: int) -> None:
    """Without leak sum x = sum V s + v_T - v_0, from any membrane v_0.

    With the delayed reset v is the membrane before it, so the spike that v_0 has fired counts and the last one not.
    """
    neuron, v_0 = build(kind, V, D=D), torch.zeros(32)
    if earlier:
        neuron(grid(seed + 1, earlier, 32))
        v_0 = neuron.v
    x_seq = grid(seed, T, 32)
    spikes = neuron(x_seq)
    subtracted = torch.cat([(v_0 >= V)[None], spikes[:-1]]) if kind == "BinaryIF soft_delayed" else spikes
    entered = x_seq if kind != "ATMN first" else x_seq[:1] * (earlier == 0)
    assert torch.equal(entered.sum(0), V * subtracted.sum(0) + neuron.v - v_0)


@pytest.mark.parametrize("kind", ["ATMN first", "ATMN every", "TILIF"])
@given(SEEDS, STEPS, THRESHOLDS, st.floats(0.3, 3.0), LEVELS)
def test_odd_symmetry(kind: str, seed: int, T: int, V: float, decay: float, D: int) -> None:
    neuron, x_seq = build(kind, V, decay, D), inputs(seed, V, T, 40)
    spikes, v = neuron(x_seq), neuron.v
    neuron.reset()
    assert torch.equal(neuron(-x_seq), -spikes)
    assert torch.equal(neuron.v, -v)
    x = x_seq[0]
    assert torch.equal(neuron.encode(-x), -neuron.encode(x))
    assert torch.equal(neuron.encode_sum(-x), -neuron.encode_sum(x))


@given(SEEDS, STEPS, THRESHOLDS, st.floats(1.0, 4.0), LEVELS)
def test_response_is_monotone(seed: int, T: int, V: float, tau: float, D: int) -> None:
    x = inputs(seed, V, 200).sort().values
    for neuron in (ATMN(tau=tau, T=T, v_threshold=V), TILIF(D=D, v_threshold=V)):
        assert bool((neuron.encode_sum(x).diff() >= 0).all())


@pytest.mark.parametrize("kind", ["BinaryIF soft", "BinaryIF soft_delayed", "BinaryIF hard"])
@given(SEEDS, st.integers(1, 16), GRID_THRESHOLDS, HALVING_DECAYS, st.integers(-64, 64).map(lambda k: k / 64))
def test_rate_of_a_constant_current_is_monotone(
    kind: str, seed: int, T: int, V: float, decay: float, v_reset: float
) -> None:
    """Exact in float64: decays of two bits, currents on a grid, at most 16 steps."""
    current = grid(seed, 200, low=-1.0, high=2 * V).double().sort().values
    rates = build(kind, V, decay, v_reset=v_reset)(current.expand(T, -1)).mean(0)
    assert bool((rates.diff() >= 0).all())


@every_kind
@given(SEEDS, st.lists(st.integers(0, 4), max_size=4), THRESHOLDS, DECAYS, LEVELS, RESETS, st.booleans())
def test_split_sequences_equal_the_whole(
    kind: str, seed: int, parts: list[int], V: float, decay: float, D: int, v_reset: float, per_channel: bool
) -> None:
    arguments = {"num_channels": 6, "learn_threshold": True} if per_channel else {}
    neuron, x_seq = build(kind, V, decay, D, v_reset, **arguments), inputs(seed, V, sum(parts) + 1, 5, 6)
    whole, v = neuron(x_seq), neuron.v
    neuron.reset()
    pieces = [neuron(part) for part in x_seq.split([*parts, 1])]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(neuron.v, v)
    neuron.reset()
    neuron.step_mode = "s"
    assert torch.equal(torch.stack([neuron(x) for x in x_seq]), whole)
    assert torch.equal(neuron.v, v)


@every_kind
@given(SEEDS, STEPS, THRESHOLDS, DECAYS, LEVELS, RESETS, st.integers(-40, 40))
def test_scale_equivariance(
    kind: str, seed: int, T: int, V: float, decay: float, D: int, v_reset: float, exponent: int
) -> None:
    """(x, V) -> (c x, c V) leaves the spikes and scales the membrane; exactly, for c a power of two."""
    c, x_seq = 2.0**exponent, inputs(seed, V, T, 40)
    neuron, scaled = build(kind, V, decay, D, v_reset), build(kind, c * V, decay, D, c * v_reset)
    assert torch.equal(scaled(c * x_seq), neuron(x_seq))
    assert torch.equal(scaled.v, c * neuron.v)


@every_kind
@given(SEEDS, STEPS, THRESHOLDS, DECAYS, LEVELS, RESETS, st.floats(1e-3, 1e3))
def test_scale_equivariance_away_from_ties(
    kind: str, seed: int, T: int, V: float, decay: float, D: int, v_reset: float, c: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_seq = 2 * V * torch.randn(T, 60, dtype=torch.float64, generator=generator)

    def run(factor: float, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        neuron = build(kind, factor * V, decay, D, factor * v_reset)
        return neuron(x_seq), neuron.v

    spikes, v = run(1.0, x_seq)
    nearby = [run(1.0, x_seq * (1 + shift))[0] for shift in (-1e-9, 1e-9)]  # a tie changes sides between them
    clear = ((nearby[0] == spikes) & (nearby[1] == spikes)).all(0)
    assert clear.sum() > 55
    scaled_spikes, scaled_v = run(c, c * x_seq)
    assert torch.equal(scaled_spikes[:, clear], spikes[:, clear])
    torch.testing.assert_close(scaled_v[clear], c * v[clear], rtol=1e-9, atol=1e-9 * c * V)


@every_kind
@given(SEEDS, STEPS, DECAYS, LEVELS, RESETS, st.permutations(range(7)), st.booleans())
def test_channels_permute(
    kind: str, seed: int, T: int, decay: float, D: int, v_reset: float, order: list[int], channels_last: bool
) -> None:
    """Permuted inputs and thresholds give permuted spikes and membranes: no channel knows of another."""
    axis = -1 if channels_last else 2
    generator = torch.Generator().manual_seed(seed)
    neurons = [
        build(kind, 1.0, decay, D, v_reset, num_channels=7, channel_dim=-1 if channels_last else 1) for _ in range(2)
    ]
    a = torch.randn(7, generator=generator)
    x_seq = inputs(seed, 1.0, T, 3, 5, 7) if channels_last else inputs(seed, 1.0, T, 3, 7, 5)
    for neuron, thresholds in zip(neurons, (a, a[order]), strict=True):
        neuron.a.data.copy_(thresholds)
    straight, permuted = neurons[0](x_seq), neurons[1](x_seq.index_select(axis, torch.tensor(order)))
    assert torch.equal(permuted, straight.index_select(axis, torch.tensor(order)))
    v = neurons[0].v.index_select(-1 if channels_last else 1, torch.tensor(order))
    assert torch.equal(neurons[1].v, v)


GOLDEN_RATES = {  # BiSpikCLM, Eq. 1 with beta = 0.9: (theta, current) -> rate over T = 2, over T = 4
    (1.0, 0.3): (0, 0.25),
    (1.0, 0.5): (0, 0.25),
    (1.0, 0.7): (0.5, 0.5),
    (1.0, 1.0): (0.5, 0.75),
    (1.0, 2.0): (1, 1),
    (1.0, 7.0): (1, 1),
    (0.7, 0.25): (0, 0.25),
    (0.7, 0.4): (0.5, 0.5),
    (0.7, 0.5): (0.5, 0.5),
    (0.7, 0.7): (0.5, 0.75),
    (0.7, 1.0): (1, 1),
    (0.7, 7.0): (1, 1),
}


@pytest.mark.parametrize(("theta", "current"), GOLDEN_RATES)
def test_golden_rates(theta: float, current: float) -> None:
    neuron = BinaryIF(beta=0.9, v_threshold=theta, reset_delay=True, step_mode="m")
    rates = []
    for T in (2, 4):
        neuron.reset()
        rates.append(float(neuron(torch.full((T, 1), current)).mean()))
    assert tuple(rates) == GOLDEN_RATES[theta, current]


@pytest.mark.parametrize(("T", "printed"), [(2, 1.9), (4, 3.439)])
@given(THRESHOLDS)
def test_golden_rates_begin_at_the_smallest_current_that_fires(T: int, printed: float, theta: float) -> None:
    """A current fires within T steps from theta / (1 + beta + .. + beta^(T-1)) on; beta = 0.9."""
    assert math.isclose(printed, sum(0.9**t for t in range(T)), rel_tol=1e-12)
    current = theta / printed * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64)
    for reset_delay in (True, False):  # before the first spike the resets are one
        neuron = BinaryIF(beta=0.9, v_threshold=theta, reset_delay=reset_delay, step_mode="m")
        assert neuron(current.expand(T, -1)).sum(0).tolist() == [0, 1]


@given(SEEDS, st.integers(1, 128), GRID_THRESHOLDS, st.booleans())
def test_rate_error_is_at_most_one_over_T(seed: int, T: int, theta: float, constant: bool) -> None:
    """IF with soft reset: |rate - clamp(mean I / theta, 0, 1)| <= 1 / T.

    For a constant current of any size, and for one that changes within [0, theta]: what a step cannot express beyond
    that is not made up for by later ones.
    """
    current = grid(seed, 1, 64).expand(T, -1) if constant else grid(seed, T, 64, low=0.0, high=theta)
    spikes = BinaryIF(v_threshold=theta, step_mode="m")(current)
    total = current.sum(0).clamp(0, T * theta)
    assert bool(((spikes.sum(0) * theta - total).abs() <= theta).all())  # times T theta: exact in float32


@given(SEEDS, LEVELS, GRID_THRESHOLDS)
def test_ternary_expansion(seed: int, D: int, V: float) -> None:
    """D ternary frames that sum to the spikes, W s == sum_i W frame_i, TILIF(x) == ATMN's count of x + sign(x) V/2."""
    neuron, x = TILIF(D=D, v_threshold=V), grid(seed, 30, low=-D * V - 1, high=D * V + 1)
    spikes = neuron.encode_sum(x)
    frames = neuron.to_ternary(spikes)
    assert frames.shape == (D, 30)
    assert set(frames.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(frames.abs().cummin(0).values, frames.abs())  # frame i fires where |s| >= i
    assert torch.equal(neuron.from_ternary(frames), spikes)
    assert torch.equal(neuron.to_ternary(neuron.from_ternary(frames)), frames)
    assert torch.equal(neuron.encode(x), frames)
    W = torch.randint(-100, 101, (8, 30), generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.int64, torch.float64):
        whole, parts = W.to(dtype) @ spikes.to(dtype), [W.to(dtype) @ frame.to(dtype) for frame in frames]
        assert torch.equal(whole, torch.stack(parts).sum(0))
    counts = ATMN(T=D, v_threshold=V, learn_threshold=False).encode_sum(x + x.sign() * (V / 2))
    assert torch.equal(counts, spikes)


NAN, INF = float("nan"), float("inf")
TINY = torch.finfo(torch.float32).tiny


def has_negative_zero(spikes: torch.Tensor) -> bool:
    return bool((spikes.signbit() & (spikes == 0)).any())


@every_kind
@given(STEPS, THRESHOLDS, DECAYS, LEVELS, st.floats(-1.0, 0.9))
def test_special_values(kind: str, T: int, V: float, decay: float, D: int, reset_in_V: float) -> None:
    """NaN never fires and stays; +-Inf fires at the top level and a hard reset clears it; no spike is -0.0."""
    neuron = build(kind, V, decay, D, reset_in_V * V)
    low, high = spike_range(kind, D)
    x_seq = torch.zeros(T + 1, 5)  # one special input, then none: what follows is the membrane's
    x_seq[0] = torch.tensor([NAN, INF, -INF, -0.0, -TINY / 2])
    spikes = neuron(x_seq)
    assert not has_negative_zero(spikes)
    assert spikes[0].tolist() == [0, high, low, 0, 0]
    assert spikes[:, 0].tolist() == [0] * (T + 1)
    assert bool(neuron.v[0].isnan())
    assert spikes[:, 2].tolist() == [low] * (T + 1)
    assert float(neuron.v[2]) == -INF
    if kind == "BinaryIF hard":
        cleared = build(kind, V, decay, D, reset_in_V * V)
        assert torch.equal(spikes[1:, 1], cleared(torch.zeros(T, 1))[:, 0])
        assert float(neuron.v[1]) == float(cleared.v)
    else:
        assert spikes[:, 1].tolist() == [high] * (T + 1)
        assert float(neuron.v[1]) == INF


@pytest.mark.parametrize("kind", ["ATMN first", "TILIF"])
@given(THRESHOLDS, st.floats(0.3, 3.0), LEVELS)
def test_special_values_of_one_token(kind: str, V: float, decay: float, levels: int) -> None:
    neuron = build(kind, V, decay, D=levels, **({"T": levels} if kind == "ATMN first" else {}))
    x = torch.tensor([NAN, INF, -INF, -0.0, -TINY / 2])
    total, frames = neuron.encode_sum(x), neuron.encode(x)
    assert total.tolist() == [0, levels, -levels, 0, 0]
    assert frames.T.tolist() == [[0] * levels, [1] * levels, [-1] * levels, [0] * levels, [0] * levels]
    assert not has_negative_zero(total)
    assert not has_negative_zero(frames)


@every_kind
@given(st.integers(1, 2**23 - 1), LEVELS)
def test_special_values_below_the_normal_numbers(kind: str, units: int, D: int) -> None:
    """Subnormal inputs count for what they are, down to the smallest threshold that a neuron takes."""
    step = 2.0**-149  # the smallest subnormal; the smallest normal number is 2**23 of them
    assert TINY == 2**23 * step
    neuron = build(kind, TINY, 1.0, D)
    x_seq = torch.tensor([units, 2**23 - units, 0], dtype=torch.float64).mul(step).float()[:, None]
    x_seq = torch.cat([x_seq, torch.zeros_like(x_seq)], 1)
    assert float(x_seq.sum()) == TINY
    spikes = neuron(x_seq)
    rounds_up = kind == "TILIF" and 2 * units >= 2**23  # from V / 2 on, and takes V away
    expected = [0, 0, 0] if kind == "ATMN first" else [1, 0, 0] if rounds_up else [0, 1, 0]
    assert spikes[:, 0].tolist() == expected
    assert spikes[:, 1].tolist() == [0, 0, 0]
    assert bool((build(kind, 1.0, 1.0, D)(x_seq) == 0).all())
