"""GatherLinear: what a spiking projection computes, with the weights of active channels alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikelm.energy import OperationCounter
from spikelm.errors import SpikelmError
from spikelm.layers import GatherLinear, SpikingLinear
from spikelm.neurons import ATMN, TILIF
from spikelm.ops import spike_linear

NEURONS = {
    "counts": lambda: ATMN(T=4, num_channels=70),
    "weighted code": lambda: ATMN(T=4, tau=0.5, frame_weight=0.5, num_channels=70),
    "unequal weights": lambda: ATMN(T=3, tau=0.7, frame_weight=0.7, num_channels=70),
    "integers": lambda: TILIF(D=4, num_channels=70),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def training_form(neuron: str = "counts", bias: bool = True, weights: str = "float") -> SpikingLinear:
    linear = nn.Linear(70, 37, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(random(37, 70))
        if bias:
            linear.bias.copy_(random(37, seed=1))
    layer = SpikingLinear.from_linear(linear, NEURONS[neuron](), weights=weights, per_row=weights != "float").eval()
    layer.neuron.v_threshold = 0.3 + random(70, seed=2).abs()
    return layer


@pytest.mark.parametrize("weights", ["float", "int8", "ternary", "binary"])
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.filterwarnings("ignore:.*no kernel for packed weights behind spikes that are no integer multiples")
def test_it_computes_what_the_training_form_does(neuron: str, weights: str) -> None:
    layer = training_form(neuron, weights=weights)
    gather = GatherLinear.from_spiking(copy.deepcopy(layer))
    for shape in ((70,), (1, 70), (1, 1, 70), (4, 1, 70), (2, 3, 70), (0, 70)):
        x = 1.5 * random(*shape, seed=3)
        with torch.no_grad():
            expected = layer(x)
        torch.testing.assert_close(gather(x), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_read_as_they_are(dtype: torch.dtype) -> None:
    layer = training_form().to(dtype)
    layer.neuron.float()
    gather = GatherLinear.from_spiking(copy.deepcopy(layer))
    x = random(2, 70, seed=3).to(dtype)
    with torch.no_grad():
        spikes = layer.neuron.encode_sum(x).double()
    expected = F.linear(spikes, layer.weight.double(), layer.bias.double())
    assert gather(x).dtype == dtype
    torch.testing.assert_close(gather(x), expected.to(dtype), rtol=1e-2, atol=1e-2)


def test_without_neurons_it_is_the_dense_product() -> None:
    gather = GatherLinear.from_spiking(training_form())
    gather.spiking = False
    for x in (random(3, 70), random(2, 5, 70)):
        torch.testing.assert_close(gather(x), F.linear(x, gather.weight, gather.bias))


@pytest.mark.parametrize("weights", ["int8", "ternary", "binary"])
def test_codes_without_neurons(weights: str) -> None:
    gather = GatherLinear.from_spiking(training_form(weights=weights))
    gather.spiking = False
    x = 1e3 * random(2, 70)
    torch.testing.assert_close(gather(x), F.linear(x, gather.weight, gather.bias), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("weights", ["float", "ternary"])
def test_it_compiles_as_one_graph(weights: str) -> None:
    gather = GatherLinear.from_spiking(training_form(weights=weights))
    x = random(1, 70, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(gather, fullgraph=True, backend="eager")(x), gather(x))


def test_assigned_weights_are_laid_out_again() -> None:
    layer = training_form()
    gather = GatherLinear.from_spiking(copy.deepcopy(layer))
    gather(random(1, 70))
    with torch.no_grad():
        layer.weight.mul_(2)
        gather.load_state_dict(layer.state_dict(), assign=True)
        torch.testing.assert_close(gather(random(1, 70)), layer(random(1, 70)))
    assert gather.weight.t().is_contiguous()


def test_a_changed_layer_is_read_anew() -> None:
    layer = training_form()
    gather = GatherLinear.from_spiking(copy.deepcopy(layer))
    x = random(1, 70, seed=3)
    gather(x)
    layer.neuron.v_threshold = 0.2 * torch.ones(70)
    gather.neuron.v_threshold = 0.2 * torch.ones(70)
    with torch.no_grad():
        torch.testing.assert_close(gather(x), layer(x))
        layer.neuron.T = gather.neuron.T = 2
        torch.testing.assert_close(gather(x), layer(x))
        layer.weight.mul_(2)
        gather.load_state_dict(layer.state_dict())
        torch.testing.assert_close(gather(x), layer(x))
        torch.testing.assert_close(gather.double()(x.double()), layer.double()(x.double()))


def test_rows_lie_side_by_side_and_state_dicts_agree() -> None:
    layer = training_form()
    gather = GatherLinear.from_spiking(layer)
    assert gather.weight.t().is_contiguous()
    assert not gather.weight.requires_grad
    assert list(gather.state_dict()) == list(layer.state_dict())
    for copied in (copy.deepcopy(gather), pickle.loads(pickle.dumps(gather))):
        gather(random(1, 70))
        assert copied.__dict__.get("_prepared") is None
        assert torch.equal(copied(random(1, 70)), gather(random(1, 70)))


def test_projections_of_a_bank() -> None:
    first, x = training_form(), random(2, 70, seed=3)
    second = SpikingLinear.from_linear(nn.Linear(70, 11), first.neuron, first).eval()
    with torch.no_grad():
        expected = [first(x), second(x)]
    owner = GatherLinear.from_spiking(first)
    other = GatherLinear.from_spiking(second, owner)
    assert other.neuron is owner.neuron
    for layer, wanted in zip((owner, other), expected, strict=True):
        torch.testing.assert_close(layer(x), wanted)
    encoder, weights = owner.prepared(x)
    both = spike_linear.project(x, encoder, [weights, other.prepared(x)[1]])
    assert [torch.equal(y, layer(x)) for y, layer in zip(both, (owner, other), strict=True)] == [True, True]


def test_a_counter_sees_the_dense_product() -> None:
    gather = GatherLinear.from_spiking(training_form())
    with torch.no_grad(), OperationCounter(gather) as counter:
        gather(random(1, 70))
    assert counter.number("multiplication") >= 37 * 70


def test_what_it_refuses() -> None:
    gather = GatherLinear.from_spiking(training_form())
    with pytest.raises(SpikelmError, match="GatherLinear has no gradient; call it under torch.no_grad"):
        gather(random(1, 70).requires_grad_())
    with pytest.raises(SpikelmError, match=r"x \[\*, 69\] on cpu takes weights of 69 channels there; got 70"):
        gather(random(1, 69))
