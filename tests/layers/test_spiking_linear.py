"""SpikingLinear: what it computes, and how projections share a bank of neurons."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikelm.layers import SpikingLinear
from spikelm.neurons import ATMN, TILIF
from spikelm.ops import spike_storage


class Gated(nn.Module):
    """Two projections of one input behind one bank, and a third one's own."""

    def __init__(self) -> None:
        super().__init__()
        neuron = ATMN(num_channels=6)
        self.gate = SpikingLinear.from_linear(nn.Linear(6, 8, bias=False), neuron)
        self.up = SpikingLinear.from_linear(nn.Linear(6, 8), neuron, shares_with=self.gate)
        self.down = SpikingLinear.from_linear(nn.Linear(8, 6), ATMN(num_channels=8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x) * self.up(x))


def x(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def counting() -> mock._patch:
    return mock.patch.object(ATMN, "encode_sum", autospec=True, side_effect=ATMN.encode_sum)


def test_it_projects_the_weighted_sum_of_frames() -> None:
    linear = nn.Linear(6, 4)
    neuron = ATMN(num_channels=6, tau=0.5, frame_weight=0.5, T=3)
    layer = SpikingLinear.from_linear(linear, neuron)
    data = x(2, 5, 6)
    frames = neuron.encode(data)
    per_frame = sum(0.5**t * F.linear(frame, linear.weight) for t, frame in enumerate(frames)) + linear.bias
    torch.testing.assert_close(layer(data), per_frame)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    layer.spiking = False
    assert torch.equal(layer(data), linear(data))


def test_a_bank_is_named_once_and_computed_once() -> None:
    block = Gated()
    assert [name for name in block.state_dict() if name.endswith("neuron.a")] == ["gate.neuron.a", "down.neuron.a"]
    assert block.up.neuron is block.gate.neuron
    assert (block.gate.owns_neuron, block.up.owns_neuron) == (True, False)
    for _ in range(3):
        with counting() as encode_sum:
            block(x(2, 6))
        assert [call.args[0] for call in encode_sum.call_args_list] == [block.gate.neuron, block.down.neuron]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_shares_its_own_bank(duplicate: object) -> None:
    block = Gated()
    with torch.no_grad():
        block.gate(x(2, 6))  # leaves an encoding waiting for up
    other = duplicate(block)
    assert other.up.neuron is other.gate.neuron
    assert other.up.neuron is not block.up.neuron
    assert torch.equal(other(x(3, 6)), block(x(3, 6)))
    with counting() as encode_sum:
        other(x(2, 6))
    assert [call.args[0] for call in encode_sum.call_args_list] == [other.gate.neuron, other.down.neuron]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing(use_reentrant: bool) -> None:
    block, data = Gated(), x(4, 6).requires_grad_()
    block(data).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    with counting() as encode_sum:
        y = torch.utils.checkpoint.checkpoint(block, data, use_reentrant=use_reentrant)
        y.square().sum().backward()
    assert encode_sum.call_count <= 4  # two banks, forward and recomputation
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_shared_gradient_is_the_sum_over_projections() -> None:
    block, data = Gated(), x(4, 6)
    (block.gate(data).sum() + 2 * block.up(data).sum()).backward()
    neuron = copy.deepcopy(block.gate.neuron)
    neuron.a.grad = None
    code = neuron.encode_sum(data)
    (F.linear(code, block.gate.weight.detach()).sum() + 2 * F.linear(code, block.up.weight.detach()).sum()).backward()
    torch.testing.assert_close(block.gate.neuron.a.grad, neuron.a.grad)


def test_different_inputs_are_not_mixed_up() -> None:
    block, one, other = Gated(), x(2, 6), -x(2, 6)
    gate = block.gate(one)
    up = block.up(other)
    assert torch.equal(gate, F.linear(block.gate.neuron.encode_sum(one), block.gate.weight))
    assert torch.equal(up, F.linear(block.gate.neuron.encode_sum(other), block.up.weight, block.up.bias))


def test_no_gradient_leaks_from_or_into_no_grad() -> None:
    block, data = Gated(), x(2, 6)
    with torch.no_grad():
        block.gate(data)
    block.up(data).sum().backward()
    assert block.gate.neuron.a.grad is not None


def test_a_changed_threshold_or_input_is_encoded_anew() -> None:
    block, data = Gated(), x(2, 6)
    with torch.no_grad():
        block.gate(data)
        block.gate.neuron.v_threshold = 0.25
        y = block.up(data)
        assert torch.equal(y, F.linear(block.gate.neuron.encode_sum(data), block.up.weight, block.up.bias))
        block.gate(data)
        data.mul_(-2)
        y = block.up(data)
        assert torch.equal(y, F.linear(block.gate.neuron.encode_sum(data), block.up.weight, block.up.bias))


def test_in_inference_mode() -> None:
    block = Gated()
    expected = block(x(2, 6)).detach()
    with torch.inference_mode():
        assert torch.equal(block(x(2, 6)), expected)


def test_nothing_is_held_after_all_have_read() -> None:
    block = Gated()
    block(x(2, 6))
    assert block.gate._held is None


def test_training_mode_of_the_linear_is_kept() -> None:
    linear = nn.Linear(6, 4).eval()
    assert not SpikingLinear.from_linear(linear, ATMN(num_channels=6)).training
    assert "shares a neuron bank" in repr(Gated().up)
    assert "shares a neuron bank" not in repr(Gated().gate)


NEURONS = [
    (ATMN, {"T": 1}, 2),
    (ATMN, {"T": 4}, 4),
    (ATMN, {"T": 4, "tau": 0.5, "frame_weight": 0.5}, 8),
    (ATMN, {"T": 4, "frame_weight": 0.7}, None),
    (TILIF, {"D": 4}, 4),
    (TILIF, {"D": 4, "sgc": "gradient"}, 4),
    (TILIF, {"D": 4, "sgc": "blend"}, None),
]


@pytest.mark.parametrize(("kind", "arguments", "bits"), NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_kept_as_bits_change_no_gradient(
    kind: type, arguments: dict[str, object], bits: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    store = spike_storage.store

    def counting_store(spikes: torch.Tensor, code: spike_storage.SpikeCode) -> spike_storage.StoredSpikes:
        stored = store(spikes, code)
        sizes.append(stored.data.nbytes)
        return stored

    monkeypatch.setattr(spike_storage, "store", counting_store)
    torch.manual_seed(0)
    layer = SpikingLinear.from_linear(nn.Linear(64, 16).to(dtype), kind(num_channels=64, **arguments)).train()
    data = x(8, 64).to(dtype).requires_grad_()
    inputs = (data, layer.weight, layer.bias, *layer.neuron.parameters())
    kept = torch.autograd.grad(layer(data).float().square().sum(), inputs)
    plain = F.linear(layer.neuron.encode_sum(data), layer.weight, layer.bias)
    for ours, expected in zip(kept, torch.autograd.grad(plain.float().square().sum(), inputs), strict=True):
        assert torch.equal(ours, expected)
    assert sizes == ([] if bits is None else [8 * 64 * bits // 8])


def test_a_bank_stores_its_spikes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with mock.patch.object(spike_storage, "store", side_effect=spike_storage.store) as store:
        Gated()(x(2, 6).requires_grad_())
    assert store.call_count == 2
