"""The CPU kernels compute what the reference does: every neuron, storage type, layout and number of threads."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from spikelm.cpu import launch, module
from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics
from tests.kernel_cases import (
    LAYOUTS,
    NIGHTLY,
    SURROGATES,
    Case,
    build_together,
    draw,
    dynamics,
    kernel_for,
    numbers,
    transcribe,
)
from tests.kernel_checks import changed, check_sequence, check_sum, equal

pytestmark = pytest.mark.usefixtures("poisoned")
F32, F64, F16, BF16, I8 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8


def sample() -> Iterator[tuple[Dynamics, torch.dtype]]:
    """Specialisations, about a second of compiling each: every pair of two properties is among them."""
    rectangle = "RECTANGLE" if "RECTANGLE" in SURROGATES else "TRIANGLE"
    in_float32 = [
        dynamics("binary", "soft", "ATAN"),
        dynamics("binary", "soft_delayed", "INVERSE_SQUARE", first=True, detach=True),
        dynamics("binary", "hard", "TRIANGLE"),
        dynamics("ternary", "soft", "ATAN", first=True),
        dynamics("ternary", "soft_delayed", rectangle),
        dynamics("ternary", "hard", "TRIANGLE", first=True),
        dynamics("integer", "soft"),
        dynamics("integer", "soft_delayed", first=True),
        dynamics("integer", "hard", detach=True),
        dynamics("ternary", "soft", "SIGMOID", detach=True),
        dynamics("binary", "soft_delayed", "EXPONENTIAL"),
        dynamics("binary", "hard", "GAUSSIAN", first=True, detach=True),
        dynamics("integer", "soft", first=True, sgc="gradient", sgc_weight=0.3),
    ]
    for dynamic in in_float32:
        yield dynamic, F32
    for i in (0, 4, 8, 11):
        yield in_float32[i], F64
    for i, dtype in ((3, BF16), (6, BF16), (2, F16), (4, F16)):
        yield in_float32[i], dtype


def product() -> Iterator[tuple[Dynamics, torch.dtype]]:
    """Every specialisation but for those of int8."""
    flags = itertools.product((False, True), repeat=2)
    for fire, reset, (first, detach) in itertools.product(
        ("binary", "ternary", "integer"), ("soft", "soft_delayed", "hard"), flags
    ):
        names = ["WINDOW"] if fire == "integer" else list(SURROGATES)
        for name, dtype in itertools.product(names, (F32, F64, F16, BF16)):
            yield dynamics(fire, reset, name, first=first, detach=detach), dtype
        if fire == "integer":
            yield dynamics(fire, reset, first=first, detach=detach, sgc="gradient", sgc_weight=0.3), F32


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The kernels of the chosen tests, but for those of test_vectors."""
    build_together(request, lambda one: None if "target" in one else (one["dynamic"], one["dtype"]))


# (T, frame, threshold): around the sizes of vectors and tiles, h on the heap from T = 129; one threshold, one a
# channel in the last axis, in the first and in a middle one.
CALLS: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [
    (4, (1,), ()),
    (2, (), ()),
    (2, (63,), (63,)),
    (3, (1023,), ()),
    (4, (1025,), (1025,)),
    (3, (3, 1025), (1025,)),
    (16, (4099,), ()),
    (32, (7, 9), (9,)),
    (33, (65,), (1,)),
    (64, (5, 3, 2), (3, 1)),
    (1, (2, 3, 17, 5), (3, 1, 1)),
    (8, (2, 700), (2, 1)),
    (150, (70,), ()),
]


def name_of(specialisation: tuple[Dynamics, torch.dtype]) -> str:
    dynamic, dtype = specialisation
    words = [line.split()[2].lower() for line in kernel_for(Case(dynamic)).definitions.splitlines()]
    flags = [name for name, word in zip(("first", "detach", "sgc"), words[3:], strict=True) if word == "1"]
    return "-".join([*words[:3], *flags, str(dtype).removeprefix("torch.")])


def specialisations(*names: str) -> pytest.MarkDecorator:
    """Parametrises over the specialisations whose names start with one of these."""
    chosen = {name_of(one): one for one in itertools.chain(sample(), product() if NIGHTLY else ())}
    chosen = {name: one for name, one in chosen.items() if name.startswith(names or ("",))}
    assert len(chosen) >= len(names)
    return pytest.mark.parametrize(("dynamic", "dtype"), chosen.values(), ids=chosen)


@specialisations()
def test_sequences(dynamic: Dynamics, dtype: torch.dtype) -> None:
    for i, (T, frame, threshold) in enumerate(CALLS):
        started = dynamic.inject == "first" and i % 3 == 2
        start, with_v = (0.25 if i % 4 == 0 else 0.0), i % 2 == 1
        check_sequence(launch, Case(dynamic, dtype, T, frame, threshold, with_v, start, started))


@specialisations()
def test_sums(dynamic: Dynamics, dtype: torch.dtype) -> None:
    if dynamic.inject == "every":
        kernel, first = kernel_for(Case(dynamic)), replace(dynamic, inject="first")
        x, threshold = draw(Case(first, dtype)).x, draw(Case(first, dtype)).threshold
        entered = torch.cat((x[None], torch.zeros(3, *x.shape, dtype=dtype)))
        spikes, _ = launch.forward(kernel, entered, None, threshold, 4, dtype, 0.0, False, False)
        total = launch.forward_sum(kernel, x, threshold, 4, dtype, 1.0, 1.0)
        equal("sum", total, spikes.float().sum(0).to(dtype))
        return
    for i, (T, frame, threshold) in enumerate(CALLS):
        for decay, frame_weight in ((0.75, 1.0), (0.5, 0.5), (0.5, 0.3), (1.0, 1.0))[i % 2 :: 2]:
            check_sum(launch, Case(replace(dynamic, decay=decay), dtype, T, frame, threshold), frame_weight)


@specialisations("ternary-soft-atan-first-float32", "ternary-hard-triangle-first-float32")
@pytest.mark.parametrize("T", [1, 3, 16, 40, 300])
def test_sums_of_extremes(dynamic: Dynamics, dtype: torch.dtype, T: int) -> None:
    """A decay that is a power of two scales the threshold in place of the membrane, while that loses nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([scale * torch.randn(100, generator=generator) for scale in (1.0, 1e30, 1e-20, 1e-38)])
    inf = float("inf")
    x = torch.cat([x, torch.tensor([0.0, -0.0, inf, -inf, inf - inf, 3e38, 1e-45, 0.75, 1.5])]).to(dtype)
    for decay, V in itertools.product((0.5, 1.0, 2.0, 0.25, 4.0, 2.0**-60, 2.0**60, 0.75), (0.75, 2e-30, 3e37)):
        one = replace(dynamic, decay=decay)
        found = launch.forward_sum(kernel_for(Case(one)), x, torch.tensor(V), T, dtype, 1.0, 1.0)
        equal(f"sum, decay {decay}, V {V}", found, reference.encode_sum(x, torch.tensor(V), one, T, 1.0))


@specialisations("binary-soft-atan-float32", "ternary-soft-atan-first-bfloat16", "ternary-hard-triangle-first-float32")
def test_layouts(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """x and the gradient each in their own layout, the results as if both were dense."""
    case = Case(dynamic, dtype, 3, (4, 3, 2, 5), (5,))
    for layout, grad_layout in itertools.product(LAYOUTS, repeat=2):
        check_sequence(launch, replace(case, layout=layout, grad_layout=grad_layout))
    for i, layout in enumerate(LAYOUTS):
        for frame, threshold in (((7,), ()), ((40, 70), (40, 1)), ((2, 2, 3, 2, 3, 4), (3, 1)), ((), ())):
            check_sequence(launch, Case(dynamic, dtype, 3, frame, threshold, True, 0.0, False, layout, LAYOUTS[i - 1]))
    if dynamic.inject == "first":
        for layout in LAYOUTS:
            check_sum(launch, replace(case, layout=layout, grad_layout=layout), 0.5)


@specialisations(
    "binary-soft-atan-float", "ternary-hard", "integer-hard", "ternary-soft_delayed", "integer-soft-window"
)
def test_nan_and_infinity(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """A NaN never fires and stays in its own element; an infinite input fires at the highest level."""
    case = Case(dynamic, dtype, 3, (70,), (70,), with_v=True, special=True)
    check_sequence(launch, case, to_autograd=False)
    kernel, inputs, plain = kernel_for(case), draw(case), draw(replace(case, special=False))
    finite = inputs.x.isfinite() if kernel.inject_first else inputs.x.isfinite().all(0)
    found, expected = (
        launch.backward(kernel, x, case_v, V, 3, grads, last, 0.0, False, True, True)
        for x, case_v, V, grads, last in (inputs, plain)
    )
    for name, one, other in zip(("grad_x", "grad_v", "grad_threshold"), found, expected, strict=True):
        equal(f"{name} of the other elements", one[..., finite], other[..., finite])


@specialisations("ternary-soft-atan-first-float32", "integer-soft-window-bfloat16")
def test_int8(dynamic: Dynamics, dtype: torch.dtype) -> None:
    case = Case(dynamic, dtype, 4, (1025,), (), with_v=True)
    kernel, (x, v, threshold, *_) = kernel_for(case), draw(case)
    spikes, v_last = launch.forward(kernel, x, v, threshold, 4, I8, 0.0, False, True)
    expected = transcribe(case, draw(case))
    equal("spikes", spikes, expected.spikes.to(I8))
    equal("v_last", v_last, expected.v_last)
    frame = x if kernel.inject_first else x[0]
    count = launch.forward_sum(kernel, frame, threshold, 4, dtype, 1.0, 1.0)
    equal("count", launch.forward_sum(kernel, frame, threshold, 4, I8, 1.0, 1.0), count.to(I8))
    halves = launch.forward_sum(kernel, frame, threshold, 4, F32 if dtype == F32 else dtype, 0.5, 1.0)
    scaled = launch.forward_sum(kernel, frame, threshold, 4, I8, 0.5, 8.0)
    equal("8 * weighted sum", scaled, (8 * halves).to(I8))
    assert int(scaled.abs().max()) > 8


@specialisations("integer-soft-window-bfloat16")
def test_counts_that_16_bits_do_not_hold_are_rounded(dynamic: Dynamics, dtype: torch.dtype) -> None:
    many = replace(dynamic, levels=100_000)
    x = (numbers((1, 4099), torch.Generator().manual_seed(0), 900.0)).to(dtype)
    spikes, _ = launch.forward(kernel_for(Case(many)), x, None, torch.tensor(0.3), 1, dtype, 0.0, False, False)
    y = (x.float() / torch.tensor(0.3)).double()
    equal("spikes", spikes, (y.sign() * (y.abs() + 0.5).floor()).float().to(dtype))
    assert float(spikes.abs().max()) > 2000


@specialisations("ternary-soft_delayed-", "ternary-soft-atan-first-float32", "integer-soft-window-float32")
def test_what_is_not_asked_for(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """Gradients that are None are zeros, results that are not needed are None, and the rest is the same."""
    case = Case(dynamic, dtype, 3, (130,), (), with_v=True)
    kernel, (x, v, threshold, grad_spikes, grad_v_last) = kernel_for(case), draw(case)

    def backward(spikes: Any, last: Any, needs_v: bool = True, needs_threshold: bool = True) -> Any:
        return launch.backward(kernel, x, v, threshold, 3, spikes, last, 0.0, False, needs_v, needs_threshold)

    full = backward(grad_spikes, grad_v_last)
    for needs in itertools.product((False, True), repeat=2):
        found = backward(grad_spikes, grad_v_last, *needs)
        for name, one, other, needed in zip(("x", "v", "threshold"), found, full, (True, *needs), strict=True):
            if needed:
                equal(name, one, other)
            else:
                assert one is None
    for given, zeros in (
        ((grad_spikes, None), (grad_spikes, torch.zeros_like(grad_v_last))),
        ((None, grad_v_last), (torch.zeros_like(grad_spikes), grad_v_last)),
        ((None, None), (torch.zeros_like(grad_spikes), torch.zeros_like(grad_v_last))),
    ):
        for name, one, other in zip(("x", "v", "threshold"), backward(*given), backward(*zeros), strict=True):
            equal(name, one, other)
    kept, discarded = (
        launch.forward(kernel, x, v, threshold, 3, dtype, 0.0, False, keep_state) for keep_state in (True, False)
    )
    equal("spikes", discarded[0], kept[0])
    assert discarded[1] is None
    frame = x if kernel.inject_first else x[0]
    pairs = [launch.backward_sum(kernel, frame, threshold, 3, frame, 0.5, needs) for needs in (True, False)]
    equal("grad_x of the sum", pairs[1][0], pairs[0][0])
    assert pairs[1][1] is None


@pytest.mark.usefixtures("threads")
@specialisations("ternary-soft-atan-first", "binary-soft-atan-float32", "ternary-soft-sigmoid-detach-float32")
@pytest.mark.parametrize("threshold", [(), (331,), (101, 1)], ids=["one", "last", "first"])
def test_the_number_of_threads_changes_no_bit(dynamic: Dynamics, dtype: torch.dtype, threshold: Any) -> None:
    case = Case(dynamic, dtype, 3, (101, 331), threshold, with_v=True)
    kernel, (x, v, V, grad_spikes, grad_v_last) = kernel_for(case), draw(case)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        frame = x if kernel.inject_first else x[0]
        found = [
            *launch.forward(kernel, x, v, V, 3, dtype, 0.0, False, True),
            *launch.backward(kernel, x, v, V, 3, grad_spikes, grad_v_last, 0.0, False, True, True),
            launch.forward_sum(kernel, frame, V, 3, dtype, 0.3, 1.0),
            *launch.backward_sum(kernel, frame, V, 3, grad_spikes[0], 0.3, True),
        ]
        assert torch.get_num_threads() == threads
        return [tensor for tensor in found if tensor is not None]

    one = results(1)
    assert len(one) == 8
    for threads in (2, 3, 2, 1):
        for name, found, expected in zip("svxVtYxV", results(threads), one, strict=True):
            equal(f"{name} with {threads} threads", found, expected)
    torch.set_num_threads(2)
    check_sequence(launch, case)


@specialisations("binary-soft-atan-float32")
def test_the_threshold_gradient_is_summed_in_float64(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """A million shares of both signs: float32 sums are wrong in the fifth digit."""
    case = Case(dynamic, dtype, 2, (1 << 20,))
    kernel, (x, _, V, grad_spikes, _) = kernel_for(case), draw(case)
    found = launch.backward(kernel, x, None, V, 2, grad_spikes, None, 0.0, False, False, True)[2]
    inputs = draw(case)
    shares = transcribe(case, inputs._replace(grad_v_last=torch.zeros_like(inputs.grad_v_last))).grad_threshold
    equal("grad_threshold", found, shares.double().sum().float())
    assert abs(shares.numpy().cumsum()[-1] - float(found)) > 1e-5 * abs(float(found))  # numpy adds in float32


@specialisations("integer-soft-window-float32", "ternary-hard-triangle-first-float32", "binary-soft-atan-float32")
def test_the_threshold_gradient_against_float64(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """Inputs and decay of few bits, so that float32 fires as float64 does; then only the gradient is rounded."""
    single = replace(dynamic, decay=0.5)
    double = Case(single, F64, 4, (2, 4099))
    inputs = draw(double)
    exact = inputs._replace(x=(8 * inputs.x).round() / 8, threshold=torch.tensor(0.75, dtype=F64))
    shares = transcribe(double, exact).grad_threshold
    x, _, V, grad_spikes, grad_v_last = (None if one is None else one.float() for one in exact)
    found = launch.backward(kernel_for(Case(single)), x, None, V, 4, grad_spikes, grad_v_last, 0.0, False, False, True)[
        2
    ]
    assert abs(float(found) - float(shares.sum())) <= 1e-7 * float(shares.abs().sum())


@specialisations("binary-soft_delayed-exponential-float32", "binary-hard-gaussian-first-detach-float32")
def test_the_exponential(dynamic: Dynamics, dtype: torch.dtype) -> None:
    """Within a few units of the last place over its range; the arguments are multiples of 1/8 and rounded nowhere."""
    kernel, V = kernel_for(Case(dynamic)), torch.tensor(1.0)
    reach = 50 if "EXPONENTIAL" in kernel.definitions else 7
    x = torch.arange(-8 * reach, 8 * reach + 1).to(dtype) / 8 + 1
    x = x if kernel.inject_first else x[None]
    ones = torch.ones(1, x.numel())
    (found, _, _) = launch.backward(kernel, x, None, V, 1, ones, None, 0.0, False, False, False)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(dynamic.surrogate_function(exact - 1).sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=0)


# ---- vectors: other widths, and stores past the cache


@pytest.fixture
def streaming(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of every size are stored past the cache, as those of 4 MiB and more are."""
    source = module.source
    monkeypatch.setattr(module, "source", lambda *key: changed(source(*key), "bytes >= (4LL << 20)", "true"))


VECTORS = {
    f"{target}-{name_of((dynamic, dtype))}": (dynamic, dtype, target)
    for dynamic, dtype, target in [
        (dynamics("ternary", "soft", "ATAN", first=True), BF16, "native"),
        *itertools.product([dynamics("integer", "hard", detach=True)], [F64], ["x86-64-v3", "x86-64"]),
        *itertools.product([dynamics("ternary", "soft", "ATAN", first=True)], [BF16, F16], ["x86-64-v3", "x86-64"]),
    ]
}


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize(("dynamic", "dtype", "target"), VECTORS.values(), ids=VECTORS)
def test_vectors(dynamic: Dynamics, dtype: torch.dtype, target: str, build_for: Callable[[str], None]) -> None:
    """AVX-512, AVX2, which both convert half precision, and SSE2, which does not. Few rows begin where a line does."""
    build_for(target)
    for T, frame, threshold in [*CALLS[:8], (3, (2, 2048), ())]:
        check_sequence(launch, Case(dynamic, dtype, T, frame, threshold, with_v=True))
    if dynamic.inject == "first":
        check_sum(launch, Case(dynamic, dtype, 4, (1025,)), 0.3)


@specialisations("ternary-soft-atan-first-float32")
@pytest.mark.parametrize("frame", [(1 << 19,), (600_001,)], ids=["aligned", "odd"])
def test_large_outputs(dynamic: Dynamics, dtype: torch.dtype, frame: tuple[int, ...]) -> None:
    check_sequence(launch, Case(dynamic, dtype, 5, frame))
