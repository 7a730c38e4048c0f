"""Weights of 1, 1.58 and 8 bit: the quantisers, and the storage that a kernel reads as it lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spikelm.errors import SpikelmError

FORMS = ("float", "binary", "ternary", "int8")
BLOCK_BYTES = 16  # a SIMD register of 128 bit
BITS = {"binary": 1, "ternary": 2, "int8": 8}  # of a stored code
LARGEST = 127  # an int8 code
EPSILON = 1e-5  # of the ternary form, beside mean|W|


def quantize(weight: torch.Tensor, form: str, per_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and their scale, float32 (float64 for float64 weights), [] or [out] where ``per_row``.

    binary: scale = mean|W|, code = +1 where W > mean W, else -1. ternary: scale = g = mean|W|,
    code = clip(round(W / (g + 1e-5)), -1, 1), half to even. int8 [ours]: scale = max|W| / 127, code = round(W / scale).
    Means and maxima are over the whole matrix (BitNet), or over each output's row [ours].

    A NaN or infinite weight has no code: its scale is then not finite, so no product with the codes hides it.

    Raises:
        SpikelmError: another form, or a weight that is not [out, in] floating point.
    """
    _bits(form)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SpikelmError(f"weight must be floating point [out, in]; got {weight.dtype} {tuple(weight.shape)}")
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    if form == "int8":
        scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / LARGEST
    else:
        scale = weight.abs().mean(1, keepdim=True) if per_row else weight.abs().mean()
    if form == "binary":
        centre = weight.mean(1, keepdim=True) if per_row else weight.mean()
        codes = (weight > centre).to(torch.int8) * 2 - 1
    else:
        largest = LARGEST if form == "int8" else 1
        divisor = torch.where(scale == 0, 1, scale) if form == "int8" else scale + EPSILON
        rounded = (weight / divisor).round_().clamp(-largest, largest)
        codes = rounded.nan_to_num_(0).to(torch.int8)  # a NaN as an integer would differ between machines
    return codes, scale.squeeze(1) if per_row else scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale * codes [out, in] in ``dtype``, of codes [out, in] and scale [] or [out]: no rounding but the scale's."""
    scale = scale.to(dtype)
    return codes.to(dtype) * (scale.unsqueeze(1) if scale.dim() else scale)


def pack_codes(codes: torch.Tensor, form: str) -> torch.Tensor:
    """Codes int8 [out, in] -> uint8 [in, bytes], one row per input channel; int8 codes as they are, int8 [in, out].

    A row of 1 or 2 bit is a sequence of blocks of 16 bytes. Of a block that starts with output o, byte j (0..15) holds

        ternary, 64 outputs:  code[o + 16 k + j] + 1         in bits 2k and 2k + 1, k = 0..3; 3 does not occur
        binary, 128 outputs:  (code[o + 16 k + j] + 1) / 2   in bit k, k = 0..7

    so that one shift and one mask of a 16-byte register give 16 outputs that lie side by side. The last block is padded
    with zero bits, which mean nothing. bytes = 16 ceil(out / 64) or 16 ceil(out / 128).

    Raises:
        SpikelmError: another form, or codes that it does not have.
    """
    bits = _bits(form)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise SpikelmError(f"codes must be int8 [out, in]; got {codes.dtype} {tuple(codes.shape)}")
    if form == "int8":
        return codes.t().contiguous()
    accepted = (-1, 1) if form == "binary" else (-1, 0, 1)
    if not codes.is_meta and not bool(torch.isin(codes, codes.new_tensor(accepted)).all()):
        raise SpikelmError(f"{form} codes must be {' or '.join(map(str, accepted))}; got {codes.unique().tolist()}")
    parts = 8 // bits
    values = (codes + 1).to(torch.uint8) >> (2 - bits)
    values = F.pad(values.t(), (0, -codes.shape[0] % (parts * BLOCK_BYTES)))
    blocks = values.reshape(len(values), values.shape[1] // (parts * BLOCK_BYTES), parts, BLOCK_BYTES)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).unsqueeze(1)
    return (blocks << shifts).sum(2, dtype=torch.uint8).flatten(1)


def unpack_codes(packed: torch.Tensor, out_features: int, form: str) -> torch.Tensor:
    """What :func:`pack_codes` packed -> int8 [out, in], contiguous.

    Raises:
        SpikelmError: another form, or a size that ``out_features`` does not have.
    """
    bits = _bits(form)
    width = packed_bytes(out_features, form)
    dtype = torch.int8 if form == "int8" else torch.uint8
    if packed.dim() != 2 or packed.dtype != dtype or packed.shape[1] != width:
        name = str(dtype).removeprefix("torch.")
        raise SpikelmError(
            f"packed must be {name} [in, {width}] for {out_features} {form} outputs; got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    if form == "int8":
        return packed.t().contiguous()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    blocks = packed.reshape(len(packed), width // BLOCK_BYTES, 1, BLOCK_BYTES)
    values = ((blocks >> shifts) & (2**bits - 1)).flatten(1)[:, :out_features]
    codes = values.t().contiguous().view(torch.int8)
    return codes * 2 - 1 if form == "binary" else codes - 1


def packed_bytes(out_features: int, form: str) -> int:
    """Bytes of a packed row."""
    if form == "int8":
        return out_features
    return BLOCK_BYTES * -(-out_features // (BLOCK_BYTES * 8 // _bits(form)))


def is_whole(packed: torch.Tensor, form: str) -> bool:
    """Whether packed bytes can be what :func:`pack_codes` makes: no ternary 3, no int8 -128."""
    if form == "int8":
        return not bool((packed == -LARGEST - 1).any())
    return form != "ternary" or not bool((packed & (packed >> 1) & 0b01010101).any())


def _bits(form: str) -> int:
    if form not in BITS:
        raise SpikelmError(f"form must be one of {', '.join(BITS)}; got {form!r}")
    return BITS[form]
