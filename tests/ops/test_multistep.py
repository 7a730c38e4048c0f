"""multi_step, encode and encode_sum: equal to the reference on every backend, and which backend runs."""

import pytest
import torch
from spikingjelly.activation_based import surrogate

from spikelm import errors
from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError, SpikelmWarning
from spikelm.neurons import ATMN, TILIF, BinaryIF
from spikelm.ops import multistep, reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.multistep import encode, encode_sum, multi_step, use_backend

ATAN = surrogate.ATan(alpha=2.0)
TERNARY = Dynamics("ternary", ATAN, 0.75)
needs_compiler = pytest.mark.skipif(cpu_module.unavailable() is not None, reason=str(cpu_module.unavailable()))


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_SAID", set())
    monkeypatch.setattr(multistep, "_KNOWN", {})


# What is computed


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("frame_weight", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("T", [1, 4])
def test_the_gradient_of_a_sum_equals_autograd(
    T: int, tau: float, frame_weight: float, detach_reset: bool, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(T)
    dynamics = Dynamics("ternary", ATAN, 1 / tau, inject="first", detach_reset=detach_reset)
    weights = torch.randn(6, 7, 5, dtype=torch.float64, generator=generator)
    data = 3 * torch.randn(6, 7, 5, dtype=torch.float64, generator=generator)
    a = torch.linspace(-1, 1, 5, dtype=torch.float64) if per_channel else torch.tensor(0.2, dtype=torch.float64)
    results = []
    for function in (encode_sum, reference.encode_sum):
        x, log_threshold = data.clone().requires_grad_(), a.clone().requires_grad_()
        y = function(x, log_threshold.exp(), dynamics, T, frame_weight)
        (y * weights).sum().backward()
        results.append((y.detach(), x.grad, log_threshold.grad))
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("inject", ["every", "first"])
def test_two_halves_give_the_whole(inject: str, backend: str) -> None:
    """The last membrane and whether a step was taken are all that passes on; gradients pass through it too."""
    dynamics = Dynamics("integer", None, 0.9, levels=3, inject=inject)
    x = (3 * torch.randn(6, 5, 7)).requires_grad_()
    V = (torch.rand(7) + 0.5).requires_grad_()
    weights = torch.randn(6, 5, 7)
    whole, v_whole = multi_step(x, None, V, dynamics, backend=backend)
    first, v = multi_step(x[:2], None, V, dynamics, backend=backend)
    second, v = multi_step(x[2:], v, V, dynamics, started=True, backend=backend)
    assert torch.equal(torch.cat((first, second)), whole)
    assert torch.equal(v, v_whole)
    gradients = [
        torch.autograd.grad((spikes * weights).sum() + last.square().sum(), [x, V])
        for spikes, last in ((whole, v_whole), (torch.cat((first, second)), v))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_number_as_the_first_membrane(backend: str) -> None:
    x, V = torch.randn(3, 50), torch.tensor(1.0)
    dynamics = Dynamics("binary", ATAN, 0.5, reset="hard", v_reset=0.25)
    spikes, v = multi_step(x, None, V, dynamics, start=0.25, backend=backend)
    expected, v_expected = multi_step(x, torch.full((50,), 0.25), V, dynamics, backend=backend)
    assert torch.equal(spikes, expected)
    assert torch.equal(v, v_expected)
    assert multi_step(x, None, V, dynamics, keep_state=False, backend=backend)[1] is None


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    spikes, v = multi_step(x, None, torch.tensor(1.0), TERNARY, start=0.5, backend=backend)
    assert spikes.shape == shape
    assert torch.equal(v, torch.full(shape[1:], 0.5))
    spikes.sum().backward()
    assert x.grad.shape == shape
    assert encode_sum(x.detach(), torch.tensor(1.0), TERNARY, 4, 1.0, backend=backend).shape == shape
    assert encode(x.detach(), torch.tensor(1.0), TERNARY, 4, backend=backend).shape == (4, *shape)


def test_encode_injects_once_whatever_the_dynamics_say() -> None:
    x, V = 3 * torch.randn(50), torch.tensor(0.5)
    frames = encode(x, V, TERNARY, 5)
    assert torch.equal(frames, torch.stack(reference.encode(x, V, TERNARY, 5)))
    assert torch.equal(frames.sum(0), encode_sum(x, V, TERNARY, 5, 1.0))


# Spikes in eight bits


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_eight_bit_spikes(dtype: torch.dtype, backend: str) -> None:
    x = (3 * torch.randn(4, 100)).to(dtype).requires_grad_()
    V = torch.tensor(0.5, dtype=reference.state_dtype(dtype))
    dynamics = Dynamics("integer", None, 0.75, levels=100)
    spikes, v = multi_step(x, None, V, dynamics, spike_dtype=torch.int8, backend=backend)
    wide, v_wide = multi_step(x, None, V, dynamics, backend=backend)
    assert spikes.dtype == torch.int8
    assert not spikes.requires_grad
    assert torch.equal(spikes.to(dtype), wide)
    assert torch.equal(v, v_wide)
    frames = encode(x[0], V, TERNARY, 4, spike_dtype=torch.int8, backend=backend)
    assert torch.equal(frames.to(dtype), encode(x[0], V, TERNARY, 4, backend=backend))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_eight_bit_sums(backend: str) -> None:
    x, V = 3 * torch.randn(100), torch.tensor(0.5)
    count = encode_sum(x, V, TERNARY, 5, 1.0, spike_dtype=torch.int8, backend=backend)
    assert torch.equal(count.float(), encode_sum(x, V, TERNARY, 5, 1.0))
    halves = encode_sum(x, V, TERNARY, 5, 0.5, spike_dtype=torch.int8, backend=backend)
    assert torch.equal(halves.float() / 2**4, encode_sum(x, V, TERNARY, 5, 0.5))
    assert halves.abs().max() > 4
    with pytest.raises(SpikelmError, match="takes frame_weight 1 or 0.5; got 0.7"):
        encode_sum(x, V, TERNARY, 5, 0.7, spike_dtype=torch.int8, backend=backend)
    with pytest.raises(SpikelmError, match="torch.int8 holds up to 127; these spikes reach 255"):
        encode_sum(x, V, TERNARY, 8, 0.5, spike_dtype=torch.int8, backend=backend)
    with pytest.raises(SpikelmError, match="these spikes reach 128"):
        multi_step(x[None], None, V, Dynamics("integer", levels=128), spike_dtype=torch.int8, backend=backend)


def test_the_neurons_pass_eight_bits_on() -> None:
    x = 3 * torch.randn(20)
    for neuron in (ATMN(tau=0.5, frame_weight=0.5), TILIF()):
        assert neuron.encode_sum(x, spike_dtype=torch.int8).dtype == torch.int8
    assert ATMN().encode(x, spike_dtype=torch.int8).dtype == torch.int8


# Wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_seq": torch.ones(3, 4, dtype=torch.int32)}, "x must be a floating-point tensor; got torch.int32"),
        ({"threshold": torch.ones((), dtype=torch.float64)}, "threshold must be torch.float32 on cpu"),
        ({"threshold": torch.ones(5)}, r"threshold must broadcast over frames \(4,\); got shape \(5,\)"),
        ({"threshold": torch.ones(2, 4)}, r"threshold must broadcast over frames \(4,\); got shape \(2, 4\)"),
        ({"v": torch.zeros(3, 4)}, r"v must be torch.float32 of shape \(4,\) on cpu; got .* of shape \(3, 4\)"),
        ({"v": torch.zeros(4, dtype=torch.float64)}, "v must be torch.float32"),
        ({"spike_dtype": torch.int16}, r"spike_dtype must be None, torch.float32 \(the input's\) or torch.int8"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, cpu, cupy; got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrong_input(backend: str, change: dict[str, object], message: str) -> None:
    arguments = {"x_seq": torch.ones(3, 4), "v": None, "threshold": torch.ones(4), "dynamics": TERNARY}
    with pytest.raises(SpikelmError, match=message):
        multi_step(**(arguments | {"backend": backend} | change))


@pytest.mark.parametrize("T", [0, -1])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_too_few_frames(backend: str, T: int) -> None:
    x, V = torch.ones(3), torch.tensor(1.0)
    with pytest.raises(SpikelmError, match=f"T must be an integer >= 1; got {T}"):
        encode(x, V, TERNARY, T, backend=backend)
    with pytest.raises(SpikelmError, match=f"T must be an integer >= 1; got {T}"):
        encode_sum(x, V, TERNARY, T, 1.0, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrong_tensors_and_weights(backend: str) -> None:
    V = torch.tensor(1.0)
    for weight in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(SpikelmError, match=f"frame_weight must be a finite number > 0; got {weight}"):
            encode_sum(torch.ones(3), V, TERNARY, 4, weight, backend=backend)
    with pytest.raises(SpikelmError, match=r"x_seq must be \[T, N, \*\]; got a tensor without axes"):
        multi_step(V, None, V, TERNARY, backend=backend)
    with pytest.raises(SpikelmError, match="x must be a dense tensor .*; got torch.sparse_coo"):
        multi_step(torch.eye(3).to_sparse(), None, V, TERNARY, backend=backend)


# Which backend runs


@needs_compiler
def test_the_context_decides_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    kernel, definition = multistep.operators.multi_step, reference.multi_step
    monkeypatch.setattr(multistep.operators, "multi_step", lambda *args: (ran.append("cpu"), kernel(*args))[1])
    monkeypatch.setattr(reference, "multi_step", lambda *args: (ran.append("torch"), definition(*args))[1])
    x = torch.ones(2, 3)
    neurons = [
        BinaryIF(step_mode="m"),
        BinaryIF(step_mode="m", backend="cpu"),
        BinaryIF(step_mode="m", backend="torch"),
    ]

    def run() -> list[str]:
        ran.clear()
        for neuron in neurons:
            neuron(x)
        return ran

    assert run() == ["cpu", "cpu", "torch"]
    with use_backend("torch"):
        assert run() == ["torch", "cpu", "torch"]
        with use_backend("cpu"):
            assert run() == ["cpu", "cpu", "torch"]
        with pytest.raises(SpikelmError, match="backend must be one of auto, torch, cpu, cupy; got 'metal'"):
            with use_backend("metal"):
                pass
        assert run() == ["torch", "cpu", "torch"]
    with pytest.raises(RuntimeError, match="left"):
        with use_backend("torch"):
            raise RuntimeError("left")
    assert run() == ["cpu", "cpu", "torch"]


@pytest.mark.filterwarnings("error:no kernel for")
@pytest.mark.parametrize(
    ("dynamics", "threshold", "reason"),
    [
        (Dynamics("ternary", surrogate.LeakyKReLU(), 0.5), torch.ones(3), "no kernel for the surrogate LeakyKReLU"),
        (Dynamics("ternary", lambda x: x.sigmoid()), torch.ones(3), "no kernel for the surrogate .*<lambda>"),
        (
            Dynamics("binary", surrogate.ATan(spiking=False)),
            torch.ones(3),
            "the surrogate ATan, spiking=False",
        ),
        (Dynamics("integer", sgc="blend", sgc_weight=0.5), torch.ones(3), "no kernel for sgc='blend'"),
        (TERNARY, torch.ones(4, 3), r"no kernel for a threshold over several axes, \(4, 3\)"),
    ],
)
def test_without_a_kernel_the_reference_runs_and_says_so_once(
    nothing_said: None, dynamics: Dynamics, threshold: torch.Tensor, reason: str
) -> None:
    x = (2 * torch.randn(2, 4, 3)).requires_grad_()
    with pytest.warns(SpikelmWarning, match=f"{reason}.*; the reference is used"):
        spikes, _ = multi_step(x, None, threshold, dynamics)
    again, _ = multi_step(x, None, threshold, dynamics)  # a second warning would be an error
    expected, _ = reference.multi_step(x, torch.zeros(4, 3), threshold, dynamics)
    assert torch.equal(spikes, expected)
    assert torch.equal(again, expected)
    for named in ("cpu", "auto"):
        with use_backend("cpu"), pytest.raises(SpikelmError, match=f"backend 'cpu': .*{reason}"):
            multi_step(x, None, threshold, dynamics, backend=named)


def test_without_a_compiler_the_reference_runs_and_says_so_once(
    nothing_said: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(cpu_module, "_LOADED", {})
    monkeypatch.setattr(cpu_module, "_FAILED", {})
    monkeypatch.setattr(cpu_module, "compiler", lambda: None)
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path))
    x, V = torch.randn(4, 10), torch.tensor(1.0)
    with pytest.warns(SpikelmWarning, match="no C[+][+] compiler was found.*install one.*; the reference is used"):
        spikes, _ = multi_step(x, None, V, TERNARY)
    assert torch.equal(spikes, multi_step(x, None, V, TERNARY, backend="torch")[0])
    multi_step(x, None, V, TERNARY)
    with pytest.raises(SpikelmError, match="backend 'cpu': no C[+][+] compiler was found"):
        multi_step(x, None, V, TERNARY, backend="cpu")


def test_a_named_backend_for_another_device() -> None:
    with pytest.raises(SpikelmError, match="backend 'cupy' takes tensors on a cuda device; got one on cpu"):
        multi_step(torch.ones(2, 3), None, torch.tensor(1.0), TERNARY, backend="cupy")


def test_tensors_without_data_take_the_reference_silently() -> None:
    x = torch.ones(2, 3, device="meta")
    spikes, v = multi_step(x, None, torch.ones((), device="meta"), TERNARY)
    assert (spikes.shape, v.shape) == ((2, 3), (3,))


def test_a_smooth_primitive_is_smooth_without_gradients_too() -> None:
    """What is computed must not depend on whether a gradient is wanted."""
    dynamics = Dynamics("ternary", surrogate.ATan(alpha=2.0, spiking=False))
    x, threshold = torch.randn(20, 3, requires_grad=True), torch.ones(3)
    with torch.no_grad():
        without = encode_sum(x, threshold, dynamics, 3, 1.0)
    torch.testing.assert_close(without, encode_sum(x, threshold, dynamics, 3, 1.0).detach())


def test_a_neuron_follows_its_surrogate() -> None:
    """The kernel's numbers are kept between calls, so a change must be seen."""
    neuron, x = BinaryIF(surrogate_function=surrogate.ATan(alpha=2.0)), torch.zeros(3, requires_grad=True)

    def gradient() -> float:
        neuron.reset()
        return float(torch.autograd.grad(neuron(x).sum(), x)[0].detach()[0])

    first = gradient()
    neuron.surrogate_function.alpha = 4.0
    assert gradient() != first
    neuron.surrogate_function = surrogate.Sigmoid(alpha=2.0)
    assert gradient() == pytest.approx(float(torch.tensor(-2.0).sigmoid() * torch.tensor(2.0).sigmoid()) * 2)
    neuron.surrogate_function.spiking = False
    neuron.reset()
    assert 0 < float(neuron(x).detach()[0]) < 1
