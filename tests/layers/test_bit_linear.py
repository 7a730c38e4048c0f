"""BitLinear: the value and gradient of 1 and 1.58 bit weights, and that packing them changes nothing."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikelm.errors import SpikelmError
from spikelm.layers import BitLinear, SpikingLinear, TernaryLinear
from spikelm.neurons import ATMN
from spikelm.ops.weight_quantization import dequantize, quantize

QUANTISED = ("binary", "ternary")
SIZES = (1, 63, 64, 65, 127, 129)
every_form = pytest.mark.parametrize("form", QUANTISED)
both_scales = pytest.mark.parametrize("per_row", [False, True])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])


def layer(form: str, per_row: bool = False, inputs: int = 20, outputs: int = 70, **arguments: object) -> BitLinear:
    """The same layer at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BitLinear(inputs, outputs, weights=form, per_row=per_row, **arguments)


def packed(linear: BitLinear) -> BitLinear:
    other = copy.deepcopy(linear)
    other.pack()
    return other


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@every_form
@both_scales
@every_dtype
def test_the_weight_is_exactly_scale_times_codes(form: str, per_row: bool, dtype: torch.dtype) -> None:
    linear = layer(form, per_row, dtype=dtype)
    weight = linear.effective_weight()
    codes, scale = quantize(linear.weight, form, per_row)
    values = scale.to(dtype)
    for row, row_codes, value in zip(weight, codes, values.expand(70), strict=True):
        assert set(row.tolist()) <= {-value.item(), 0.0, value.item()}
        assert torch.equal(row.sign().to(torch.int8), row_codes)
    assert weight.dtype == dtype
    with torch.no_grad():
        assert torch.equal(linear.effective_weight(), weight)
        assert torch.equal(linear(x(3, 20).to(dtype)), F.linear(x(3, 20).to(dtype), weight, linear.bias))


@every_form
@both_scales
def test_the_gradient_passes_straight_through(form: str, per_row: bool) -> None:
    linear, data, direction = layer(form, per_row), x(3, 20).requires_grad_(), x(3, 70)
    linear(data).backward(direction)
    torch.testing.assert_close(linear.weight.grad, direction.T @ data.detach())
    torch.testing.assert_close(linear.bias.grad, direction.sum(0))
    torch.testing.assert_close(data.grad, direction @ linear.effective_weight().detach())
    _, tangent = torch.func.jvp(
        lambda weight: torch.func.functional_call(linear, {"weight": weight}, (data.detach(),)),
        (linear.weight.detach(),),
        (torch.ones_like(linear.weight),),
    )
    torch.testing.assert_close(tangent, data.detach().sum(1, keepdim=True).expand(3, 70))


def test_training_moves_the_codes() -> None:
    linear, data = layer("ternary"), x(64, 20)
    target = F.linear(data, x(70, 20).sign())
    optimiser = torch.optim.Adam(linear.parameters(), 0.03)
    before = quantize(linear.weight, "ternary")[0]
    losses = []
    for _ in range(60):
        loss = F.mse_loss(linear(data), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]
    assert not torch.equal(quantize(linear.weight, "ternary")[0], before)


@given(
    form=st.sampled_from(QUANTISED),
    per_row=st.booleans(),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
)
def test_packed_is_bit_for_bit_the_same(
    form: str, per_row: bool, inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    linear = layer(form, per_row, inputs, outputs, bias=bias, dtype=dtype)
    data = x(2, 3, inputs).to(dtype)
    other = packed(linear)
    with torch.no_grad():
        assert torch.equal(other(data), linear(data))
        assert torch.equal(other.weight, linear.effective_weight())
        for mine, theirs in zip(other.unscaled(data), linear.unscaled(data), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(linear(data).detach(), other(data))  # with gradient too
    names = {"packed_weight", "weight_scale"} | ({"bias"} if bias else set())
    assert set(other.state_dict()) == names
    assert [name for name, _ in other.named_parameters()] == (["bias"] if bias else [])


@pytest.mark.parametrize(("form", "outputs", "share"), [("binary", 256, 32), ("ternary", 192, 16)])
def test_the_matrix_takes_a_32nd_or_a_16th(form: str, outputs: int, share: int) -> None:
    linear = layer(form, outputs=outputs)
    assert packed(linear).packed_weight.nbytes * share == linear.weight.nbytes


@every_form
def test_a_packed_layer_is_for_inference(form: str) -> None:
    linear = layer(form).train()
    assert not linear.packed
    linear.pack()
    assert linear.packed and not linear.training
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    data = x(3, 20).requires_grad_()
    linear(data).sum().backward()  # what lies before it may train
    torch.testing.assert_close(data.grad, linear.weight.sum(0).expand(3, 20))
    assert not linear.weight.requires_grad and linear.weight.shape == (70, 20)
    with pytest.raises(SpikelmError, match="packed already"):
        linear.pack()


@every_form
@both_scales
@pytest.mark.parametrize("form_of_copy", ["deepcopy", "pickle", "file", "state dict"])
def test_a_copy_is_the_same(form: str, per_row: bool, form_of_copy: str) -> None:
    linear = packed(layer(form, per_row))
    if form_of_copy == "state dict":
        other = packed(layer(form, per_row))
        other.packed_weight.zero_()
        other.load_state_dict(linear.state_dict())
    elif form_of_copy == "file":
        stream = io.BytesIO()
        torch.save(linear, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    else:
        other = copy.deepcopy(linear) if form_of_copy == "deepcopy" else pickle.loads(pickle.dumps(linear))
    assert torch.equal(other(x(3, 20)), linear(x(3, 20)))


@every_form
@both_scales
def test_a_change_of_dtype_does_not_round_the_scale(form: str, per_row: bool) -> None:
    linear = packed(layer(form, per_row))
    scale, expected = linear.weight_scale.clone(), linear(x(3, 20))
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert half.weight.dtype == half(x(3, 20).bfloat16()).dtype == torch.bfloat16
    assert half.weight_scale.dtype == torch.float32
    assert torch.equal(half.weight, linear.weight.bfloat16())
    again = half.float()
    again.bias.copy_(linear.bias)
    assert torch.equal(again.weight_scale, scale)
    assert torch.equal(again(x(3, 20)), expected)
    assert linear.double()(x(3, 20).double()).dtype == torch.float64


@every_form
@both_scales
def test_packing_on_meta_gives_the_shapes(form: str, per_row: bool) -> None:
    real = packed(layer(form, per_row, dtype=torch.bfloat16))
    meta = packed(layer(form, per_row, dtype=torch.bfloat16, device="meta"))
    for name, tensor in real.state_dict().items():
        assert (meta.state_dict()[name].shape, meta.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)
    meta.load_state_dict(real.state_dict(), assign=True)
    data = x(3, 20).bfloat16()
    assert torch.equal(meta(data), real(data))


@every_form
@both_scales
@every_dtype
def test_unscaled_is_the_current_in_units_of_the_scale(form: str, per_row: bool, dtype: torch.dtype) -> None:
    linear, data = layer(form, per_row, dtype=dtype), x(3, 20).to(dtype)
    current, g = linear.unscaled(data)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(current * g.to(dtype), linear(data), rtol=tolerance, atol=tolerance)
    assert current.dtype == dtype
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert g.shape == ((70,) if per_row else ())
    spikes = torch.randint(-2, 3, (3, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    linear.bias.data.zero_()
    whole = linear.unscaled(spikes)[0]
    assert torch.equal(whole, whole.round())  # integers in, integers out


@both_scales
def test_unscaled_has_the_gradient_of_the_forward(per_row: bool) -> None:
    linear, data, direction = layer("ternary", per_row).double(), x(3, 20).double(), x(3, 70).double()
    linear(data).backward(direction)
    expected = [parameter.grad.clone() for parameter in linear.parameters()]
    linear.zero_grad()
    current, g = linear.unscaled(data)
    assert not g.requires_grad
    (current * g).backward(direction)
    torch.testing.assert_close([parameter.grad for parameter in linear.parameters()], expected)


@every_form
@both_scales
def test_unscaled_of_a_silent_row_is_its_bias(form: str, per_row: bool) -> None:
    linear = layer(form, per_row)
    with torch.no_grad():
        linear.weight[1 if per_row else slice(None)] = 0
        linear.bias.fill_(2.0)
    for case in (linear, packed(linear)):
        current, g = case.unscaled(x(3, 20))
        torch.testing.assert_close(current * g, case(x(3, 20)))
        assert bool(current.isfinite().all()) and bool((g > 0).all())
        assert torch.equal(current[:, 1], torch.full((3,), 2.0))


@every_form
def test_a_nan_weight_stays_visible(form: str) -> None:
    linear = layer(form)
    linear.weight.data[3, 4] = torch.nan
    for case in (linear, packed(linear)):
        assert case(x(3, 20)).isnan().all()
        current, g = case.unscaled(x(3, 20))
        assert current.isnan().all() and g.isnan()


def test_float_weights_are_a_linear() -> None:
    linear = layer("float", per_row=True)
    assert linear.effective_weight() is linear.weight
    assert torch.equal(linear(x(3, 20)), F.linear(x(3, 20), linear.weight, linear.bias))
    current, g = linear.unscaled(x(3, 20))
    assert torch.equal(current, linear(x(3, 20))) and g.item() == 1
    with pytest.raises(SpikelmError, match="pack takes binary or ternary weights; this layer's are float"):
        linear.pack()
    assert not linear.packed


def test_what_it_says_of_itself() -> None:
    assert repr(layer("ternary", per_row=True)).endswith("bias=True, weights=ternary, per_row)")
    assert repr(packed(layer("binary"))).endswith("bias=True, weights=binary, packed)")
    assert repr(layer("float", True)).endswith("bias=True)")
    with pytest.raises(SpikelmError, match="weights must be one of float, binary, ternary, int8; got 'int4'"):
        BitLinear(3, 4, weights="int4")


def test_damaged_bytes_are_found() -> None:
    linear = packed(layer("ternary"))
    linear.check_packed()
    linear.packed_weight[2, 3] = 0xFF
    with pytest.raises(SpikelmError, match=r"packed_weight \(20, 32\) holds bits that are no ternary code"):
        linear.check_packed()
    layer("ternary").check_packed()  # nothing to find


@every_form
@pytest.mark.parametrize("form_of_layer", [lambda linear: linear, packed], ids=["masters", "packed"])
def test_compiled_and_mapped(form: str, form_of_layer: Callable[[BitLinear], BitLinear]) -> None:
    linear, data = form_of_layer(layer(form)), x(3, 20)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data), linear(data))
    if linear.packed:
        return
    compiled(data).sum().backward()
    torch.testing.assert_close(linear.weight.grad, data.sum(0).expand(70, 20))
    stacked = {name: torch.stack((p.detach(), -2 * p.detach())) for name, p in linear.named_parameters()}
    mapped = torch.vmap(lambda parameters: torch.func.functional_call(linear, parameters, (data,)))(stacked)
    torch.testing.assert_close(mapped[0], linear(data))


@every_form
@both_scales
def test_behind_a_neuron(form: str, per_row: bool) -> None:
    neuron, linear = ATMN(num_channels=20), nn.Linear(20, 70)
    spiking = SpikingLinear.from_linear(linear, neuron, weights=form, per_row=per_row)
    assert isinstance(spiking, BitLinear) and spiking.weight is linear.weight
    data = 3 * x(3, 20)
    y = spiking(data)
    expected = dequantize(*quantize(linear.weight, form, per_row), torch.float32)
    assert torch.equal(y, F.linear(neuron.encode_sum(data), expected, linear.bias))
    y.sum().backward()
    assert linear.weight.grad.abs().sum() > 0 and neuron.a.grad.abs().sum() > 0
    with pytest.raises(SpikelmError, match=f'takes float weights; got {form} ones, which form="packed" takes'):
        TernaryLinear.from_spiking(spiking)
    spiking.pack()
    assert torch.equal(spiking(data), y) and not neuron.a.requires_grad
