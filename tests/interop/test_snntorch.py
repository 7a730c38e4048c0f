"""The adapters against snnTorch's neurons, its tools, and spikelm's own neurons."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import surrogate as snntorch_surrogate
from snntorch import utils
from spikingjelly.activation_based import surrogate as spikingjelly_surrogate
from torch import nn

from spikelm import neurons
from spikelm.errors import SpikelmError
from spikelm.interop.snntorch import ATMN, TILIF, BinaryIF, reset

CLASSES = [ATMN, TILIF, BinaryIF]
DRAWS = range(128)
RESETS: list[dict[str, Any]] = [
    {},
    {"reset_mechanism": "subtract", "reset_delay": False},
    {"reset_mechanism": "zero"},
    {"reset_mechanism": "zero", "reset_delay": False},
]


def run(neuron: nn.Module, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """snnTorch's loop over x_seq [T, N, *]: the spikes and membranes of every step."""
    mem, spikes, membranes = neuron.reset_mem(), [], []
    for x in x_seq:
        spk, mem = neuron(x, mem)
        spikes.append(spk)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


def random_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Calling convention


@pytest.mark.parametrize("cls", CLASSES)
def test_returns_spikes_and_membrane_as_snntorch_does(cls: type[nn.Module]) -> None:
    x, reference = random_numbers(0, 3, 5), snn.Leaky(beta=0.5)
    for options in ({}, {"init_hidden": True}, {"init_hidden": True, "output": True}):
        ours = cls(beta=0.5, **options)(x)
        theirs = snn.Leaky(beta=0.5, **options)(x)
        assert isinstance(ours, tuple) == isinstance(theirs, tuple)
        if isinstance(ours, tuple):
            assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in theirs]
    neuron = cls(beta=0.5)
    assert isinstance(neuron, snn.Leaky)
    assert neuron.reset_mem().shape == reference.reset_mem().shape == (0,)
    assert utils._final_layer_check(nn.Sequential(neuron)) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_membrane_is_carried_in_every_convention(cls: type[nn.Module]) -> None:
    x_seq = random_numbers(1, 6, 3, 5)
    spikes, membranes = run(cls(beta=0.5), x_seq)
    hidden = cls(beta=0.5, init_hidden=True, output=True)
    without_mem = cls(beta=0.5)
    for x, spk, mem in zip(x_seq, spikes, membranes, strict=True):
        for neuron in (hidden, without_mem):
            result = neuron(x)
            assert torch.equal(result[0], spk)
            assert torch.equal(result[1], mem)
            assert neuron.mem is result[1]
    assert spikes.count_nonzero() > 0
    smaller, fresh = random_numbers(2, 2, 5), cls(beta=0.5)
    assert torch.equal(hidden(smaller)[1], fresh(smaller)[1]), "a batch of another size starts from zeros"


def test_takes_every_argument_of_leaky_at_its_default() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(snn.Leaky.__init__).parameters.items()
        if name not in ("self", "beta")
    }
    assert len(defaults) >= 13
    neuron, reference = BinaryIF(beta=0.9, **defaults), snn.Leaky(beta=0.9, **defaults)
    assert BinaryIF(0.9, 2.0, snntorch_surrogate.sigmoid()).threshold == 2
    for name in ("init_hidden", "output", "reset_mechanism", "reset_delay", "beta", "threshold"):
        assert getattr(neuron, name) == getattr(reference, name)


@pytest.mark.parametrize("cls", CLASSES)
def test_empty_batch(cls: type[nn.Module]) -> None:
    spk, mem = cls()(torch.zeros(0, 4))
    assert spk.shape == mem.shape == (0, 4)


# Equality with snn.Leaky


@pytest.mark.parametrize("options", [RESETS[0], RESETS[2], RESETS[3]], ids=str)
def test_equals_leaky_bit_for_bit(options: dict[str, Any]) -> None:
    spikes = 0
    for seed in DRAWS:
        generator = torch.Generator().manual_seed(seed)
        beta, any_threshold = torch.rand(2, generator=generator).mul(torch.tensor([1.0, 3.0])).tolist()
        x_seq = 2 * torch.randn(8, 4, 16, generator=generator)
        for threshold in (1.0, 0.1 + any_threshold):
            theirs = run(snn.Leaky(beta, threshold, **options), x_seq)
            ours = run(BinaryIF(beta, threshold, **options), x_seq)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            spikes += int(ours[0].sum())
    assert spikes > 10_000


def test_equals_leaky_subtracting_at_once_while_that_leaves_less_than_the_threshold() -> None:
    for seed in DRAWS:
        x_seq = torch.rand(8, 4, 16, generator=torch.Generator().manual_seed(seed))
        theirs = run(snn.Leaky(0.8, reset_delay=False), x_seq)
        ours = run(BinaryIF(0.8, reset_delay=False), x_seq)
        assert bool((ours[1] < 1).all())
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_per_channel_beta_and_threshold_equal_leaky() -> None:
    for shape, frame in (((5,), (3, 5)), ((5, 1, 1), (3, 5, 2, 4))):
        beta, threshold = random_numbers(0, *shape).sigmoid(), random_numbers(1, *shape).exp()
        x_seq = 2 * random_numbers(2, 8, *frame)
        theirs, ours = run(snn.Leaky(beta, threshold), x_seq), run(BinaryIF(beta, threshold), x_seq)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_where_it_differs_from_leaky() -> None:
    at_threshold = torch.ones(1)
    assert (BinaryIF(0.9)(at_threshold)[0].item(), snn.Leaky(0.9)(at_threshold)[0].item()) == (1, 0)
    # 3.5 - V leaves 2.5 > V, which snn.Leaky takes for a reset that is due: it fires at 2.5 + 0 - V > V only
    x_seq = torch.tensor([[3.5], [-0.8]])
    spikes = [run(cls(1.0, reset_delay=False), x_seq)[0].flatten().tolist() for cls in (BinaryIF, snn.Leaky)]
    assert spikes == [[1, 1], [1, 0]]
    # a membrane above V handed to "zero": decayed and used here, cleared there
    mem = torch.tensor([1.5])
    after = [
        cls(0.5, reset_mechanism="zero", reset_delay=False)(torch.zeros(1), mem)[1] for cls in (BinaryIF, snn.Leaky)
    ]
    assert [value.item() for value in after] == [0.75, 0.0]
    # an infinite membrane: a select here, inf - inf there
    spk, mem = BinaryIF(0.9, reset_mechanism="zero", reset_delay=False)(torch.tensor([torch.inf, torch.nan]))
    assert spk.tolist() == [1, 0]
    assert mem[0] == 0
    assert mem[1].isnan()


@pytest.mark.parametrize("options", RESETS, ids=str)
def test_gradients_of_input_and_beta_equal_leaky_at_threshold_one(options: dict[str, Any]) -> None:
    for seed in DRAWS:
        x_seq = torch.rand(6, 4, 8, generator=torch.Generator().manual_seed(seed))
        gradients = []
        for cls in (snn.Leaky, BinaryIF):
            x = x_seq.clone().requires_grad_()
            neuron = cls(torch.tensor(0.7), spike_grad=snntorch_surrogate.atan(), learn_beta=True, **options)
            spikes, membranes = run(neuron, x)
            (spikes.sum() + membranes.square().sum()).backward()
            gradients.append((x.grad, neuron.beta.grad))
        for theirs, ours in zip(*gradients, strict=True):
            assert theirs.abs().sum() > 0
            assert torch.equal(ours, theirs)


def test_default_surrogate_has_the_derivative_of_leakys_default() -> None:
    gradients = []
    for cls in (snn.Leaky, BinaryIF):
        x = random_numbers(0, 6, 4, 8).requires_grad_()
        run(cls(0.7), x)[0].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=0)


def test_surrogate_is_taken_in_units_of_the_threshold() -> None:
    def derivative(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + (torch.pi * x).square())

    h = torch.tensor([0.3, 1.7, 2.5, 4.0], dtype=torch.float64, requires_grad=True)
    neuron = BinaryIF(threshold=torch.tensor(2.0, dtype=torch.float64), learn_threshold=True)
    neuron(h)[0].sum().backward()
    slope = derivative(h.detach() / 2 - 1)
    torch.testing.assert_close(h.grad, slope / 2)
    torch.testing.assert_close(neuron.threshold.grad, -(slope * h.detach() / 4).sum())


def test_gradient_through_the_reset_is_an_option() -> None:
    gradients = []
    for detach_reset in (None, True, False):
        x = random_numbers(0, 6, 4, 8).requires_grad_()
        run(BinaryIF(0.9, detach_reset=detach_reset), x)[1].sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])
    assert [BinaryIF(reset_delay=delay).detach_reset for delay in (True, False)] == [True, False]


# Types


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("convert_module", [False, True])
def test_keeps_the_input_type(cls: type[nn.Module], dtype: torch.dtype, convert_module: bool) -> None:
    neuron = cls(beta=0.75)  # a number that every type holds
    neuron = neuron.to(dtype) if convert_module else neuron
    x_seq = random_numbers(0, 5, 3, 4).to(dtype)
    spikes, membranes = run(neuron, x_seq)
    assert spikes.dtype == dtype
    assert membranes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = run(cls(beta=0.75), x_seq.double())
    assert torch.equal(spikes.double(), expected[0])
    torch.testing.assert_close(membranes.double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), cls(beta=0.5, init_hidden=True, output=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spk, mem = net(random_numbers(0, 2, 4))
    assert (spk.dtype, mem.dtype) == (torch.bfloat16, torch.float32)
    spk.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


# snnTorch's tools


def spiking_mlp(cls: type[nn.Module], **options: Any) -> nn.Sequential:
    """A snnTorch multilayer perceptron, the same at every call for every class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 16),
            cls(beta=0.9, init_hidden=True, **options),
            nn.Linear(16, 3),
            cls(beta=0.9, init_hidden=True, output=True, **options),
        )


@pytest.mark.parametrize("cls", CLASSES)
def test_utils_reset(cls: type[nn.Module]) -> None:
    net, x_seq = spiking_mlp(cls), 2 * random_numbers(0, 6, 4, 8)
    runs = []
    for _ in range(2):
        utils.reset(net)
        runs.append(torch.stack([net(x)[1] for x in x_seq]))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], torch.stack([net(x)[1] for x in x_seq])), "without a reset it goes on"


@pytest.mark.parametrize(("trainer", "truncation"), [("BPTT", {}), ("TBPTT", {"K": 2})])
@pytest.mark.parametrize("cls", CLASSES)
def test_backprop(cls: type[nn.Module], trainer: str, truncation: dict[str, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # snnTorch's own, at import
        from snntorch import backprop, functional
    data = [(2 * random_numbers(step, 4, 8), torch.tensor([0, 1, 2, 0])) for step in range(3)]

    def train(neuron: type[nn.Module], **options: Any) -> tuple[float, torch.Tensor]:
        net = spiking_mlp(neuron, **options)
        loss = getattr(backprop, trainer)(
            net,
            data,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            criterion=functional.ce_rate_loss(),
            num_steps=5,
            time_var=False,
            **truncation,
        )
        return loss.item(), net[0].weight.detach()

    loss, weight = train(cls)
    assert torch.isfinite(torch.tensor(loss))
    assert not torch.equal(weight, spiking_mlp(cls)[0].weight)
    if cls is BinaryIF:
        options = {"spike_grad": snntorch_surrogate.atan()}
        loss, weight = train(BinaryIF, **options)
        expected_loss, expected_weight = train(snn.Leaky, **options)
        assert loss == expected_loss
        assert torch.equal(weight, expected_weight)


SURROGATES = [
    name
    for name, function in inspect.getmembers(snntorch_surrogate, inspect.isfunction)
    if function.__module__ == snntorch_surrogate.__name__
]


def test_surrogates_of_snntorch_are_all_found() -> None:
    assert len(SURROGATES) >= 11
    assert {"atan", "fast_sigmoid", "sigmoid", "SSO", "SFS", "custom_surrogate"} <= set(SURROGATES)


@pytest.mark.parametrize("cls", [ATMN, BinaryIF])
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_of_snntorch(cls: type[nn.Module], name: str) -> None:
    arguments = [lambda x, gradient, spikes: gradient / (1 + x.abs())] if name == "custom_surrogate" else []
    spike_grad = getattr(snntorch_surrogate, name)(*arguments)
    # within reach of snnTorch's sigmoid, whose derivative is inf / inf in float32 at h / V - 1 < -3.5
    x = random_numbers(0, 6, 4, 8).clamp(-0.3, 1).requires_grad_()
    if name == "LSO":  # calls another function of snnTorch without one of its arguments
        with pytest.raises(TypeError):
            snn.Leaky(0.9, spike_grad=spike_grad)(x[0])
        return
    spikes, _ = run(cls(beta=0.9, threshold=0.7, spike_grad=spike_grad), x)
    spikes.sum().backward()
    assert set(spikes.unique().tolist()) == ({-1, 0, 1} if cls is ATMN else {0, 1})
    assert bool(x.grad.isfinite().all())
    assert name == "heaviside" or x.grad.abs().sum() > 0 or cls is ATMN


@pytest.mark.parametrize(
    "name",
    ["ATan", "Erf", "FakeNumericalGradient", "LeakyKReLU", "LogTailedReLU", "PiecewiseExp"]
    + ["PiecewiseLeakyReLU", "PiecewiseQuadratic", "QPseudoSpike", "S2NN", "Sigmoid", "SoftSign"],
)
def test_surrogates_of_spikingjelly(name: str) -> None:
    x = random_numbers(0, 16, 16).requires_grad_()
    spk, _ = BinaryIF(threshold=0.7, spike_grad=getattr(spikingjelly_surrogate, name)())(x)
    spk.sum().backward()
    assert torch.equal(spk, (x >= 0.7).float())
    assert bool(x.grad.isfinite().all())
    assert x.grad.abs().sum() > 0


def test_refuses_a_surrogate_that_counts_spikes() -> None:
    count = getattr(spikingjelly_surrogate, "MultiLevelSpikeCount", None)
    if count is None:
        pytest.skip("this SpikingJelly has no surrogate that counts spikes (2.0 has)")
    for cls in (ATMN, BinaryIF):
        with pytest.raises(SpikelmError, match="counts spikes"):
            cls(spike_grad=count(3))


@pytest.mark.parametrize("cls", CLASSES)
def test_learned_beta_and_threshold_get_gradients(cls: type[nn.Module]) -> None:
    neuron = cls(beta=torch.full((8,), 0.5), threshold=0.7, learn_beta=True, learn_threshold=True)
    assert {name for name, _ in neuron.named_parameters()} == {"beta", "threshold"}
    run(neuron, random_numbers(0, 6, 4, 8))[0].sum().backward()
    for parameter in neuron.parameters():
        assert bool(parameter.grad.isfinite().all())
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", CLASSES)
def test_learned_beta_and_threshold_are_clamped(cls: type[nn.Module]) -> None:
    x_seq = random_numbers(0, 6, 4, 8)
    for learned, clamped in (((1.5, 1.0), (1.0, 1.0)), ((-0.5, 1.0), (0.0, 1.0)), ((0.5, -3.0), (0.5, 2.0**-23))):
        neuron = cls(learn_beta=True, learn_threshold=True)
        with torch.no_grad():
            neuron.beta.fill_(learned[0])
            neuron.threshold.fill_(learned[1])
        expected = run(cls(*clamped), x_seq)
        spikes, membranes = run(neuron, x_seq)
        assert torch.equal(spikes, expected[0])
        assert torch.equal(membranes, expected[1])
        membranes.sum().backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in neuron.parameters())


# States: saved, copied, compiled


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("learn", [False, True])
def test_state_dict_is_that_of_leaky(cls: type[nn.Module], learn: bool) -> None:
    options = {"learn_beta": learn, "learn_threshold": learn}
    leaky = snn.Leaky(beta=random_numbers(0, 4).sigmoid(), threshold=0.6, **options)
    neuron = cls(beta=torch.zeros(4), **options)
    neuron(torch.zeros(2, 4))
    assert set(neuron.state_dict()) == set(leaky.state_dict())
    assert neuron.load_state_dict(leaky.state_dict()).missing_keys == []
    assert torch.equal(neuron.beta, leaky.beta)
    assert neuron.threshold == leaky.threshold
    leaky.load_state_dict(neuron.state_dict())


def test_refuses_the_state_of_another_mechanism() -> None:
    net = nn.Sequential(nn.Linear(2, 2), BinaryIF(beta=0.9))
    for options, message in (
        ({"reset_mechanism": "zero"}, "1 has reset_mechanism='subtract'; got a state dict of 'zero'"),
        ({"reset_mechanism": "none"}, "got a state dict of 'none'"),
        ({"graded_spikes_factor": 2.0}, "1.graded_spikes_factor is offered at 1 alone; got 2.0"),
    ):
        leaky = nn.Sequential(nn.Linear(2, 2), snn.Leaky(beta=0.9, **options))
        with pytest.raises(SpikelmError, match=message):
            net.load_state_dict(leaky.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_go_on_alike_and_apart(cls: type[nn.Module], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net, x_seq = spiking_mlp(cls), 2 * random_numbers(0, 4, 4, 8)
    with torch.no_grad():
        net(x_seq[0])
        twin = duplicate(net)
        assert torch.equal(net(x_seq[1])[1], twin(x_seq[1])[1])
        mem = twin[3].mem.clone()
        net(x_seq[2])
    assert torch.equal(twin[3].mem, mem)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("options", [{}, {"reset_mechanism": "zero", "reset_delay": True}], ids=str)
def test_time_loop_compiles_to_one_graph(cls: type[nn.Module], init_hidden: bool, options: dict[str, Any]) -> None:
    neuron = cls(beta=0.9, init_hidden=init_hidden, learn_threshold=True, **options)

    def loop(x_seq: torch.Tensor) -> torch.Tensor:
        mem, spikes = torch.zeros_like(x_seq[0]), []
        for x in x_seq:
            if init_hidden:
                spk = neuron(x)
            else:
                spk, mem = neuron(x, mem)
            spikes.append(spk)
        return torch.stack(spikes)

    x_seq = 2 * random_numbers(0, 3, 4, 8)
    gradients, outputs = [], []
    for function in (loop, torch.compile(loop, fullgraph=True, backend="aot_eager")):
        neuron.reset_mem()
        x = x_seq.clone().requires_grad_()
        outputs.append(function(x))
        outputs[-1].sum().backward()
        gradients.append(x.grad)
    assert outputs[0].abs().sum() > 0
    assert torch.equal(*outputs)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch._dynamo.reset()


# Equality with spikelm's own neurons


PAIRS: list[tuple[Callable[..., nn.Module], Callable[[], nn.Module]]] = [
    (BinaryIF, lambda: neurons.BinaryIF(beta=0.9, v_threshold=0.8, reset_delay=True, detach_reset=True)),
    (
        lambda *arguments: BinaryIF(*arguments, reset_delay=False),
        lambda: neurons.BinaryIF(beta=0.9, v_threshold=0.8),
    ),
    (
        lambda *arguments: BinaryIF(*arguments, reset_mechanism="zero", reset_delay=False),
        lambda: neurons.BinaryIF(beta=0.9, v_threshold=0.8, v_reset=0.0),
    ),
    (ATMN, lambda: neurons.ATMN(tau=1 / 0.9, v_threshold=0.8, learn_threshold=False, inject="every")),
    (TILIF, lambda: neurons.TILIF(beta=0.9, v_threshold=0.8)),
    (
        lambda *arguments: TILIF(*arguments, D=2, alpha=0.5, sgc="gradient", sgc_weight=0.4),
        lambda: neurons.TILIF(2, beta=0.9, v_threshold=0.8, alpha=0.5, sgc="gradient", sgc_weight=0.4),
    ),
    (
        lambda *arguments: TILIF(*arguments, sgc="blend"),
        lambda: neurons.TILIF(beta=0.9, v_threshold=0.8, sgc="blend"),
    ),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("adapter", "neuron"), PAIRS)
def test_equals_spikelms_neuron_step_by_step(
    adapter: Callable[..., nn.Module], neuron: Callable[[], nn.Module], training: bool
) -> None:
    ours, theirs = adapter(0.9, 0.8).train(training), neuron().train(training)
    x_seq = 2 * random_numbers(0, 12, 4, 16)
    gradients, mem = [], None
    inputs = [x_seq.clone().requires_grad_() for _ in range(2)]
    total = [torch.zeros(()), torch.zeros(())]
    for step in range(len(x_seq)):
        spk, mem = ours(inputs[0][step], mem)
        expected = theirs(inputs[1][step])
        assert torch.equal(spk, expected)
        assert torch.equal(mem, theirs.v)
        total = [total[0] + spk.sum() + mem.square().sum(), total[1] + expected.sum() + theirs.v.square().sum()]
    for loss, x in zip(total, inputs, strict=True):
        loss.backward()
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_delayed_zero_is_the_hard_reset_seen_before_it() -> None:
    for detach_reset in (True, False):
        results = []
        for reset_delay in (True, False):
            x = random_numbers(0, 8, 4, 16).requires_grad_()
            neuron = BinaryIF(0.9, reset_mechanism="zero", reset_delay=reset_delay, detach_reset=detach_reset)
            spikes, membranes = run(neuron, x)
            spikes.square().sum().backward()
            results.append((spikes, membranes * (membranes < 1), x.grad))
        (*values, gradient), (*expected, expected_gradient) = results
        assert all(map(torch.equal, values, expected))
        torch.testing.assert_close(gradient, expected_gradient)


def test_ternary_and_integer_spikes_reset_in_every_mechanism() -> None:
    for cls, largest in ((ATMN, 1), (TILIF, 4)):
        for options in RESETS:
            spikes, _ = run(cls(0.9, 0.5, **options), 2 * random_numbers(0, 8, 4, 16))
            assert spikes.abs().max() == largest
            assert torch.equal(spikes, spikes.round())
            mirrored, _ = run(cls(0.9, 0.5, **options), -2 * random_numbers(0, 8, 4, 16))
            assert torch.equal(mirrored, -spikes)


def test_static_input_of_the_paper_is_x_once_and_zeros_after() -> None:
    x = 3 * random_numbers(0, 32)
    x_seq = torch.stack([x, *torch.zeros(3, 32)])
    assert torch.equal(run(ATMN(), x_seq)[0], neurons.ATMN(T=4).encode(x))


# reset(net)


class Nested(nn.Module):
    """A neuron that is no direct child."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), neuron)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["block"](x)


@pytest.mark.parametrize("cls", [snn.Leaky, *CLASSES])
@pytest.mark.parametrize("duplicate", [lambda net: net, copy.deepcopy])
def test_reset_reaches_nested_neurons_and_no_other_net(
    cls: type[nn.Module], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    x = torch.ones(2, 4)
    net, other = (duplicate(Nested(cls(beta=0.5, init_hidden=True))) for _ in range(2))
    first = net(x)
    other(x)
    kept = other.inner["block"][1].mem.clone()
    membrane = net.inner["block"][1].mem.clone()
    assert membrane.abs().sum() > 0
    reset(net)
    mem = net.inner["block"][1].mem
    assert torch.equal(mem, torch.zeros_like(membrane))
    assert not mem.requires_grad
    assert torch.equal(net(x), first)
    assert torch.equal(net.inner["block"][1].mem, membrane)
    assert torch.equal(other.inner["block"][1].mem, kept)


def test_reset_knows_every_neuron_of_snntorch_that_has_a_state() -> None:
    options = {"beta": 0.8, "init_hidden": True}
    frame = (2, 4)
    nets = {
        "Alpha": (snn.Alpha(alpha=0.9, **options), frame),
        "DeltaLeaky": (snn.DeltaLeaky(**options), frame),
        "Lapicque": (snn.Lapicque(**options), frame),
        "Leaky": (snn.Leaky(**options), frame),
        "RLeaky": (snn.RLeaky(linear_features=4, **options), frame),
        "RSynaptic": (snn.RSynaptic(alpha=0.9, linear_features=4, **options), frame),
        "SConv2dLSTM": (snn.SConv2dLSTM(1, 1, 3, init_hidden=True), (2, 1, 4, 4)),
        "SLSTM": (snn.SLSTM(4, 4, init_hidden=True), frame),
        "Synaptic": (snn.Synaptic(alpha=0.9, **options), frame),
    }
    assert set(nets) == {name for name, cls in inspect.getmembers(snn, inspect.isclass) if hasattr(cls, "reset_mem")}
    for name, (neuron, shape) in nets.items():
        net = nn.Sequential(nn.Sequential(neuron))
        x = random_numbers(0, *shape).add(1).requires_grad_()
        net(x)
        after_one_step = neuron.mem
        net(x)
        assert not torch.equal(neuron.mem, after_one_step), name
        reset(net)
        states = [getattr(neuron, state, None) for state in ("mem", "syn", "syn_exc", "syn_inh")]
        assert all(state is None or not (state.any() or state.requires_grad) for state in states), name
        net(x)
        assert torch.equal(neuron.mem, after_one_step), name


def test_reset_leaves_a_net_without_neurons_alone() -> None:
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())
    reset(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


# Wrong arguments


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.1}, r"beta must be a number or a floating-point tensor within \[0, 1\]; got 1.1"),
        ({"beta": -0.1}, r"within \[0, 1\]; got -0.1"),
        ({"beta": float("nan")}, "got nan"),
        ({"beta": "0.9"}, "got '0.9'"),
        ({"beta": True}, "got True"),
        ({"beta": torch.tensor([0.5, 1.5])}, "got values from 0.5 to 1.5"),
        ({"beta": torch.tensor([1])}, "got torch.int64"),
        ({"threshold": 0.0}, r"threshold must be .* within \[1.192e-07, .*\]; got 0.0"),
        ({"threshold": -1.0}, "got -1.0"),
        ({"threshold": float("inf")}, "got inf"),
        ({"threshold": torch.tensor([1.0, float("nan")])}, "got values from nan to nan"),
        ({"reset_mechanism": "none"}, "reset_mechanism must be one of subtract, zero; got 'none'"),
        ({"reset_mechanism": "soft"}, "got 'soft'"),
        ({"reset_delay": 1}, "reset_delay must be True or False; got 1"),
        ({"detach_reset": "yes"}, "detach_reset must be True or False; got 'yes'"),
        ({"init_hidden": None}, "init_hidden must be True or False; got None"),
        ({"learn_beta": 0}, "learn_beta must be True or False; got 0"),
        ({"spike_grad": "atan"}, "got 'atan'"),
        ({"inhibition": True}, "offers inhibition=False alone; got True"),
        ({"surrogate_disable": True}, "offers surrogate_disable=False alone"),
        ({"state_quant": len}, "offers state_quant=False alone"),
        ({"graded_spikes_factor": 2.0}, "offers graded_spikes_factor=1.0 alone; got 2.0"),
        ({"graded_spikes_factor": torch.ones(2)}, "offers graded_spikes_factor=1.0 alone"),
        ({"learn_graded_spikes_factor": True}, "offers learn_graded_spikes_factor=False alone"),
        ({"v_threshold": 1.0}, "has no argument 'v_threshold'"),
    ],
    ids=str,
)
def test_wrong_arguments(cls: type[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message) as error:
        cls(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"D": 0}, "D must be an integer >= 1; got 0"),
        ({"D": 2.0}, "D must be an integer >= 1; got 2.0"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0; got 0.0"),
        ({"sgc": "smooth"}, "sgc must be None or one of gradient, blend; got 'smooth'"),
        ({"sgc_weight": 1.5}, r"sgc_weight must be a number within \[0, 1\]; got 1.5"),
        ({"spike_grad": snntorch_surrogate.atan()}, "TILIF has a window as its surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),  # the same in every process
)
def test_wrong_arguments_of_tilif(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        TILIF(**options)


@pytest.mark.parametrize("cls", CLASSES)
def test_wrong_calls(cls: type[nn.Module]) -> None:
    with pytest.raises(SpikelmError, match=f"{cls.__name__} takes a floating-point tensor; got torch.int64"):
        cls()(torch.ones(2, dtype=torch.int64))
    with pytest.raises(SpikelmError, match="init_hidden=True keeps its membrane; got a mem"):
        cls(init_hidden=True)(torch.ones(2), torch.zeros(2))
    for name in ("beta", "threshold"):
        for shape in ((3,), (1, 1, 4)):
            message = rf"{name} of shape \({shape[0]}, ?.*\) does not broadcast over an input of shape \(2, 1\)"
            with pytest.raises(SpikelmError, match=message):
                cls(**{name: torch.full(shape, 0.5)})(torch.ones(2, 1))
    neuron = cls()
    with pytest.raises(SpikelmError, match="got 'none'"):
        neuron.reset_mechanism = "none"
    neuron.reset_mechanism = "zero"
    assert neuron.dynamics.reset == "hard"


@pytest.mark.parametrize(("missing", "command"), [("snntorch", "snntorch>=1.0"), ("spikingjelly", "--no-deps")])
def test_a_missing_package_is_one_line_with_the_command(missing: str, command: str, repository: Path) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import spikelm.interop.snntorch
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    (line,) = result.stdout.splitlines()
    assert "pip install" in line
    assert command in line


def test_neurons_do_not_import_snntorch(repository: Path) -> None:
    code = "import sys, spikelm.neurons; print([name for name in sys.modules if name.startswith(('snntorch', 'nir'))])"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_anneal_sgc_reaches_the_adapter() -> None:
    net = nn.Sequential(TILIF(sgc="blend"))
    assert neurons.anneal_sgc(net, 0.45) == pytest.approx(0.15)
    assert net[0].sgc_weight == pytest.approx(0.15)
