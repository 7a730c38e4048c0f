"""The operators as PyTorch sees them: opcheck, compilers, transforms, saved tensors, threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from spikelm.cpu import module as cpu_module
from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN
from spikelm.ops import operators
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.multistep import encode_sum, multi_step

pytestmark = pytest.mark.skipif(cpu_module.unavailable() is not None, reason=str(cpu_module.unavailable()))
ATAN = surrogate.ATan(alpha=2.0)
EVERY = Dynamics("ternary", ATAN, 0.75)
FIRST = Dynamics("binary", ATAN, 0.75, reset="hard", inject="first", v_reset=0.5)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype).requires_grad_()


def threshold(*shape: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, max(1, *shape, 1)).reshape(shape).requires_grad_()


# PyTorch's own check of schema, fake tensors, autograd registration and AOT dispatch


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("dynamics", [EVERY, FIRST])
def test_opcheck_of_multi_step(dynamics: Dynamics, with_state: bool) -> None:
    x = leaf(5, 6) if dynamics.inject == "first" else leaf(3, 5, 6)
    v = leaf(5, 6) if with_state else None
    definitions, numbers = dynamics.kernel
    arguments = (x, v, threshold(6), definitions, numbers, 3, torch.float32, 0.0, False, with_state)
    torch.library.opcheck(torch.ops.spikelm.multi_step.default, arguments)
    grads = (torch.randn(3, 5, 6), torch.randn(5, 6) if with_state else None)
    plain = [None if tensor is None else tensor.detach() for tensor in (x, v, threshold(6))]
    for needs in (True, False):
        torch.library.opcheck(
            torch.ops.spikelm.multi_step_backward.default,
            (*plain, *grads, definitions, numbers, 3, 0.0, False, needs, needs),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_opcheck_of_encode_sum(dtype: torch.dtype) -> None:
    definitions, numbers = EVERY.kernel
    x, V = leaf(5, 6), threshold(6)
    if dtype == torch.int8:
        x, V = x.detach(), V.detach()
    torch.library.opcheck(torch.ops.spikelm.encode_sum.default, (x, V, definitions, numbers, 4, dtype, 0.5, 1.0))
    torch.library.opcheck(
        torch.ops.spikelm.encode_sum_backward.default,
        (x.detach(), V.detach(), torch.randn(5, 6), definitions, numbers, 4, 0.5, True),
    )


# Compilers


def step(x: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spikes, v = multi_step(x, None, V, EVERY)
    return spikes, v, encode_sum(x[0], V, EVERY, 4, 0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (5, 8, 9):
        results = []
        for function in (step, compiled):
            x, V = leaf(3, N, 6), threshold(6)
            outputs = function(x, V)
            loss = sum(output.square().sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, [x, V])))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_a_graph_holds_one_node_per_call_whatever_T() -> None:
    def nodes(T: int) -> list[str]:
        graph = make_fx(lambda x: multi_step(x, None, torch.tensor(1.0), EVERY)[0], tracing_mode="fake")(
            torch.ones(T, 4)
        )
        return [str(node.target) for node in graph.graph.nodes if "spikelm" in str(node.target)]

    assert nodes(2) == nodes(32) == ["spikelm.multi_step.default"]


def test_exports() -> None:
    neuron = ATMN(num_channels=6, T=3)

    class Code(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = neuron

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.neuron.encode_sum(x)

    x = leaf(4, 6).detach()
    exported = torch.export.export(Code(), (x,))
    assert torch.equal(exported.module()(x), neuron.encode_sum(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_neuron_of_channels_compiles_with_dynamic_shapes() -> None:
    neuron = ATMN(num_channels=5)
    compiled = torch.compile(neuron.encode_sum, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (3, 4):
        assert torch.equal(compiled(leaf(N, 5)), neuron.encode_sum(leaf(N, 5)))


@pytest.mark.filterwarnings("ignore")  # of the tracer, about comparisons of shapes
def test_a_trace_holds_the_operator() -> None:
    x, V = leaf(3, 5, 6).detach(), threshold(6).detach()
    traced = torch.jit.trace(lambda x: multi_step(x, None, V, EVERY)[0], (x,))
    assert "spikelm::multi_step" in str(traced.graph)
    assert torch.equal(traced(-x), multi_step(-x, None, V, EVERY)[0])


# Transforms


def test_vmap_maps_over_a_batch_axis() -> None:
    x, v, V = leaf(3, 5, 6, 2), leaf(5, 2, 6), threshold(6)
    spikes, last = vmap(lambda x, v: multi_step(x, v, V, EVERY), in_dims=(3, 1), out_dims=(3, 1))(x, v)
    for i in range(2):
        one, one_last = multi_step(x[..., i], v[:, i], V, EVERY)
        assert torch.equal(spikes[..., i], one)
        assert torch.equal(last[:, i], one_last)
    sums = vmap(lambda x: encode_sum(x, V, EVERY, 4, 1.0), in_dims=2)(x[0])
    assert torch.equal(sums, encode_sum(x[0].movedim(2, 0), V, EVERY, 4, 1.0))
    first = vmap(lambda x: multi_step(x, None, V, FIRST, keep_state=False)[0], in_dims=3, out_dims=3)(x)
    assert torch.equal(first[..., 1], multi_step(x[..., 1], None, V, FIRST)[0])
    shared = vmap(lambda v: multi_step(x[..., 0], v, V, EVERY)[0], in_dims=1)(v)
    assert torch.equal(shared[1], multi_step(x[..., 0], v[:, 1], V, EVERY)[0])


def test_gradients_per_sample() -> None:
    neuron = ATMN(num_channels=6, tau=0.5, frame_weight=0.5)
    x, weights = leaf(4, 5, 6).detach(), torch.randn(5, 6)
    parameters = {"a": neuron.a.detach()}

    class Code(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = neuron

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.neuron.encode_sum(x)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (functional_call(Code(), {"neuron.a": parameters["a"]}, (x,)) * weights).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["a"]
    for i in range(4):
        (expected,) = torch.autograd.grad((neuron.encode_sum(x[i]) * weights).sum(), neuron.a)
        torch.testing.assert_close(per_sample[i], expected)
    assert per_sample.abs().sum() > 0


def test_gradients_per_sample_over_time() -> None:
    x, V = leaf(4, 3, 5, 6).detach(), threshold(6).detach()
    loss: Callable[..., torch.Tensor] = lambda V, x: multi_step(x, None, V, EVERY)[0].square().sum()  # noqa: E731
    per_sample = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(V, x)
    for i in range(4):
        for found, expected in zip(per_sample, grad(loss, argnums=(0, 1))(V, x[i]), strict=True):
            torch.testing.assert_close(found[i], expected)


def test_vmap_over_thresholds_is_refused() -> None:
    x, V = leaf(3, 5, 6).detach(), torch.ones(2, 6)
    for call in (lambda V: multi_step(x, None, V, EVERY)[0], lambda V: encode_sum(x[0], V, EVERY, 4, 1.0)):
        with pytest.raises(SpikelmError, match="no kernel for a threshold that vmap maps over; use backend='torch'"):
            vmap(call)(V)


def test_autocast_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, V = leaf(3, 5, 6, dtype=dtype), threshold(6)
        expected = multi_step(x, None, V, EVERY)
        with torch.autocast("cpu", torch.bfloat16):
            found = multi_step(x, None, V, EVERY)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


# Autograd


def saved_bytes(call: Callable[[], Any]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(tuple(x.shape)), x)[1], lambda x: x):
        call()
    return shapes


def test_nothing_but_the_inputs_is_saved() -> None:
    x, v, V = leaf(16, 5, 6), leaf(5, 6), threshold(6)
    assert saved_bytes(lambda: multi_step(x, None, V, EVERY)) == [(16, 5, 6), (6,)]
    assert saved_bytes(lambda: multi_step(x, v, V, EVERY)) == [(16, 5, 6), (5, 6), (6,)]
    assert saved_bytes(lambda: encode_sum(x[0], V, EVERY, 8, 1.0)) == [(5, 6), (6,)]


def test_only_the_asked_gradients() -> None:
    for asked in ([0], [1], [2], [0, 2]):
        tensors = [leaf(4, 3).detach(), leaf(3).detach(), threshold(3).detach()]
        for i in asked:
            tensors[i].requires_grad_()
        spikes, last = multi_step(*tensors, EVERY)
        (spikes.sum() + last.sum()).backward()
        assert [tensor.grad is not None for tensor in tensors] == [i in asked for i in range(3)]
        code = encode_sum(tensors[0], tensors[2], EVERY, 3, 1.0)
        assert code.requires_grad == (asked != [1])


def test_either_output_alone() -> None:
    x, V = leaf(4, 3), threshold(3)
    spikes, last = multi_step(x, None, V, EVERY)
    parts = [torch.autograd.grad(output.sum(), [x, V], retain_graph=True) for output in (spikes, last)]
    both = torch.autograd.grad(spikes.sum() + last.sum(), [x, V])
    for one, other, sum_of in zip(*parts, both, strict=True):
        torch.testing.assert_close(one + other, sum_of)


def test_gradients_come_in_the_dtype_of_the_input() -> None:
    x, V = leaf(50, 3, dtype=torch.bfloat16), threshold(3)
    encode_sum(x, V, EVERY, 4, 1.0).sum().backward()
    assert (x.grad.dtype, V.grad.dtype) == (torch.bfloat16, torch.float32)
    exact = x.detach().float().requires_grad_()
    encode_sum(exact, V, EVERY, 4, 1.0).sum().backward()
    assert torch.equal(x.grad, exact.grad.bfloat16())


def test_a_second_derivative_is_refused_and_not_zero() -> None:
    for output in (
        lambda x: multi_step(x, None, torch.tensor(1.0), EVERY)[0],
        lambda x: encode_sum(x, torch.tensor(1.0), EVERY, 4, 1.0),
    ):
        x = leaf(4, 3)
        (first,) = torch.autograd.grad(output(x).square().sum(), x, create_graph=True)  # by itself this is fine
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_a_second_derivative_is_refused_under_transforms_too() -> None:
    x = leaf(4, 3).detach()
    for output in (
        lambda x: multi_step(x, None, torch.tensor(1.0), EVERY)[0],
        lambda x: encode_sum(x, torch.tensor(1.0), EVERY, 4, 1.0),
    ):
        total = lambda x: output(x).square().sum()  # noqa: B023, E731
        with pytest.raises(SpikelmError, match="no second derivative; use backend='torch'"):
            grad(lambda x: grad(total)(x).sum())(x)  # noqa: B023


def test_a_forward_derivative_is_refused_and_not_missing() -> None:
    x, V = leaf(4, 3).detach(), torch.tensor(1.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (lambda: multi_step(dual, None, V, EVERY), lambda: encode_sum(dual, V, EVERY, 4, 1.0)):
            with pytest.raises(SpikelmError, match="no forward-mode derivative; use backend='torch'"):
                call()


def test_a_membrane_keeps_its_gradient_beside_eight_bit_spikes() -> None:
    gradients = []
    for backend in ("auto", "torch"):
        x, V = leaf(4, 3), threshold(3)
        spikes, last = multi_step(x, None, V, EVERY, spike_dtype=torch.int8, backend=backend)
        assert not spikes.requires_grad
        gradients.append(torch.autograd.grad(last.square().sum(), [x, V]))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_lazily_negated_tensors() -> None:
    x, v, V = -leaf(4, 3).detach(), leaf(3).detach(), threshold(3).detach()
    expected, v_expected = multi_step(x, v, V, EVERY)
    negated = [torch._neg_view(-tensor) for tensor in (x, v, V)]
    assert all(tensor.is_neg() for tensor in negated)
    found, v_found = multi_step(*negated, EVERY)
    assert torch.equal(found, expected)
    assert torch.equal(v_found, v_expected)
    assert torch.equal(encode_sum(negated[0], negated[2], EVERY, 4, 1.0), encode_sum(x, V, EVERY, 4, 1.0))
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(multi_step(given, v, V, EVERY)[0], given, negated[0])
    (plain,) = torch.autograd.grad(multi_step(given, v, V, EVERY)[0], given, x)
    assert torch.equal(gradient, plain)


def test_recomputation_in_a_checkpoint() -> None:
    x, V = leaf(4, 3), threshold(3)
    expected = torch.autograd.grad(multi_step(x, None, V, EVERY)[0].square().sum(), [x, V])
    again = torch.utils.checkpoint.checkpoint(lambda x, V: multi_step(x, None, V, EVERY)[0], x, V, use_reentrant=False)
    for one, other in zip(expected, torch.autograd.grad(again.square().sum(), [x, V]), strict=True):
        assert torch.equal(one, other)


def test_from_several_threads_at_once() -> None:
    x, V = leaf(8, 20_000), threshold()

    def run(_: int) -> tuple[torch.Tensor, ...]:
        spikes, _ = multi_step(x, None, V, EVERY)
        return spikes, *torch.autograd.grad(spikes.square().sum(), [x, V])

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(8)):
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)


def test_eager_and_operator_agree() -> None:
    """The quick way and the dispatcher's run the same launch functions."""
    x, v, V = leaf(3, 5, 6), leaf(5, 6), threshold(6)
    results = []
    for quick in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not quick:
                patch.setattr(operators, "is_plain", lambda *tensors: False)
            spikes, last = multi_step(x, v, V, EVERY)
            code = encode_sum(x, V, EVERY, 4, 0.5)
            loss = spikes.square().sum() + last.square().sum() + code.square().sum()
            results.append((spikes, last, code, *torch.autograd.grad(loss, [x, v, V])))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
