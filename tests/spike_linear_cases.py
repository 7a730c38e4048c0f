"""Cases for projections of spikes, and what they must compute: in float64, over the sums that the reference encodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from spikingjelly.activation_based import surrogate

from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel
from spikelm.ops.spike_linear import Encoder, SpikeWeights
from spikelm.ops.weight_quantization import pack_codes

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PACKED = ("binary", "ternary")
_GUARD = 64  # elements on either side of every result
Project = Callable[[Kernel, Encoder, torch.Tensor, Sequence[SpikeWeights], Sequence[torch.Tensor], int], int]

_ONE = torch.ones(())
_ATAN = surrogate.ATan()
ENCODERS = {
    "counts": Encoder(_ONE, Dynamics("ternary", _ATAN, inject="first"), T=4, unit=1.0),
    "expansion": Encoder(
        _ONE, Dynamics("ternary", _ATAN, decay=0.5, inject="first"), T=4, frame_weight=0.5, unit=0.125, gain=1.5
    ),
    "delayed": Encoder(_ONE, Dynamics("ternary", _ATAN, reset="soft_delayed", inject="first"), T=3, unit=1.0),
    "binary": Encoder(_ONE, Dynamics("binary", _ATAN, inject="first"), T=2, unit=1.0),
    "integer": Encoder(_ONE, Dynamics("integer", levels=127), unit=1.0, gain=0.25),
    "none": Encoder(_ONE, Dynamics("integer", levels=127), spiking=False),
}


@dataclass(frozen=True)
class Case:
    """One call. ``rate`` is the share of a token's channels with an input that reaches the threshold."""

    form: str = "float"
    encoder: str = "counts"
    tokens: int = 1
    channels: int = 65
    outputs: tuple[int, ...] = (130,)
    stored: torch.dtype = F32  # float weights
    dtype: torch.dtype = F32  # x and y
    rate: float = 0.4
    thresholds: bool = False  # one for every channel
    per_row: bool = True  # scales
    bias: bool = True
    special: bool = False  # NaN and infinite inputs
    apart: int = 0  # elements between rows of numbers


# Every form and number of tokens, with the sizes, types and neurons taken in turn.
CASES = [
    Case("float", "none", 1, 65, (130, 7), special=True),
    Case("float", "counts", 2, 64, (1000,), dtype=BF16, stored=BF16, thresholds=True, special=True),
    Case("float", "expansion", 3, 300, (63, 65, 1), dtype=F16, stored=F16),
    Case("float", "delayed", 4, 33, (130,), stored=BF16, bias=False, apart=3),
    Case("float", "binary", 1, 1, (1,)),
    Case("int8", "none", 4, 130, (1000, 16), per_row=False),
    Case("int8", "integer", 1, 300, (65,), dtype=BF16, special=True),
    Case("int8", "expansion", 2, 7, (63,), thresholds=True),
    Case("binary", "counts", 1, 300, (1000,), special=True),
    Case("binary", "expansion", 2, 65, (130, 7), dtype=BF16, per_row=False),
    Case("binary", "integer", 3, 64, (1, 63)),
    Case("binary", "binary", 4, 130, (129,), dtype=F16, thresholds=True, bias=False),
    Case("ternary", "expansion", 1, 300, (1000, 130), thresholds=True),
    Case("ternary", "integer", 2, 65, (63,), per_row=False, special=True),
    Case("ternary", "counts", 3, 1, (65, 7), dtype=F16),
    Case("ternary", "delayed", 4, 200, (130,), dtype=BF16),
    *(Case(form, rate=rate, tokens=2) for form in ("float", *PACKED) for rate in (0.0, 1.0)),
]


class Inputs(NamedTuple):
    """What is projected, and by what."""

    x: torch.Tensor
    encoder: Encoder
    weights: list[SpikeWeights]


def name_of(case: Case) -> str:
    """The fields that are not as usual; types by their names."""
    changed = {name: value for name, value in vars(case).items() if value != getattr(Case, name)}
    return "-".join(f"{name}={str(value).removeprefix('torch.').replace(', ', '+')}" for name, value in changed.items())


def draw(case: Case, device: str = "cpu") -> Inputs:
    """The inputs of a case, the same at every call."""
    generator = torch.Generator().manual_seed(case.channels + 7 * case.tokens)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator)

    threshold = 0.5 + uniform(case.channels) if case.thresholds else torch.tensor(0.75)
    size = 1.01 + 4 * uniform(case.tokens, case.channels)
    reaches = uniform(case.tokens, case.channels) < case.rate
    x = torch.where(reaches, size, torch.tensor(0.0 if case.encoder == "none" else 0.2)) * threshold
    x = torch.where(uniform(case.tokens, case.channels) < 0.5, -x, x).to(case.dtype)
    if case.special:
        x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    weights = [_weights(case, outputs, generator, device) for outputs in case.outputs]
    return Inputs(x.to(device), replace(ENCODERS[case.encoder], threshold=threshold.to(device)), weights)


def _weights(case: Case, outputs: int, generator: torch.Generator, device: str) -> SpikeWeights:
    scale = 0.05 + torch.rand((outputs,) if case.per_row else (), generator=generator)
    bias = torch.randn(outputs, generator=generator).to(device) if case.bias else None
    if case.form == "float":
        rows = torch.randn(case.channels, outputs, generator=generator).to(case.stored)
    else:
        most = 127 if case.form == "int8" else 1
        codes = torch.randint(-most, most + 1, (outputs, case.channels), generator=generator, dtype=torch.int8)
        rows = pack_codes(torch.where(codes == 0, 1, codes) if case.form == "binary" else codes, case.form)
    if case.apart:
        wide = torch.full((case.channels, rows.shape[1] + case.apart), 99, dtype=rows.dtype)
        wide[:, : rows.shape[1]] = rows
        rows = wide.to(device)[:, : rows.shape[1]]
    out_features = outputs if case.form in PACKED else None
    return SpikeWeights(
        rows.to(device), case.form, out_features, None if case.form == "float" else scale.to(device), bias
    )


def values_of(inputs: Inputs) -> torch.Tensor:
    """What the projections take [tokens, channels], in float64: the encoded sums, exact in float32, times the gain."""
    x, encoder, _ = inputs
    if not encoder.spiking:
        return x.double()
    sums = reference.encode_sum(x.float(), encoder.threshold, encoder.dynamics, encoder.T, encoder.frame_weight)
    return sums.double() * encoder.gain


def expected(values: torch.Tensor, weights: SpikeWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """W s + b in float64, and by element what it is the sum of, in magnitude."""
    matrix = weights.matrix(torch.float64)
    bias = torch.zeros(weights.outputs) if weights.bias is None else weights.bias.cpu()
    return values @ matrix.t() + bias.double(), values.abs() @ matrix.abs().t() + bias.double().abs()


def close(found: torch.Tensor, weights: SpikeWeights, values: torch.Tensor) -> None:
    """``found`` [tokens, out] is W s + b to the rounding of sums in float32 and of its own type, NaN for NaN."""
    wanted, size = expected(values.cpu(), on_cpu(weights))
    found = found.cpu()
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)} differs from {tuple(wanted.shape)}"
    error = (found.double() - wanted).abs()
    bound = 1e-6 * size + torch.finfo(found.dtype).eps * wanted.abs() + 1e-12
    right = (error <= bound) | (found.double() == wanted) | (found.isnan() & wanted.isnan())
    assert right.all(), (
        f"{(~right).float().mean():.2%} of the outputs differ, first at {(~right).nonzero()[0].tolist()}"
    )


def on_cpu(weights: SpikeWeights) -> SpikeWeights:
    """The same weights there."""
    scale, bias = weights.scale, weights.bias
    return replace(
        weights, rows=weights.rows.cpu(), scale=None if scale is None else scale.cpu(),
        bias=None if bias is None else bias.cpu(),
    )  # fmt: skip


class Results:
    """Dense results full of NaN, between guards that no kernel may touch."""

    def __init__(self, inputs: Inputs) -> None:
        x, _, weights = inputs
        self.buffers = [x.new_full((len(x) * one.outputs + 2 * _GUARD,), 99) for one in weights]
        self.y = [buffer[_GUARD:-_GUARD].view(len(x), -1).fill_(torch.nan) for buffer in self.buffers]

    def check(self, inputs: Inputs) -> None:
        values = values_of(inputs)
        for found, buffer, weights in zip(self.y, self.buffers, inputs.weights, strict=True):
            assert (torch.cat((buffer[:_GUARD], buffer[-_GUARD:])) == 99).all(), "places outside of the outputs differ"
            close(found, weights, values)


def run(inputs: Inputs, project: Project, most: int | None = None) -> tuple[Results, int]:
    """What the function ``project`` of a backend gives, and the number of active channels that it returns."""
    x, encoder, weights = inputs
    results, kernel = Results(inputs), encoder.dynamics.kernel
    assert isinstance(kernel, Kernel), kernel
    return results, project(kernel, encoder, x, weights, results.y, x.shape[-1] if most is None else most)


def check(case: Case, project: Project, device: str = "cpu") -> int:
    """Every output; returns the number of active channels that ``project`` tells."""
    inputs = draw(case, device)
    results, active = run(inputs, project)
    results.check(inputs)
    return active
