"""The quantisers against a slow loop, and the packed layout against its description read byte by byte."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import SpikelmError
from spikelm.ops.weight_quantization import (
    FORMS,
    dequantize,
    is_whole,
    pack_codes,
    packed_bytes,
    quantize,
    unpack_codes,
)

QUANTISED = ("binary", "ternary")
OUTPUTS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_codes(weight: torch.Tensor, form: str, per_row: bool) -> tuple[list[list[int]], list[float]]:
    """The formulas on Python's floats; a scale per row in both cases."""
    rows: list[list[float]] = weight.double().tolist()
    every = [value for row in rows for value in row]
    codes, scales = [], []
    for row in rows:
        over = row if per_row else every
        g, centre = math.fsum(map(abs, over)) / len(over), math.fsum(over) / len(over)
        scales.append(g)
        if form == "binary":
            codes.append([1 if value - centre > 0 else -1 for value in row])
        else:
            codes.append([max(-1, min(1, round(value / (g + 1e-5)))) for value in row])
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("form", QUANTISED)
def test_it_is_the_formula(form: str, per_row: bool, dtype: torch.dtype) -> None:
    weight = (0.02 * random(37, 53) + 0.004).to(dtype)
    codes, scale = quantize(weight, form, per_row)
    expected, scales = slow_codes(weight, form, per_row)
    assert codes.tolist() == expected
    assert set(codes.unique().tolist()) == ({-1, 1} if form == "binary" else {-1, 0, 1})
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, (37, 53), (37,) if per_row else ())
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        scale.double().expand(37), torch.tensor(scales).double(), rtol=max(tolerance, 1e-6), atol=0
    )


def test_ties() -> None:
    codes, scale = quantize(torch.tensor([[0.5, -0.5], [0.5, 0.5]]), "binary")  # the mean is 1/4
    assert (codes.tolist(), scale.item()) == ([[1, -1], [1, 1]], 0.5)
    assert quantize(torch.full((2, 2), 3.0), "binary")[0].tolist() == [[-1, -1], [-1, -1]]  # sign(0) is -1
    for w, code in ((1.0, 0), (1.000006, 0), (1.000007, 1)):  # beside 3, 1/2 is at 1 + 2e-5 / 3
        assert quantize(torch.tensor([[3.0, -w]], dtype=torch.float64), "ternary")[0].tolist() == [[1, -code]]
    codes, scale = quantize(torch.zeros(3, 4), "ternary", per_row=True)
    assert codes.eq(0).all() and scale.eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", QUANTISED)
def test_weights_that_are_no_numbers_stay_visible(form: str, value: float) -> None:
    weight = random(4, 5)
    weight[1, 2] = value
    for per_row in (False, True):
        codes, scale = quantize(weight, form, per_row)
        bad = scale[1] if per_row else scale
        assert not bad.isfinite()
        assert set(codes.unique().tolist()) <= {-1, 0, 1}
        dequantised = dequantize(codes, scale, torch.float32)
        assert not dequantised[1].isfinite().any()
        assert bool(dequantised[[0, 2, 3]].isfinite().all()) == per_row
        packed = unpack_codes(pack_codes(codes, form), 4, form)
        assert torch.equal(packed, codes)


@given(
    form=st.sampled_from(QUANTISED),
    outputs=st.one_of(st.sampled_from(OUTPUTS), st.integers(0, 300)),
    inputs=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_packing_is_undone(form: str, outputs: int, inputs: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (outputs, inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    codes = codes if form == "ternary" else codes.bitwise_or(1)
    packed = pack_codes(codes, form)
    assert packed.shape == (inputs, packed_bytes(outputs, form))
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert is_whole(packed, form)
    again = unpack_codes(packed, outputs, form)
    assert torch.equal(again, codes)
    assert again.dtype == torch.int8 and again.is_contiguous()


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("form", QUANTISED)
def test_the_layout_is_the_described_one(form: str, outputs: int) -> None:
    """Every bit of every byte, from the description alone."""
    codes, _ = quantize(random(outputs, 3), form)
    packed = pack_codes(codes, form).tolist()
    block, bits = (128, 1) if form == "binary" else (64, 2)
    assert all(len(row) == 16 * math.ceil(outputs / block) for row in packed)
    for channel, row in enumerate(packed):
        for place, byte in enumerate(row):
            for k in range(8 // bits):
                output = place // 16 * block + 16 * k + place % 16
                field = byte >> (bits * k) & (2**bits - 1)
                code = int(codes[output, channel]) if output < outputs else None
                expected = 0 if code is None else (code + 1) // 2 if form == "binary" else code + 1
                assert field == expected


def test_the_worked_example() -> None:
    """That of docs/weights.md."""
    codes = torch.full((64, 1), -1, dtype=torch.int8)
    codes[[0, 17, 33], 0] = torch.tensor([1, 0, 1], dtype=torch.int8)
    assert pack_codes(codes, "ternary").tolist() == [[0b00000010, 0b00100100] + [0] * 14]


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("per_row", [False, True])
def test_on_meta(form: str, per_row: bool) -> None:
    codes, scale = quantize(torch.empty(70, 5, device="meta"), form, per_row)
    packed = pack_codes(codes, form)
    assert (packed.shape, scale.shape) == ((5, packed_bytes(70, form)), (70,) if per_row else ())
    assert unpack_codes(packed, 70, form).shape == (70, 5)


def test_bytes_that_are_no_codes() -> None:
    packed = pack_codes(quantize(random(70, 5), "ternary")[0], "ternary")
    packed[3, 1] |= 0b00110000
    assert not is_whole(packed, "ternary")
    assert is_whole(packed, "binary")


def test_what_is_refused() -> None:
    assert FORMS == ("float", "binary", "ternary", "int8")
    weight, codes = random(4, 5), torch.ones(4, 5, dtype=torch.int8)
    for form in ("float", "int4"):
        with pytest.raises(SpikelmError, match=f"form must be one of binary, ternary, int8; got '{form}'"):
            quantize(weight, form)
        with pytest.raises(SpikelmError, match="form must be one of"):
            pack_codes(codes, form)
    for bad in (weight[0], codes):
        with pytest.raises(SpikelmError, match=r"weight must be floating point \[out, in\]; got"):
            quantize(bad, "binary")
    for bad in (codes.float(), codes[0]):
        with pytest.raises(SpikelmError, match=r"codes must be int8 \[out, in\]; got"):
            pack_codes(bad, "binary")
    with pytest.raises(SpikelmError, match=r"binary codes must be -1 or 1; got \[0\]"):
        pack_codes(0 * codes, "binary")
    with pytest.raises(SpikelmError, match=r"ternary codes must be -1 or 0 or 1; got \[2\]"):
        pack_codes(2 * codes, "ternary")
    with pytest.raises(SpikelmError, match=r"packed must be uint8 \[in, 32\] for 65 ternary outputs; got .*\(5, 16\)"):
        unpack_codes(pack_codes(codes, "ternary"), 65, "ternary")
    with pytest.raises(SpikelmError, match=r"packed must be uint8"):
        unpack_codes(torch.zeros(5, 16), 4, "ternary")
