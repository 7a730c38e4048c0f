"""What is TILIF's alone: rounding, the window, gradient compensation, ternary frames, the paper's micro-steps."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, anneal_sgc


def normal_quantiles(count: int = 1_000_001) -> torch.Tensor:
    """The normal distribution as equally likely float64 numbers, 0 among them, and no ties."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def round_half_away(ratio: float, D: int) -> float:
    return max(-D, min(D, math.copysign(math.floor(abs(ratio) + 0.5), ratio))) + 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("V", [0.25, 1.0, 4.0])
def test_ties_round_away_from_zero_and_clip(dtype: torch.dtype, V: float) -> None:
    halves = list(range(-13, 14))
    x = torch.tensor([half * V / 2 for half in halves], dtype=dtype)
    expected = [round_half_away(half / 2, 4) for half in halves]
    neuron = TILIF(v_threshold=V)
    for spikes in (neuron.encode_sum(x), neuron(x)):
        assert spikes.dtype == dtype
        assert spikes.tolist() == expected
    assert neuron.v.tolist() == [(half / 2 - s) * V for half, s in zip(halves, expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    assert len(x) > 60_000
    exact = x.double()
    expected = (exact.sign() * (exact.abs() + 0.5).floor()).clamp(-6, 6)
    assert torch.equal(TILIF(D=6).encode_sum(x).double(), expected)
    assert not torch.equal(x.round().double().clamp(-6, 6), expected)  # half to even
    assert not torch.equal((x.sign() * (x.abs() + 0.5).floor()).double().clamp(-6, 6), expected)  # sums in 16 bits
    neuron = TILIF(D=6, v_threshold=0.3)
    assert torch.equal(neuron.encode_sum(x).float(), neuron.encode_sum(x.float()))


def test_the_formula_itself_is_in_float32() -> None:
    """floor(|x| + 1/2) as written: the largest float32 below 1/2 comes to 1 - 2**-25, which float32 holds as 1."""
    x = torch.tensor([0.5 - 2**-25, 0.5 - 2**-24, 1.5 - 2**-23])
    assert TILIF().encode_sum(x).tolist() == [1, 0, 1]
    assert TILIF().encode_sum(x.double()).tolist() == [0, 0, 1]


def test_encode_sum_is_a_step_from_rest_and_leaves_no_trace() -> None:
    x = 3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    neuron = TILIF(beta=0.5, num_channels=5)
    neuron.v_threshold = torch.linspace(0.3, 2.0, 5)
    first = neuron(x)
    v = neuron.v.clone()
    for _ in range(2):
        assert torch.equal(neuron.encode_sum(x), first)
        assert torch.equal(neuron.encode(x).sum(0), first)
    assert torch.equal(neuron.v, v)
    assert not torch.equal(neuron(x), first)  # the membrane has its say here


def slow_loop(
    x_seq: torch.Tensor, V: float, beta: float, D: int, alpha: float, detach_reset: bool
) -> tuple[list[float], float, list[float]]:
    """(spikes, last membrane, d spikes / d log V) of one neuron's inputs [T], number by number."""
    v = dv = 0.0
    spikes, derivatives = [], []
    for x in x_seq.tolist():
        h, dh = beta * v + x, beta * dv
        s = round_half_away(h / V, D)
        ds = alpha * (abs(h / V) <= D) * (dh - h) / V
        v = h - s * V
        dv = dh - s * V - (0.0 if detach_reset else ds * V)
        spikes.append(s)
        derivatives.append(ds)
    return spikes, v, derivatives


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("beta", "D", "alpha"), [(1.0, 1, 1.0), (0.7, 4, 1.0), (0.3, 2, 0.5)])
def test_multi_step_form_and_its_threshold_gradients_against_a_slow_loop(
    beta: float, D: int, alpha: float, detach_reset: bool
) -> None:
    generator = torch.Generator().manual_seed(D)
    x_seq = 3 * torch.randn(6, 7, 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(6, 7, 3, dtype=torch.float64, generator=generator)
    neuron = TILIF(
        D, beta, num_channels=3, learn_threshold=True, alpha=alpha, detach_reset=detach_reset, step_mode="m"
    ).double()
    neuron.v_threshold = torch.tensor([0.4, 0.9, 2.0], dtype=torch.float64)
    V = neuron.v_threshold.tolist()
    spikes = neuron(x_seq)
    (spikes * weights).sum().backward()
    expected = [0.0, 0.0, 0.0]
    for n in range(7):
        for c in range(3):
            slow, v, derivatives = slow_loop(x_seq[:, n, c], V[c], beta, D, alpha, detach_reset)
            assert spikes[:, n, c].tolist() == slow
            assert math.isclose(neuron.v[n, c].item(), v, abs_tol=1e-12)
            expected[c] += sum(w * d for w, d in zip(weights[:, n, c].tolist(), derivatives, strict=True))
    assert min(map(abs, expected)) > 1e-3
    torch.testing.assert_close(neuron.a.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sgc", [None, "gradient", "blend"])
def test_threshold_gradients_of_one_token(sgc: str | None) -> None:
    """dL/d log V = -sum G y f'(y), y = x / V, for each channel on its own."""
    generator = torch.Generator().manual_seed(1)
    x, G = (3 * torch.randn(50, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    neuron = TILIF(D=3, num_channels=4, learn_threshold=True, alpha=0.8, sgc=sgc, sgc_weight=0.25).double()
    neuron.v_threshold = torch.tensor([0.3, 0.7, 1.0, 2.5], dtype=torch.float64)
    y = (x / neuron.v_threshold).detach()
    (neuron.encode_sum(x) * G).sum().backward()
    slope = 0.8 * (y.abs() <= 3).double()
    if sgc is not None:
        slope = 0.75 * slope + 0.25 / (y / 3).cosh().square()
    torch.testing.assert_close(neuron.a.grad, -(G * y * slope).sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("D", "V", "alpha"), [(4, 1.0, 1.0), (1, 0.75, 0.5), (3, 2.5, 2.0)])
def test_the_window_includes_its_edges(D: int, V: float, alpha: float) -> None:
    edge = torch.tensor(D * V)
    outside = edge.nextafter(torch.tensor(math.inf))
    x = torch.stack([-outside, -edge, -V * torch.ones(()), torch.zeros(()), edge / 2, edge, outside]).requires_grad_()
    neuron = TILIF(D, v_threshold=V, alpha=alpha)
    for output in (neuron.encode_sum(x), neuron(x)):
        (gradient,) = torch.autograd.grad(output.sum(), x)
        torch.testing.assert_close(gradient, torch.tensor([0, 1, 1, 1, 1, 1, 0]) * (alpha / V))


def compensated(sgc: str | None, weight: float = 0.3) -> TILIF:
    return TILIF(D=3, v_threshold=0.8, alpha=0.5, beta=0.6, sgc=sgc, sgc_weight=weight)


def sample(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_gradient_compensation_leaves_the_spikes_alone() -> None:
    neuron, x, x_seq = compensated("gradient"), sample(200), sample(5, 40)
    neuron.step_mode = "m"
    outputs = []
    for training in (True, False):
        neuron.train(training)
        neuron.reset()
        outputs.append((neuron.encode_sum(x), neuron.encode(x), neuron(x_seq), neuron.v))
    for in_training, in_evaluation in zip(*outputs, strict=True):
        assert torch.equal(in_training, in_evaluation)
    assert torch.equal(outputs[0][0], compensated(None).encode_sum(x))


@pytest.mark.parametrize("sgc", ["gradient", "blend"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_compensated_derivative(sgc: str, weight: float) -> None:
    """(1 - w) alpha [|y| <= D] + w h'(y), h = D tanh(y / D), of both forms; in evaluation the window alone."""
    neuron, x = compensated(sgc, weight), sample(200).double().requires_grad_()
    y = x.detach() / neuron._threshold(x, 1)
    window, smooth = 0.5 * (y.abs() <= 3).double(), 1 / (y / 3).cosh().square()
    assert 0.05 < float((window == 0).double().mean()) < 0.95
    for training, expected in ((True, (1 - weight) * window + weight * smooth), (False, window)):
        neuron.train(training)
        (gradient,) = torch.autograd.grad(neuron.encode_sum(x).sum(), x)
        torch.testing.assert_close(gradient, expected / neuron.v_threshold, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_blended_value(weight: float) -> None:
    neuron, x = compensated("blend", weight).double(), sample(200).double()
    plain, y = compensated(None).encode_sum(x), x / neuron._threshold(x, 1)
    torch.testing.assert_close(neuron.encode_sum(x), (1 - weight) * plain + weight * 3 * (y / 3).tanh())
    if weight:
        assert not torch.equal(neuron.encode_sum(x), plain)
    assert torch.equal(neuron.encode(x).sum(0), plain)  # frames are spikes also in training
    assert torch.equal(neuron.eval().encode_sum(x), plain)


def operations(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> str:
    return " ".join(str(node.target) for node in make_fx(function)(x).graph.nodes)


@pytest.mark.parametrize("sgc", ["gradient", "blend"])
def test_the_evaluation_graph_holds_no_compensation(sgc: str) -> None:
    neuron = compensated(sgc)

    def forward_and_backward(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        neuron.reset()
        outputs = neuron.encode_sum(x[0]).sum() + neuron(x).sum()
        return torch.autograd.grad(outputs, x)[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        neuron.reset()
        return neuron(x), neuron.encode_sum(x[0])

    x = sample(2, 8)
    neuron.step_mode, neuron.backend = "m", "torch"
    assert "tanh" in operations(forward_and_backward, x)
    assert ("tanh" in operations(forward, x)) == (sgc == "blend")
    neuron.eval()
    for function in (forward, forward_and_backward):
        named = operations(function, x)
        assert "floor" in named
        assert "tanh" not in named


def test_annealing_needs_a_neuron_to_anneal() -> None:
    with pytest.raises(SpikelmError, match="the network holds no TILIF"):
        anneal_sgc(torch.nn.Linear(2, 2), 0.5)


def test_annealing() -> None:
    network = torch.nn.Sequential(TILIF(sgc="blend"), torch.nn.Sequential(ATMN(), TILIF(sgc="blend", sgc_weight=0.7)))
    inner = network[1][1]
    for progress, weight in ((0.0, 0.3), (0.45, 0.15), (0.9, 0.0), (1.0, 0.0)):
        assert math.isclose(anneal_sgc(network, progress), weight, abs_tol=1e-12)
        assert network[0].sgc_weight == inner.sgc_weight
        assert math.isclose(inner.sgc_weight, weight, abs_tol=1e-12)
    assert anneal_sgc(network, 0.25, start=0.8, end=0.5) == 0.4
    assert inner.sgc_weight == 0.4
    x = sample(50)
    anneal_sgc(network, 1.0)
    in_training = inner.encode_sum(x)
    assert torch.equal(in_training, inner.eval().encode_sum(x))  # at the end training computes what inference does


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"progress": -0.1}, "-0.1"),
        ({"progress": 1.5}, "1.5"),
        ({"progress": math.nan}, "nan"),
        ({"progress": 0.5, "end": 0.0}, "0.0"),
        ({"progress": 0.5, "end": 1.1}, "1.1"),
        ({"progress": 0.5, "start": 2.0}, "2.0"),
    ],
)
def test_annealing_refuses(arguments: dict, given: str) -> None:
    neuron = TILIF(sgc="blend", sgc_weight=0.6)
    with pytest.raises(SpikelmError, match=rf"progress and start must be within \[0, 1\] and end .*; got .*{given}"):
        anneal_sgc(neuron, **arguments)
    assert neuron.sgc_weight == 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_frames_keep_the_type_and_have_no_gradient(dtype: torch.dtype) -> None:
    spikes = torch.tensor([[-3, 0], [1, 2]]).to(dtype)
    frames = TILIF(D=3).to_ternary(spikes.requires_grad_() if dtype.is_floating_point else spikes)
    assert frames.dtype == dtype
    assert not frames.requires_grad
    assert frames.tolist() == [[[-1, 0], [1, 1]], [[-1, 0], [0, 1]], [[-1, 0], [0, 0]]]
    assert torch.equal(TILIF.from_ternary(frames), spikes)
    assert TILIF.from_ternary(frames).dtype == dtype


def test_frames_of_nothing() -> None:
    neuron = TILIF(D=3)
    assert neuron.to_ternary(torch.empty(0, 4)).shape == (3, 0, 4)
    assert neuron.encode(torch.empty(0, 4)).shape == (3, 0, 4)
    assert neuron.encode_sum(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("wrong", [5.0, -4.5, 0.5, math.nan, math.inf])
def test_to_ternary_refuses_what_is_no_spike(wrong: float) -> None:
    with pytest.raises(SpikelmError, match=r"to_ternary takes integers within -4..4; got values from .* to .*"):
        TILIF(D=4).to_ternary(torch.tensor([1.0, wrong, -2.0]))


def micro_steps(x: torch.Tensor, D: int, V: float, v_before: float) -> torch.Tensor:
    """The paper's inference text, literally: input |x| at the first of D steps, the sign carried beside it."""
    v, s, total = torch.full_like(x, v_before), torch.zeros_like(x), torch.zeros_like(x)
    for i in range(D):
        v = (v - V * s) + (x.abs() if i == 0 else 0.0)
        s = (v >= V).to(x.dtype)
        total = total + s
    return x.sign() * total


@pytest.mark.parametrize("V", [1.0, 0.6])
def test_the_papers_micro_steps_from_zero_are_another_function(V: float) -> None:
    """v[0] = 0 computes floor(|x| / V), which differs from TILIF on 39.8 % of N(0, V^2); v[0] = V / 2 is TILIF."""
    x, neuron = V * normal_quantiles(), TILIF(D=4, v_threshold=V)
    spikes, literal = neuron.encode_sum(x), micro_steps(x, 4, V, 0.0)
    assert math.isclose(float((literal != spikes).double().mean()), 0.398, abs_tol=5e-4)
    ratio = (x / V).abs()
    assert torch.equal(literal, x.sign() * ratio.floor().clamp(max=4))
    clear = ((ratio + 0.5) - (ratio + 0.5).round()).abs() > 1e-6
    assert float(clear.double().mean()) > 0.9999
    assert torch.equal(micro_steps(x, 4, V, V / 2)[clear], spikes[clear])


def test_figures_of_normal_input() -> None:
    """papers: mean |s| 0.763, P(s != 0) 0.617, saturation 0.006 %, error 8.3 % of the variance; D = 4, V = 1."""
    x = normal_quantiles()
    spikes = TILIF(D=4).encode_sum(x)
    assert math.isclose(float(spikes.abs().mean()), 0.763, abs_tol=1e-3)
    assert math.isclose(float((spikes != 0).double().mean()), 0.617, abs_tol=5e-4)
    assert math.isclose(float((x.abs() > 4).double().mean()), 6e-5, abs_tol=5e-6)
    assert math.isclose(float((x - spikes).square().mean() / x.square().mean()), 0.083, abs_tol=5e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float64])
def test_frames_of_every_signed_type(dtype: torch.dtype) -> None:
    spikes = torch.tensor([-4, -1, 0, 3, 4]).to(dtype)
    frames = TILIF().to_ternary(spikes)
    assert frames.dtype == dtype
    assert frames.tolist() == [[-1, -1, 0, 1, 1], [-1, 0, 0, 1, 1], [-1, 0, 0, 1, 1], [-1, 0, 0, 0, 1]]


def test_frames_where_16_bits_round() -> None:
    spikes = torch.tensor([280.0], dtype=torch.bfloat16)  # 281 is no bfloat16
    assert TILIF(D=300).to_ternary(spikes).float().sum() == 280
    assert TILIF(D=200).to_ternary(torch.tensor([-128], dtype=torch.int8)).int().sum() == -128


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64])
def test_frames_need_a_sign(dtype: torch.dtype) -> None:
    with pytest.raises(SpikelmError, match=f"takes a signed integer or floating-point tensor; got {dtype}"):
        TILIF().to_ternary(torch.ones(3).to(dtype))


def test_the_least_int8_is_out_of_range() -> None:
    with pytest.raises(SpikelmError, match=r"within -4..4; got values from -128 to 1"):
        TILIF().to_ternary(torch.tensor([-128, 1], dtype=torch.int8))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("method", ["encode", "encode_sum"])
def test_encoding_compiles_without_graph_breaks(method: str) -> None:
    neuron, x = TILIF(num_channels=3), 3 * torch.randn(5, 3)
    compiled = torch.compile(getattr(neuron, method), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), getattr(neuron, method)(x))
