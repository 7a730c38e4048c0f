"""Who is compared in benchmarks/compare.py and test_neurons.py, on which input, and whether they compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from spikingjelly.activation_based import neuron, surrogate

from spikelm.neurons import ATMN, TILIF, BinaryIF
from spikelm.neurons.base import DynamicsNode
from spikelm.ops import multistep, reference

try:
    import snntorch
except ImportError:  # an optional package: the others are compared without it
    snntorch = None

Forward = Callable[[torch.Tensor], torch.Tensor]
OURS, OP, INT8 = ALL_OURS = "spikelm", "spikelm op", "spikelm op, int8"
SPIKINGJELLY, SNNTORCH, COMPILED = "SpikingJelly", "snnTorch", "torch.compile"
# Largest share of its own norm by which a gradient may differ: exp, arctan and the order of sums are the contender's.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """``forward`` takes x_seq [T, N] to spikes; ``prepare`` comes before every call and is not timed."""

    name: str
    forward: Forward
    prepare: Callable[[], object] = _nothing
    spikes: torch.dtype | None = None  # the input's


@dataclass(frozen=True)
class Neuron:
    """Ours, and the peer that computes the same: both with V = 1, decay 1/2 (1 for IF), ATan and a fixed threshold."""

    ours: Callable[[], DynamicsNode]
    peer: str
    peer_name: str
    theirs: Callable[[], Contender] = field(repr=False)
    non_negative: bool = False


def _spikingjelly(name: str, **arguments: object) -> tuple[str, str, Callable[[], Contender]]:
    def make() -> Contender:
        node = getattr(neuron, name)(step_mode="m", **{"surrogate_function": surrogate.ATan(2.0), **arguments})
        return Contender(SPIKINGJELLY, node, node.reset)

    return SPIKINGJELLY, name, make


def _snntorch_leaky() -> Contender:
    leaky = snntorch.Leaky(beta=0.5, reset_mechanism="subtract", spike_grad=snntorch.surrogate.atan(alpha=2.0))

    def forward(x_seq: torch.Tensor) -> torch.Tensor:
        membrane, spikes = torch.zeros_like(x_seq[0]), []
        for x in x_seq.unbind(0):
            spike, membrane = leaky(x, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return Contender(SNNTORCH, forward)


_LIF = {"tau": 2.0, "decay_input": False}
NEURONS: dict[str, Neuron] = {
    "IF, soft reset": Neuron(lambda: BinaryIF(), *_spikingjelly("IFNode", v_reset=None)),
    "LIF, soft reset": Neuron(lambda: BinaryIF(beta=0.5), *_spikingjelly("LIFNode", v_reset=None, **_LIF)),
    "LIF, hard reset": Neuron(lambda: BinaryIF(beta=0.5, v_reset=0.0), *_spikingjelly("LIFNode", v_reset=0.0, **_LIF)),
    "ternary": Neuron(
        lambda: ATMN(tau=2.0, inject="every", learn_threshold=False),
        *_spikingjelly("TernaryLIFNode", v_reset=None, **_LIF),
    ),
    "integer": Neuron(
        lambda: TILIF(D=4, beta=0.5),
        *_spikingjelly("ILIFNode", tau=2.0, surrogate_function=surrogate.MultiLevelSpikeCount(4)),
        non_negative=True,
    ),
    "LIF, delayed reset": Neuron(
        lambda: BinaryIF(beta=0.5, reset_delay=True, detach_reset=True), SNNTORCH, "Leaky", _snntorch_leaky
    ),
}


def inputs(T: int, N: int, dtype: torch.dtype, device: str, non_negative: bool = False) -> torch.Tensor:
    """Odd quarters within +-7/4, [T, N].

    With decay 1/2 the membrane then never meets a threshold or a tie, where the contenders' rules differ, and every sum
    is exact up to T = 4 in bfloat16 (T = 16 in float32), so that rounding and order of operations excuse no difference.
    """
    generator = torch.Generator().manual_seed(T * N)
    x = (2 * torch.randint(-4, 4, (T, N), generator=generator, dtype=torch.int8) + 1).to(dtype) / 4
    return (x.abs() if non_negative else x).to(device)


def ours(kind: Neuron, backend: str = "auto") -> Contender:
    """Our module; ``backend`` "torch" is what everyone is checked against."""
    node = kind.ours()
    node.step_mode, node.backend = "m", backend
    return Contender(OURS, node, node.reset)


def operation(kind: Neuron, device: str, spikes: torch.dtype | None = None) -> Contender:
    """The operation without the module: no membrane is kept."""
    dynamics, threshold = kind.ours().dynamics, torch.ones((), device=device)

    def forward(x_seq: torch.Tensor) -> torch.Tensor:
        return multistep.multi_step(x_seq, None, threshold, dynamics, keep_state=False, spike_dtype=spikes)[0]

    return Contender(INT8 if spikes == torch.int8 else OP, forward, spikes=spikes)


def compiled(kind: Neuron, device: str) -> Contender:
    """torch.compile of the definition, without the membrane; compiles at its first calls."""
    dynamics, threshold = kind.ours().dynamics, torch.ones((), device=device)

    def forward(x_seq: torch.Tensor) -> torch.Tensor:
        v = torch.zeros(x_seq.shape[1:], device=x_seq.device)
        return reference.multi_step(x_seq, v, threshold, dynamics)[0]

    torch.compiler.reset()  # else each neuron is a recompilation of the one before, and the ninth runs uncompiled
    return Contender(COMPILED, torch.compile(forward, dynamic=False, fullgraph=True))


def field_of(
    kind: Neuron, device: str, *, backward: bool, int8: bool = False, compile: bool = False
) -> Iterator[Contender]:
    """Everyone who takes part: our module and operation, the peer if it is installed, int8 spikes, torch.compile."""
    yield ours(kind)
    yield operation(kind, device)
    if int8 and not backward:
        yield operation(kind, device, torch.int8)
    if kind.peer != SNNTORCH or snntorch is not None:
        yield kind.theirs()
    if compile:
        yield compiled(kind, device)


def call_of(contender: Contender, x: torch.Tensor, gradient: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """The call that is timed: the spikes, or with a ``gradient`` of theirs forward + backward to that of x."""
    if gradient is None:
        return partial(contender.forward, x)
    leaf = x.detach().requires_grad_()

    def train() -> torch.Tensor:
        return torch.autograd.grad(contender.forward(leaf), leaf, gradient)[0]

    return train


Outcome = tuple[torch.Tensor, torch.Tensor | None]


def outcome(contender: Contender, x: torch.Tensor, gradient: torch.Tensor | None) -> Outcome:
    """Spikes, and x's gradient if there is a ``gradient`` of the spikes."""
    contender.prepare()
    if gradient is None:
        with torch.no_grad():
            return contender.forward(x), None
    leaf = x.detach().requires_grad_()
    spikes = contender.forward(leaf)
    return spikes.detach(), torch.autograd.grad(spikes, leaf, gradient)[0]


def difference(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """(share of spikes that differ, |difference| / |expected| of the gradient or 0)."""
    spikes, expected_spikes = found[0], expected[0]
    share = float((spikes.to(expected_spikes.dtype) != expected_spikes).float().mean())
    if found[1] is None or expected[1] is None:
        return share, 0.0
    return share, float((found[1] - expected[1]).float().norm() / expected[1].float().norm())


def is_equal(difference: tuple[float, float], dtype: torch.dtype) -> bool:
    """Whether all spikes are the same, and the gradients within TOLERANCE. A NaN is not."""
    return difference[0] == 0 and difference[1] <= TOLERANCE[dtype]
