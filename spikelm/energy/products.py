"""Products of matrices and convolutions: multiply-accumulates, and what spikes make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from spikelm.energy.spikes import Flow, Spikes, flow_of, spikes_of

_PLACES = {"mm": 0, "bmm": 0, "_int_mm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
_FEWEST_WEIGHTS = 8  # of an output, below which two magnitudes may be chance


@dataclass
class Product:
    """All calls of one product in a phase, summed.

    Attributes:
        mac: multiply-accumulates of one dense pass; ``mac_executed`` those of every time step that ran, ``mac_dense``
            those of them that neither spikes nor weights of one magnitude replace.
        accumulations: that take their place; None where it stays dense, or where spikes have no values (meta).
        multiplications: of outputs, by the weight of a frame or the scale of quantised weights.
        spikes: that entered.
        frames, span, signed: of the spikes that enter, see Spikes.
        steps: of the time axis, at most; ``steps_called`` those of all calls together.
        rates, unions: per token (or sample), spikes per input and the share of inputs that spike.
        active: inputs that any token of the batch wakes, bool [k]; None where all count as awake.
        weight_bytes: as stored; ``weight_reads`` bytes fetched without reuse over T.
        spike_inputs, real_inputs, outputs: numbers of one pass, the last two also as ``executed``.
        element_bytes: of a real number.
    """

    scope: str
    operator: str
    role: str
    shape: str
    spiking: bool
    calls: int = 0
    mac: float = 0.0
    mac_executed: float = 0.0
    mac_dense: float = 0.0
    accumulations: float | None = None
    multiplications: float = 0.0
    spikes: float | None = None
    frames: int = 1
    span: int = 0
    signed: bool = False
    steps: int = 1
    steps_called: int = 0
    rates: list[torch.Tensor] = field(default_factory=list)
    unions: list[torch.Tensor] = field(default_factory=list)
    active: torch.Tensor | None = None
    weight_bytes: int = 0
    weight_reads: float = 0.0
    spike_inputs: float = 0.0
    real_inputs: float = 0.0
    outputs: float = 0.0
    executed: float = 0.0
    element_bytes: int = 4


class Sides(NamedTuple):
    """Two factors; ``left`` [*, m, k] and ``right`` [*, k, n], or a convolution's input and weight."""

    left: torch.Tensor
    right: torch.Tensor
    convolution: bool = False


def sides_of(name: str, args: Sequence[Any]) -> Sides | None:
    """The factors of an operator that is a product, e.g. "addmm"; else None."""
    if name == "convolution":
        return Sides(args[0], args[1], True)
    if name not in _PLACES:
        return None
    left, right = args[_PLACES[name] : _PLACES[name] + 2]
    return Sides(left, right)


def describe(sides: Sides) -> str:
    """ "64 -> 128" for a product with a weight, a convolution's kernel, or all sizes but the batch's."""
    left, right, convolution = sides
    if convolution:
        return "kernel " + " x ".join(map(str, right.shape))
    m, k, n = _sizes(sides)
    if flow_of(right) is None:
        return f"{k} -> {n}"
    return f"{k} -> {m}" if flow_of(left) is None else f"{m} x {k} x {n}"


def add_call(product: Product, sides: Sides, args: Sequence[Any], out: torch.Tensor, stored: int | None) -> None:
    """Adds a call. ``stored``: bytes of its weight as the module stores it, if that is known better."""
    left, right, convolution = sides
    flows = [flow_of(left), flow_of(right)]
    steps = max(flow.steps for flow in flows if flow is not None)
    executed = out.numel() * (right[0].numel() if convolution else _sizes(sides)[1])
    if convolution and args[6]:
        executed = left.numel() * right[0].numel()  # transposed: every input meets the kernel
    product.calls += 1
    product.mac_executed += executed
    product.mac += executed / steps
    product.steps = steps
    product.steps_called = steps
    product.outputs += out.numel() / steps
    product.executed += out.numel()
    product.element_bytes = out.element_size()
    weight = next((side for side, flow in zip((left, right), flows, strict=True) if flow is None), None)
    if weight is not None:
        product.weight_bytes = weight.numel() * weight.element_size() if stored is None else stored
    found = [spikes_of(side) for side in (left, right)]
    for side, flow, spikes in zip((left, right), flows, found, strict=True):
        if spikes is not None:
            product.spike_inputs += side.numel() / steps
        elif flow is not None:
            product.real_inputs += side.numel() / steps
            product.executed += side.numel()
    if any(found):
        _add_spikes(product, sides, args, out, found, flows, steps)
    else:
        product.weight_reads += product.weight_bytes * steps
        codes = codes_of(_by_output(sides)) if weight is not None and not convolution else None
        if codes is None:
            product.mac_dense += executed
        else:
            _add_codes(product, codes, sides, out)
        return
    if weight is not None and not convolution:
        product.multiplications += out.numel() * (codes_of(_by_output(sides)) or Codes(0, False)).scaled


def _add_spikes(
    product: Product,
    sides: Sides,
    args: Sequence[Any],
    out: torch.Tensor,
    found: list[Spikes | None],
    flows: list[Flow | None],
    steps: int,
) -> None:
    spikes = next(one for one in found if one is not None)
    product.spiking = True
    product.frames, product.span, product.signed = spikes.frames, spikes.span, spikes.signed
    product.executed += (spikes.frames - 1) * out.numel()  # a sum of a frame is written, and added to
    if spikes.weighted:
        product.multiplications += (spikes.frames - 1) * out.numel()
    counts = [None if one is None or one.count is None else one.count for one in found]
    if any(one is not None and one.count is None for one in found):
        product.weight_reads += product.weight_bytes * spikes.frames * steps
        return
    if sides.convolution:
        _add_convolution(product, counts[0], args, out, steps)
        return
    m, k, n = _sizes(sides)
    left, right = (None if count is None else count.double() for count in counts)
    left = left.unsqueeze(0) if left is not None and left.dim() == 1 else left
    right = right.unsqueeze(-1) if right is not None and right.dim() == 1 else right
    if left is not None and right is not None:
        added = (left.sum(-2) * right.sum(-1)).sum()
    else:
        added = left.sum() * n if left is not None else right.sum() * m  # type: ignore[union-attr]
    entering = left if left is not None else right.transpose(-1, -2)  # type: ignore[union-attr]
    product.accumulations = (product.accumulations or 0.0) + float(added)
    product.spikes = (product.spikes or 0.0) + float(entering.sum())
    rows = entering.reshape(-1, k)
    awake = (rows > 0).any(0)
    product.active = awake if product.active is None else product.active | awake
    share = rows.sum(0).clamp(max=spikes.frames * steps).sum() / max(k, 1)
    product.weight_reads += product.weight_bytes * float(share)
    _add_rates(product, rows, steps)


def _add_convolution(
    product: Product, count: torch.Tensor | None, args: Sequence[Any], out: torch.Tensor, steps: int
) -> None:
    """Every spike meets the weights that a multiplication would have taken; padding is no spike."""
    product.weight_reads += product.weight_bytes * product.frames * steps
    if count is None:  # spikes as a kernel, which nobody has
        return
    ones = torch.ones_like(args[1], dtype=torch.float64)
    added = torch.ops.aten.convolution(count.double(), ones, None, *args[3:9])
    product.accumulations = (product.accumulations or 0.0) + float(added.sum())
    product.spikes = (product.spikes or 0.0) + float(count.double().sum())
    _add_rates(product, count.double().flatten(1), steps)


def _add_rates(product: Product, rows: torch.Tensor, steps: int) -> None:
    """rows [steps * tokens, k]; a time axis is summed over."""
    if rows.numel() == 0:
        return
    tokens = rows.view(steps, -1, rows.shape[-1]).sum(0) if len(rows) % steps == 0 else rows
    product.rates.append((tokens.sum(-1) / rows.shape[-1]).cpu())
    product.unions.append((tokens > 0).double().mean(-1).cpu())


def _add_codes(product: Product, codes: Codes, sides: Sides, out: torch.Tensor) -> None:
    """Weights of one magnitude (binary, ternary) are added and subtracted, and their sum scaled once."""
    outputs = _sizes(sides)[2] if flow_of(sides.right) is None else _sizes(sides)[0]
    product.accumulations = (product.accumulations or 0.0) + codes.nonzero * out.numel() / max(outputs, 1)
    product.multiplications += out.numel() * codes.scaled


def _by_output(sides: Sides) -> torch.Tensor:
    """The weight [n, k]."""
    return sides.right.t() if flow_of(sides.right) is None and sides.right.dim() == 2 else sides.left


class Codes(NamedTuple):
    """How many weights are not 0, and whether their magnitude is another than 1."""

    nonzero: int
    scaled: bool


def codes_of(weight: torch.Tensor) -> Codes | None:
    """Of weights [n, k] where those of an output have one magnitude, or are 0; else None."""
    if weight.is_meta or weight.dim() != 2 or weight.shape[1] < _FEWEST_WEIGHTS or not len(weight):
        return None
    if not _one_magnitude(weight[:1]) or not _one_magnitude(weight):
        return None
    scales = weight.abs().amax(1)
    return Codes(int(weight.count_nonzero()), bool(((scales != 0) & (scales != 1)).any()))


def _one_magnitude(weight: torch.Tensor) -> bool:
    sizes = weight.abs()
    return bool(((sizes == 0) | (sizes == sizes.amax(1, keepdim=True))).all())


def _sizes(sides: Sides) -> tuple[int, int, int]:
    left, right, _ = sides
    m = 1 if left.dim() == 1 else left.shape[-2]
    n = 1 if right.dim() == 1 else right.shape[-1]
    return m, left.shape[-1], n


def merge(product: Product, more: Product) -> None:
    """Adds the calls of ``more`` within one pass of the model."""
    for name in (
        *("calls", "mac", "mac_executed", "mac_dense", "multiplications", "weight_reads"),
        *("steps_called", "spike_inputs", "real_inputs", "outputs", "executed"),
    ):
        setattr(product, name, getattr(product, name) + getattr(more, name))
    for name in ("accumulations", "spikes"):
        one, other = getattr(product, name), getattr(more, name)
        setattr(product, name, other if one is None else one if other is None else one + other)
    for name in ("frames", "span", "signed", "steps", "weight_bytes", "element_bytes"):
        setattr(product, name, max(getattr(product, name), getattr(more, name)))
    product.rates += more.rates
    product.unions += more.unions
    both = product.active is not None and more.active is not None
    product.active = product.active | more.active if both else None  # type: ignore[operator]
