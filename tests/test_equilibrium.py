"""Fixed points against closed forms, and their gradients against unrolled ones."""

import gc
import math
import sys
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikelm.equilibrium import (
    METHODS,
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    Solver,
    equilibrium,
    solve,
)
from spikelm.errors import SpikelmError

EXACT = {method: Solver(method, 1e-12, 200, "raise") for method in METHODS}
every_method = pytest.mark.parametrize("method", METHODS)


def contraction(size: int, norm: float, seed: int = 0) -> Tensor:
    """[size, size], float64, of the given spectral norm."""
    weight = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight * (norm / torch.linalg.matrix_norm(weight, 2))


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_method
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_linear_fixed_point_and_its_gradient(method: str, size: int) -> None:
    """z = W z + b: z* = (I - W)^{-1} b, and dL/db = (I - W)^{-T} dL/dz*."""
    weight, bias, weights_of_loss = contraction(size, 0.8), inputs(3, size), inputs(3, size, seed=2)
    inverse = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - weight)
    bias.requires_grad_()
    z = equilibrium(lambda z: z @ weight.T + bias, torch.zeros_like(bias), EXACT[method])
    torch.testing.assert_close(z, bias @ inverse.T, rtol=1e-9, atol=1e-9)
    (z * weights_of_loss).sum().backward()
    torch.testing.assert_close(bias.grad, weights_of_loss @ inverse, rtol=1e-9, atol=1e-9)


def network(seed: int = 0) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
    """f(z, x) on [B, L, 5] that mixes the positions too, and its parameters; Lipschitz constant below 0.7."""
    feedback, mixing = contraction(5, 0.7, seed).requires_grad_(), contraction(4, 1.0, seed + 1).requires_grad_()
    bias = inputs(5, seed=seed + 2).requires_grad_()

    def function(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(mixing @ z @ feedback.T + x + bias)

    return function, [feedback, mixing, bias]


@every_method
def test_the_gradient_is_that_of_the_unrolled_iteration(method: str) -> None:
    function, parameters = network()
    x = inputs(3, 4, 5, seed=9).requires_grad_()
    start, weights_of_loss = torch.zeros(3, 4, 5, dtype=torch.float64), inputs(3, 4, 5, seed=10)
    unrolled = start
    for _ in range(120):
        unrolled = function(unrolled, x)
    expected = torch.autograd.grad((unrolled * weights_of_loss).sum(), [x, *parameters])
    reports: list[tuple[str, Solution]] = []
    z = equilibrium(lambda z: function(z, x), start, EXACT[method], report=lambda *given: reports.append(given))
    torch.testing.assert_close(z, unrolled, rtol=1e-9, atol=1e-10)
    gradients = torch.autograd.grad((z * weights_of_loss).sum(), [x, *parameters])
    for given, wanted in zip(gradients, expected, strict=True):
        assert (given - wanted).norm() <= 1e-6 * wanted.norm()
    assert [stage for stage, _ in reports] == ["forward", "backward"]
    for _, solution in reports:
        assert solution.converged and 0 < solution.residual <= 1e-12 and 2 < solution.iterations < 200


@every_method
def test_gradcheck(method: str) -> None:
    function, parameters = network()
    x = inputs(2, 4, 5, seed=9).requires_grad_()

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return equilibrium(lambda z: function(z, x), torch.zeros_like(x), EXACT[method])

    assert torch.autograd.gradcheck(output, (x, *parameters), atol=1e-6)


@every_method
@pytest.mark.parametrize("size", [1.0, 1e-15])
def test_float32_and_small_gradients(method: str, size: float) -> None:
    """A loss of tiny gradients, whose squares float32 does not hold, is solved as exactly as any other."""
    weight, bias = contraction(20, 0.9).float(), inputs(3, 20).float().requires_grad_()
    found: list[Solution] = []
    solver = Solver(method, 1e-5, 100, "raise")
    z = equilibrium(
        lambda z: torch.tanh(z @ weight.T) + bias, torch.zeros_like(bias), solver, report=lambda _, s: found.append(s)
    )
    gradient = size**2 * inputs(3, 20, seed=2).float()
    z.backward(gradient)
    slope = 1 - torch.tanh(z.detach() @ weight.T) ** 2
    expected = torch.stack(
        [torch.linalg.solve((torch.eye(20) - s[:, None] * weight).T, g) for s, g in zip(slope, gradient, strict=True)]
    )
    assert bias.grad is not None
    assert (bias.grad / size**2 - expected / size**2).norm() < 1e-4 * (expected / size**2).norm()
    assert [solution.converged for solution in found] == [True, True]
    assert max(solution.iterations for solution in found) < 40


@every_method
def test_the_residual_is_that_of_the_returned_value(method: str) -> None:
    weight, bias = contraction(6, 0.95), inputs(4, 3, 6)
    calls = 0

    def function(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(z @ weight.T + bias)

    for tolerance in (1e-2, 1e-6):
        calls = 0
        solution = solve(function, torch.zeros_like(bias), Solver(method, tolerance, 200))
        assert solution.iterations == calls and solution.converged and not solution.value.requires_grad
        image = function(solution.value)
        residuals = (image - solution.value).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
        assert solution.residual == pytest.approx(residuals.max().item(), rel=1e-9)
        assert solution.residual <= tolerance


@every_method
def test_a_start_that_is_the_solution_takes_one_evaluation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a network without feedback need torchdeq for its gradient."""
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    x = inputs(2, 3).requires_grad_()
    reports: list[Solution] = []
    z = equilibrium(lambda _: x * 2, (x * 2).detach(), EXACT[method], report=lambda _, s: reports.append(s))
    z.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))
    assert [solution.iterations for solution in reports] == [1, 1]
    zero = solve(torch.zeros_like, torch.zeros(2, 3), EXACT[method])
    assert (zero.residual, zero.converged) == (0.0, True)


def test_without_torchdeq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(SpikelmError, match=r"needs torchdeq.*pip install 'spikelm\[equilibrium\]'"):
        solve(lambda z: z / 2 + 1, torch.zeros(2, 3), Solver())


def test_a_given_value_is_the_output_and_where_the_gradient_is_taken() -> None:
    """z = w z + b by hand: dL/db = g / (1 - w) and dL/dw = z g / (1 - w), with the measured z, not the solved one."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    measured = torch.tensor([[2.125, 3.875]], dtype=torch.float64, requires_grad=True)
    stages: list[str] = []

    def output() -> Tensor:
        return equilibrium(
            lambda z: weight * z + bias,
            torch.zeros_like(bias),
            EXACT["anderson"],
            value=measured,
            report=lambda stage, _: stages.append(stage),
        )

    z = output()
    assert torch.equal(z, measured) and z.data_ptr() != measured.data_ptr()
    (z * torch.tensor([[1.0, 3.0]])).sum().backward()
    assert bias.grad is not None and weight.grad is not None
    assert bias.grad.tolist() == [[pytest.approx(2.0), pytest.approx(6.0)]]
    assert weight.grad.item() == pytest.approx(2.125 * 2 + 3.875 * 6)
    assert measured.grad is None and stages == ["backward"]
    with torch.no_grad():
        assert torch.equal(output(), measured) and not output().requires_grad


@every_method
@pytest.mark.parametrize("kind", ["diverges", "shifts", "circles"])
def test_what_has_no_fixed_point_within_reach_is_reported(method: str, kind: str) -> None:
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "diverges": lambda z: z.square() + 1,
        "shifts": lambda z: z + 1,
        "circles": lambda z: torch.sign(z @ rotation.T) + 0.1,
    }
    start = torch.ones(3, 2)
    for find in (solve, equilibrium):
        with pytest.warns(ConvergenceWarning, match=f"not found by {method}: residual .* tolerance 1e-06") as caught:
            find(functions[kind], start, Solver(method, 1e-6, 40))
        assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = solve(functions[kind], start, Solver(method, 1e-6, 40))
    assert not solution.converged and solution.residual > 1e-6 and solution.iterations <= 40
    assert bool(solution.value.isfinite().all())
    with pytest.raises(ConvergenceError, match="max_iterations 40"):
        solve(functions[kind], start, Solver(method, 1e-6, 40, "raise"))


@every_method
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_few_iterations_keep_the_best_value(method: str, limit: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = solve(lambda z: 0.9 * z + 1, torch.zeros(1, 1), Solver(method, 1e-12, limit))
    assert solution.iterations == limit or (solution.converged and limit > 2)
    assert solution.residual < 1 or limit == 1


@every_method
def test_values_that_are_not_finite_end_it(method: str) -> None:
    def function(z: Tensor) -> Tensor:
        return torch.where(z > 1, math.nan, z + torch.tensor([[0.8], [0.0]]))

    with pytest.warns(ConvergenceWarning, match="a value that is not finite"):
        solution = solve(function, torch.zeros(2, 1), Solver(method, 1e-3, 40))
    assert not solution.converged and bool(solution.value.isfinite().all()) and solution.iterations < 40
    with pytest.warns(ConvergenceWarning, match="residual infinite after 1 iter"):
        solution = solve(lambda z: z / 0, torch.ones(2, 1), Solver(method))
    assert torch.equal(solution.value, torch.ones(2, 1)) and solution.residual == math.inf


def test_an_adjoint_that_is_not_found_is_reported() -> None:
    """At the fixed point 0 of 3 sin z the adjoint diverges under z <- f(z), though the start is a solution."""
    theta = torch.tensor(3.0, requires_grad=True)
    for on_failure, context in (
        ("warn", pytest.warns(ConvergenceWarning, match="adjoint system of the fixed point was not found")),
        ("raise", pytest.raises(ConvergenceError, match="adjoint system")),
    ):
        z = equilibrium(lambda z: theta * z.sin(), torch.zeros(1, 2), Solver("fixed_point", 1e-3, 10, on_failure))
        with context:
            z.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "method must be one of anderson, broyden, fixed_point; got 'newton'"),
        ({"tolerance": 0.0}, "tolerance must be a finite number > 0; got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be a finite number > 0"),
        ({"max_iterations": 0}, "max_iterations must be an integer >= 1; got 0"),
        ({"max_iterations": 2.5}, "max_iterations must be an integer >= 1"),
        ({"on_failure": "ignore"}, "on_failure must be one of warn, raise; got 'ignore'"),
    ],
)
def test_bad_solvers(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        Solver(**arguments)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(SpikelmError, match=r"\[batch, ...\]; got torch.float32 \(3,\)"):
        solve(torch.cos, torch.zeros(3), Solver())
    with pytest.raises(SpikelmError, match="got torch.int64"):
        solve(torch.cos, torch.zeros(3, 2, dtype=torch.long), Solver())
    with pytest.raises(SpikelmError, match=r"must keep the shape \(3, 2\); it gives \(3, 1\)"):
        solve(lambda z: z[:, :1], torch.zeros(3, 2), Solver())
    with pytest.raises(SpikelmError, match=r"the start's shape \(3, 2\); got torch.float32 \(3, 1\)"):
        equilibrium(torch.cos, torch.zeros(3, 2), Solver(), value=torch.zeros(3, 1))


def test_an_empty_batch() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    z = equilibrium(lambda z: z / 2 + x, torch.zeros(0, 4), Solver())
    z.sum().backward()
    assert z.shape == (0, 4) and x.grad is not None and x.grad.shape == (0, 4)


def test_a_second_derivative_is_an_error() -> None:
    x = inputs(1, 2).requires_grad_()
    z = equilibrium(lambda z: torch.tanh(z / 2 + x), torch.zeros_like(x), Solver())
    with pytest.raises(SpikelmError, match="first derivatives only; create_graph=True is not accepted"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@every_method
def test_memory_does_not_grow_and_nothing_outlives_the_output(method: str) -> None:
    """What autograd keeps is one application's, and reference counting alone frees it."""
    weight = contraction(4, 0.9).requires_grad_()
    bias = inputs(2, 4)
    points: list[weakref.ref[Tensor]] = []
    saved: list[int] = []

    def function(z: Tensor) -> Tensor:
        points.append(weakref.ref(z))
        return torch.tanh(z @ weight.T + bias)

    gc.collect()
    gc.disable()
    try:
        for tolerance in (1e-2, 1e-10):
            points.clear()
            z = equilibrium(function, torch.zeros_like(bias), Solver(method, tolerance, 200))
            saved.append(sum(point() is not None for point in points))
            z.sum().backward()
            assert len(points) > 3
            del z
            assert not any(point() is not None for point in points)
    finally:
        gc.enable()
    assert saved[0] == saved[1] <= 1


@every_method
def test_under_autocast(method: str) -> None:
    """The function runs in bfloat16 and its parameters get their gradient; the solver's own algebra does not."""
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.weight, 2))
    x = inputs(3, 2, 16).float()
    kinds: set[torch.dtype] = set()

    def function(z: Tensor) -> Tensor:
        image = layer(z)
        kinds.add(image.dtype)
        return torch.tanh(image + x)

    def gradient() -> Tensor:
        z = equilibrium(function, torch.zeros_like(x), Solver(method, 1e-2, 50, "raise"))
        assert z.dtype == torch.float32
        return torch.autograd.grad(z.square().mean(), layer.weight)[0]

    expected = gradient()
    assert kinds == {torch.float32}
    kinds.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = gradient()
    assert kinds == {torch.bfloat16}
    assert (given - expected).norm() < 0.05 * expected.norm()


@every_method
def test_the_iteration_itself_keeps_its_precision_under_autocast(method: str) -> None:
    """A function of operations that autocast leaves in float32 is solved to what float32 can do."""
    x = inputs(3, 16).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = equilibrium(
            lambda z: torch.tanh(0.9 * z.roll(1, -1)) + x, torch.zeros(3, 16), Solver(method, 1e-6, 60, "raise")
        )
        z.sum().backward()


def test_a_state_in_bfloat16() -> None:
    x = inputs(3, 8).bfloat16().requires_grad_()
    z = equilibrium(lambda z: torch.tanh(z / 2 + x), torch.zeros_like(x), Solver("anderson", 1e-2, 50, "raise"))
    z.sum().backward()
    assert z.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    """The same gradient, and the fixed point is solved once more at most, not for every product with the Jacobian."""
    function, parameters = network()
    x = inputs(2, 4, 5, seed=9).requires_grad_()
    stages: list[str] = []

    def block(x: Tensor) -> Tensor:
        driven = x.sin()
        z = equilibrium(
            lambda z: function(z, driven), torch.zeros_like(x), EXACT["broyden"], report=lambda s, _: stages.append(s)
        )
        return z.cos()

    wanted = [x, *parameters]
    block(x).sum().backward()
    expected = [tensor.grad for tensor in wanted]
    stages.clear()
    for tensor in wanted:
        tensor.grad = None
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    for tensor, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert stages == ["forward", "forward", "backward"]


def test_a_tensor_that_was_changed_in_place_is_noticed() -> None:
    x = inputs(1, 2).requires_grad_()
    factor = torch.full((1, 2), 0.5, dtype=torch.float64)
    z = equilibrium(lambda z: factor * z + x, torch.zeros(1, 2, dtype=torch.float64), Solver())
    factor.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.sum().backward()
