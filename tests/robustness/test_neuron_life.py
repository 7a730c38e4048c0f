"""A neuron's whole life, at random: after every call its spikes and its membrane are those of the reference."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from spikingjelly.activation_based import functional

from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, BinaryIF, DynamicsNode
from spikelm.ops import reference
from tests.robustness.profiles import examples

KINDS = ("ATMN first", "ATMN every", "TILIF", "BinaryIF soft", "BinaryIF soft_delayed", "BinaryIF hard")
CHANNELS = 3
SEEDS = st.integers(0, 2**31)
STEPS = st.integers(0, 5)
FRAMES = st.sampled_from([(2, CHANNELS), (5, CHANNELS), (0, CHANNELS), (2, 2, CHANNELS), (CHANNELS,)])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])
THRESHOLDS = st.sampled_from([0.25, 0.7, 1.0, 3.0])
DECAYS = st.sampled_from([1.0, 0.9, 0.5])


def build(kind: str, V: float, decay: float, several: bool, learned: bool) -> Any:
    """A neuron with thresholds of its own for every channel, or one for all."""
    name, _, variant = kind.partition(" ")
    arguments: dict[str, Any] = {"v_threshold": V, "num_channels": CHANNELS if several else None}
    arguments["learn_threshold"] = learned
    if name == "ATMN":
        return ATMN(tau=1 / decay, inject=variant, **arguments)
    if name == "TILIF":
        return TILIF(D=3, beta=decay, **arguments)
    arguments["v_reset"] = -0.5 if variant == "hard" else None
    return BinaryIF(beta=decay, reset_delay=variant == "soft_delayed", **arguments)


def random_input(seed: int, V: float, *shape: int) -> torch.Tensor:
    """Numbers some V wide, some of them halves of V, where the ties are, and now and then one that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * V * torch.randn(shape, generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, (2 * x / V).round() * (V / 2), x)
    if seed % 8 == 0 and x.numel():
        x.view(-1)[seed % x.numel()] = (float("nan"), float("inf"), float("-inf"))[seed // 8 % 3]
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every value; NaN is NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


class NeuronLife(RuleBasedStateMachine):
    """``v`` and ``started`` are what the neuron must hold: a number, everywhere, before the first call."""

    kind = "TILIF"

    @initialize(V=THRESHOLDS, decay=DECAYS, several=st.booleans(), learned=st.booleans())
    def is_built(self, V: float, decay: float, several: bool, learned: bool) -> None:
        self.make = lambda threshold=V: build(self.kind, threshold, self.decay, several, learned)
        self.V, self.decay, self.several = V, decay, several
        self.neuron: DynamicsNode = self.make()
        self.forget()

    def forget(self) -> None:
        self.v: Any = -0.5 if self.kind == "BinaryIF hard" else 0.0
        self.started = False

    def expected(self, x_seq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the reference makes of x_seq [T, N, *]: spikes, and the membrane after every step."""
        frame, dtype = x_seq.shape[1:], reference.state_dtype(x_seq.dtype)
        if isinstance(self.v, torch.Tensor) and self.v.shape != frame:
            self.forget()
        v = self.v.to(dtype) if isinstance(self.v, torch.Tensor) else torch.full(frame, self.v, dtype=dtype)
        a = self.neuron.a
        threshold = torch.full((), self.V, dtype=dtype) if a is None else a.detach().to(dtype).exp()
        with torch.no_grad():
            spikes, membranes = reference.multi_step(x_seq, v, threshold, self.neuron.dynamics, self.started)
        self.v = membranes[-1].clone() if len(membranes) else v
        self.started = self.started or len(x_seq) > 0
        return spikes, membranes

    @rule(seed=SEEDS, T=STEPS, frame=FRAMES, dtype=DTYPES)
    def takes_several_steps(self, seed: int, T: int, frame: tuple[int, ...], dtype: torch.dtype) -> None:
        x_seq = random_input(seed, self.V, T, *frame).to(dtype)
        before = x_seq.clone()
        spikes, membranes = self.expected(x_seq)
        functional.set_step_mode(self.neuron, "m")
        assert same(self.neuron(x_seq).detach(), spikes)
        assert same(x_seq, before)
        if self.neuron.store_v_seq:
            assert self.neuron.v_seq is not None
            assert same(self.neuron.v_seq.detach(), membranes)
        functional.detach_net(self.neuron)

    @rule(seed=SEEDS, frame=FRAMES, dtype=DTYPES)
    def takes_one_step(self, seed: int, frame: tuple[int, ...], dtype: torch.dtype) -> None:
        x = random_input(seed, self.V, *frame).to(dtype)
        spikes, _ = self.expected(x.unsqueeze(0))
        functional.set_step_mode(self.neuron, "s")
        assert same(self.neuron(x).detach(), spikes[0])
        functional.detach_net(self.neuron)

    @rule(seed=SEEDS, T=st.integers(1, 4))
    def learns(self, seed: int, T: int) -> None:
        """Gradients are those of the reference, and leave the membrane as the forward made it."""
        x_seq = random_input(8 * seed + 1, self.V, T, 2, CHANNELS)
        functional.reset_net(self.neuron)
        self.forget()
        self.expected(x_seq)
        functional.set_step_mode(self.neuron, "m")
        gradients = []
        for backend in ("auto", "torch"):
            twin = copy.deepcopy(self.neuron)
            twin.backend, x = backend, x_seq.clone().requires_grad_()
            (twin(x) * torch.arange(1.0, 1 + x.numel()).view_as(x)).sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in twin.parameters())])
        for found, right in zip(*gradients, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        self.neuron(x_seq)
        functional.detach_net(self.neuron)

    @rule(seed=SEEDS)
    def encodes_beside(self, seed: int) -> None:
        """Encoding, and a call with states of its own, read no membrane and change none."""
        x = random_input(seed, self.V, 4, CHANNELS)
        if isinstance(self.neuron, ATMN | TILIF):
            frames = self.neuron.encode(x)
            assert same(frames.sum(0), self.neuron.encode_sum(x).detach() + 0.0)
        fresh = tuple(self.neuron._memories_rv.values())
        self.neuron.multi_step_functional_forward((x.unsqueeze(0),), fresh)

    @rule()
    def is_reset(self) -> None:
        functional.reset_net(self.neuron)
        self.forget()

    @rule()
    def is_copied(self) -> None:
        earlier, self.neuron = self.neuron, copy.deepcopy(self.neuron)
        functional.set_step_mode(earlier, "s")
        earlier(torch.ones(1, CHANNELS))  # which the copy does not see

    @rule()
    def is_pickled(self) -> None:
        self.neuron = pickle.loads(pickle.dumps(self.neuron))

    @rule(V=THRESHOLDS)
    def is_saved_and_loaded(self, V: float) -> None:
        """The file has the threshold, unless it is a plain number, and no membrane."""
        file = io.BytesIO()
        torch.save(self.neuron.state_dict(), file)
        file.seek(0)
        other = self.make(self.V if self.neuron.a is None else V)
        other.load_state_dict(torch.load(file, weights_only=True))
        other = other.to(torch.float64 if self.neuron.a is not None and self.neuron.a.dtype == torch.float64 else None)
        other.train(self.neuron.training)
        self.neuron = other
        self.forget()

    @rule(V=THRESHOLDS)
    def gets_another_threshold(self, V: float) -> None:
        self.neuron.v_threshold = V
        self.V = V

    @rule(decay=DECAYS)
    def gets_another_decay(self, decay: float) -> None:
        name = "tau" if isinstance(self.neuron, ATMN) else "beta"
        setattr(self.neuron, name, 1 / decay if name == "tau" else decay)
        self.decay = decay

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def is_cast(self, dtype: torch.dtype) -> None:
        self.neuron.to(dtype)
        if isinstance(self.v, torch.Tensor):
            self.v = self.v.to(dtype)

    @rule(training=st.booleans(), store=st.booleans(), backend=st.sampled_from(["auto", "torch"]))
    def changes_its_settings(self, training: bool, store: bool, backend: str) -> None:
        self.neuron.train(training)
        self.neuron.store_v_seq, self.neuron.backend = store, backend

    @rule(x=st.sampled_from([torch.zeros(2, CHANNELS, dtype=torch.int64), torch.zeros(2, 2, CHANNELS + 1)]))
    def refuses(self, x: torch.Tensor) -> None:
        """And forgets nothing."""
        if x.is_floating_point() and not self.several:
            return
        functional.set_step_mode(self.neuron, "m")
        with pytest.raises(SpikelmError):
            self.neuron(x)

    @precondition(lambda self: hasattr(self, "neuron"))
    @invariant()
    def holds_the_membrane(self) -> None:
        v = self.neuron.v
        assert isinstance(v, torch.Tensor) == isinstance(self.v, torch.Tensor)
        assert same(v, self.v) if isinstance(v, torch.Tensor) else v == self.v
        assert getattr(self.neuron, "started", self.started) == self.started


@pytest.mark.filterwarnings("ignore:.*no kernel for")
@pytest.mark.parametrize("kind", KINDS)
def test_a_life(kind: str) -> None:
    machine = type("NeuronLife", (NeuronLife,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(examples(12, 1000), stateful_step_count=20))
