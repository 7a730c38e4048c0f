"""The definition of a neuron's step: values, resets, and gradients by numerical differentiation."""

import math

import pytest
import torch
from spikingjelly.activation_based import surrogate

from spikelm.errors import SpikelmError
from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics

ATAN = surrogate.ATan(alpha=2.0)


def x_seq(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("fire", "reset"),
    [(f, r) for f in ("binary", "ternary", "integer") for r in ("soft", "soft_delayed", "hard")],
)
@pytest.mark.parametrize("inject", ["every", "first"])
def test_against_a_scalar_loop(fire: str, reset: str, inject: str) -> None:
    decay, V, v_reset, levels = 0.7, 0.8, 0.1, 3
    inputs = x_seq(8, 20)

    def fires(h: float) -> float:
        ratio = h / V
        if fire == "integer":
            return max(-levels, min(levels, math.copysign(math.floor(abs(ratio) + 0.5), ratio)))
        return float(ratio >= 1) - float(fire == "ternary" and ratio <= -1)

    expected = torch.zeros(8, 20, dtype=torch.float64)
    for n in range(20):
        v = 0.0
        for t in range(8):
            h = decay * v - (fires(v) * V if reset == "soft_delayed" else 0.0)
            if t == 0 or inject == "every":
                h += float(inputs[t, n])
            s = fires(h)
            expected[t, n] = s
            v = h - s * V if reset == "soft" else v_reset if reset == "hard" and s else h
    dynamics = Dynamics(fire, ATAN, decay, reset, inject, levels, v_reset)
    spikes, _ = reference.multi_step(inputs, torch.zeros(20, dtype=torch.float64), torch.tensor(V).double(), dynamics)
    assert torch.equal(spikes, expected)


@pytest.mark.parametrize("fire", ["binary", "ternary"])
@pytest.mark.parametrize("reset", ["soft", "soft_delayed", "hard"])
def test_gradients_of_a_smooth_primitive(fire: str, reset: str) -> None:
    """With the surrogate's primitive in place of the step, autograd must agree with numerical differentiation."""
    smooth = surrogate.ATan(alpha=2.0, spiking=False)
    dynamics = Dynamics(fire, smooth, 0.6, reset, "every", v_reset=0.3 if reset == "hard" else 0.0)
    inputs = x_seq(3, 4).requires_grad_()
    v = x_seq(4, seed=1).requires_grad_()
    threshold = torch.tensor([0.5, 0.9, 1.3, 2.0], dtype=torch.float64, requires_grad=True)

    def run(inputs: torch.Tensor, v: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.multi_step(inputs, v, threshold, dynamics)

    assert torch.autograd.gradcheck(run, (inputs, v, threshold))


def test_the_spiking_gradient_is_the_primitives_at_the_spiking_membrane() -> None:
    """One step from h: ds/dh = g(h / V) / V and ds/da = -(h / V) g, du/dh = 1 - V ds/dh, du/da = -s V - V ds/da."""
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    h = x_seq(50).requires_grad_()
    V = a.exp()
    dynamics = Dynamics("ternary", ATAN, inject="first")
    s, u = reference.step(h, torch.zeros_like(h), V, dynamics)
    y = (h / V).detach()

    def bell(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + (math.pi * x) ** 2)

    g = bell(y - 1) + bell(y + 1)
    (ds_dh,) = torch.autograd.grad(s.sum(), h, retain_graph=True)
    (du_dh,) = torch.autograd.grad(u.sum(), h, retain_graph=True)
    torch.testing.assert_close(ds_dh, g / V.detach())
    torch.testing.assert_close(du_dh, 1 - g)
    (ds_da,) = torch.autograd.grad(s.sum(), a, retain_graph=True)
    (du_da,) = torch.autograd.grad(u.sum(), a)
    torch.testing.assert_close(ds_da, (-y * g).sum())
    torch.testing.assert_close(du_da, (-s.detach() * V.detach() + V.detach() * y * g).sum())


def test_detach_reset_drops_the_spike_and_keeps_the_threshold() -> None:
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    h = x_seq(50).requires_grad_()
    s, u = reference.step(h, torch.zeros_like(h), a.exp(), Dynamics("ternary", ATAN, detach_reset=True))
    gradients = torch.autograd.grad(u.sum(), [h, a])
    torch.testing.assert_close(gradients[0], torch.ones_like(h))
    torch.testing.assert_close(gradients[1], -(s * a.exp()).sum().detach())


def test_integer_rounds_half_away_and_clips() -> None:
    x = torch.tensor([-9.0, -2.5, -0.5, -0.4, 0.0, 0.5, 1.5, 2.4, 9.0, float("nan"), float("inf")], requires_grad=True)
    dynamics = Dynamics("integer", levels=4, alpha=0.5)
    spikes = reference.fire(x, dynamics)
    assert spikes.tolist() == [-4, -3, -1, 0, 0, 1, 2, 2, 4, 0, 4]
    spikes.sum().backward()
    assert x.grad.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("fire", ["binary", "ternary", "integer"])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_the_gradient_of_a_hard_reset_is_that_of_the_product(fire: str, detach_reset: bool) -> None:
    """v = (1 - m) h + m v_reset with m the sum of the thresholds' events; a count's m has no derivative."""
    h = torch.cat([x_seq(50), torch.tensor([math.inf], dtype=torch.float64)]).requires_grad_()
    dynamics = Dynamics(fire, ATAN, reset="hard", v_reset=0.25, levels=3, detach_reset=detach_reset)
    s, v = reference.step(h, torch.zeros_like(h), torch.tensor(1.0).double(), dynamics)
    assert 10 < int((s != 0).sum()) < 45
    (gradient,) = torch.autograd.grad(v.sum(), h)
    at = h.detach()
    slope = 1 / (1 + (math.pi * (at - 1)) ** 2)
    if fire == "ternary":  # the event at -V grows as h falls
        slope = slope - 1 / (1 + (math.pi * (at + 1)) ** 2)
    if fire == "integer" or detach_reset:
        slope = torch.zeros_like(at)
    torch.testing.assert_close(gradient[:50], ((s == 0) + slope * (0.25 - at))[:50])
    assert gradient[50] == 0
    assert v[50] == 0.25


def test_what_does_not_fire_is_not_cleared() -> None:
    """Minus infinity stays in a binary neuron's membrane, whatever the reset."""
    x = torch.tensor([-math.inf])
    for reset in ("soft", "soft_delayed", "hard"):
        s, v = reference.step(x, torch.zeros(1), torch.tensor(1.0), Dynamics("binary", ATAN, reset=reset))
        assert s.tolist() == [0]
        assert v.tolist() == [-math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_windows_height_is_exact_in_the_type_of_the_membrane(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, -2.0, 9.0], dtype=dtype, requires_grad=True)
    reference.fire(x, Dynamics("integer", levels=4, alpha=0.1)).sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.tensor([0.1, 0.1, 0.0], dtype=dtype))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sgc", [None, "gradient", "blend"])
def test_compensation(sgc: str | None, weight: float) -> None:
    """g(x) = levels tanh(x / levels), in the derivative alone or in the spike itself."""
    x = torch.cat([x_seq(40), torch.tensor([-3.0, 3.0, 7.0, 0.0], dtype=torch.float64)]).requires_grad_()
    plain = Dynamics("integer", levels=3, alpha=0.5)
    mixed = Dynamics("integer", levels=3, alpha=0.5, sgc=sgc, sgc_weight=weight)
    spikes, mixture = reference.fire(x, plain).detach(), reference.fire(x, mixed)
    share = weight if sgc is not None else 0.0
    (gradient,) = torch.autograd.grad(mixture.sum(), x)
    at = x.detach()
    window, smooth = 0.5 * (at.abs() <= 3).double(), 1 - (at / 3).tanh().square()
    torch.testing.assert_close(gradient, (1 - share) * window + share * smooth, rtol=1e-12, atol=1e-12)
    if sgc == "blend":
        torch.testing.assert_close(mixture, (1 - share) * spikes + share * 3 * (at / 3).tanh())
    else:
        assert torch.equal(mixture, spikes)


@pytest.mark.parametrize("sgc", [None, "gradient", "blend"])
def test_compensation_of_special_values(sgc: str | None) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    dynamics = Dynamics("integer", levels=3, sgc=sgc, sgc_weight=0.5)
    spikes = reference.fire(x, dynamics)
    assert spikes.tolist() == [0, 3, -3, 0]
    assert not bool(spikes[3].signbit())


@pytest.mark.parametrize("reset", ["soft", "soft_delayed", "hard"])
def test_a_decay_for_each_channel(reset: str) -> None:
    """A tensor takes the place of the dynamics' number, and has a gradient."""
    inputs, v, threshold = x_seq(5, 3), x_seq(5, 3, seed=1), torch.tensor(0.8, dtype=torch.float64)
    decays = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)
    together = reference.step(inputs, v, threshold, Dynamics("binary", ATAN, 0.5, reset), decays)
    for c, decay in enumerate(decays.tolist()):
        alone = reference.step(inputs[:, c], v[:, c], threshold, Dynamics("binary", ATAN, decay, reset))
        assert torch.equal(together[0][:, c], alone[0])
        assert torch.equal(together[1][:, c], alone[1])
    smooth = Dynamics("binary", surrogate.ATan(alpha=2.0, spiking=False), 0.5, reset)
    assert torch.autograd.gradcheck(
        lambda v, decay: reference.step(inputs, v, threshold, smooth, decay),
        (v.requires_grad_(), decays.requires_grad_()),
    )


def test_hard_reset_clears_an_infinite_membrane() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.5])
    s, v = reference.step(x, torch.zeros(4), torch.tensor(1.0), Dynamics("ternary", ATAN, reset="hard", v_reset=0.25))
    assert s.tolist() == [1, -1, 0, 0]
    assert v[:2].tolist() == [0.25, 0.25]
    assert v[2].isnan()
    assert v[3] == 0.5


def test_sixteen_bit_input_has_a_float32_state() -> None:
    inputs = torch.randn(3, 4).bfloat16()
    spikes, membranes = reference.multi_step(inputs, torch.zeros(4), torch.tensor(1.0), Dynamics("ternary", ATAN))
    assert spikes.dtype == torch.bfloat16
    assert membranes.dtype == torch.float32


def test_no_steps() -> None:
    spikes, membranes = reference.multi_step(
        torch.empty(0, 4), torch.zeros(4), torch.tensor(1.0), Dynamics("ternary", ATAN)
    )
    assert spikes.shape == membranes.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fire": "quaternary"}, "fire must be one of binary, ternary, integer; got 'quaternary'"),
        ({"fire": "binary", "surrogate_function": ATAN, "reset": "none"}, "reset must be one of soft, .*got 'none'"),
        ({"fire": "binary", "surrogate_function": ATAN, "inject": "last"}, "inject must be one of .*got 'last'"),
        ({"fire": "binary", "surrogate_function": surrogate.ATan}, "that can be called, no class; got <class"),
        ({"fire": "integer", "alpha": float("nan")}, "alpha must be a finite number > 0; got nan"),
        ({"fire": "integer", "levels": True}, "levels must be an integer >= 1; got True"),
        ({"fire": "integer", "sgc_weight": -3.0}, "sgc_weight must be a number within .0, 1.; got -3.0"),
        ({"fire": "integer", "v_reset": 1e300}, "v_reset must be a finite number within float32; got 1e.300"),
        ({"fire": "binary"}, "surrogate_function must be an object that can be called, no class; got None"),
        (
            {"fire": "ternary", "surrogate_function": 3},
            "surrogate_function must be an object that can be called, no class; got 3",
        ),
        ({"fire": "integer", "sgc": "both"}, "sgc must be None or one of gradient, blend; got 'both'"),
        ({"fire": "integer", "decay": 0.0}, "decay must be a finite number > 0; got 0.0"),
        ({"fire": "integer", "decay": float("inf")}, "decay must be a finite number > 0; got inf"),
        ({"fire": "integer", "levels": 0}, "levels must be an integer >= 1; got 0"),
    ],
)
def test_dynamics_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        Dynamics(**arguments)
