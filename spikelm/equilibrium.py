"""Fixed points z* = f(z*) and gradients through them by the implicit function theorem, with torchdeq's solvers.

At a fixed point dL/dtheta = dL/dz* (I - df/dz*)^{-1} df/dtheta (arXiv 2405.02543; Bai et al., arXiv 1909.01377): one
application of f is kept for the backward pass, however many iterations found z*.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spikelm.errors import SpikelmError, SpikelmWarning
from spikelm.neurons.base import check_count, check_positive

METHODS = ("anderson", "broyden", "fixed_point")
ON_FAILURE = ("warn", "raise")
BROYDEN_MEMORY = 30  # rank of its Jacobian: 2 * 30 states are held
FORWARD, BACKWARD = "the fixed point", "the adjoint system of the fixed point"

Function = Callable[[Tensor], Tensor]


class ConvergenceError(SpikelmError):
    """An iteration has not come within its tolerance."""


class ConvergenceWarning(SpikelmWarning):
    """An iteration has not come within its tolerance; what it came to is used."""


@dataclass(frozen=True)
class Solver:
    """How a fixed point is looked for.

    Args:
        method: "anderson" (of the last 6 values), "broyden" or "fixed_point" (z <- f(z), which converges where f
            contracts).
        tolerance: of ||f(z) - z|| / ||f(z)||, for every row of the batch.
        max_iterations: evaluations of f at most, >= 1.
        on_failure: "warn" (a ConvergenceWarning, and the best value of every row) or "raise" (a ConvergenceError).
    """

    method: Literal["anderson", "broyden", "fixed_point"] = "anderson"
    tolerance: float = 1e-4
    max_iterations: int = 50
    on_failure: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        for name, value, accepted in (("method", self.method, METHODS), ("on_failure", self.on_failure, ON_FAILURE)):
            if value not in accepted:
                raise SpikelmError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
        check_positive("tolerance", self.tolerance)
        check_count("max_iterations", self.max_iterations)


@dataclass(frozen=True)
class Solution:
    """What an iteration came to.

    Attributes:
        value: z, [B, ...] in the start's type, without gradient.
        residual: ||f(z) - z|| / ||f(z)|| at this z (rounding to the start's type apart), the largest of the rows;
            infinite for a row that has had no finite image.
        iterations: evaluations of f.
        converged: residual <= tolerance, and f was finite throughout.
    """

    value: Tensor
    residual: float
    iterations: int
    converged: bool


def solve(function: Function, start: Tensor, solver: Solver) -> Solution:
    """z with function(z) = z, without gradient: of every row the value with the smallest residual that was met.

    start [B, ...], floating point; the function gives its shape and may mix rows, and must give the same image for the
    same z (no dropout). It sees the start's type and the autocast of the caller; the iteration itself runs in float32
    or float64. A fixed point that is 0 is found only where it is met exactly. SpikelmError for what is not accepted, or
    where torchdeq is needed (the start is no fixed point) and not installed.
    """
    return _solve(function, start, solver, FORWARD)


def equilibrium(
    function: Function,
    start: Tensor,
    solver: Solver,
    *,
    value: Tensor | None = None,
    report: Callable[[str, Solution], None] | None = None,
) -> Tensor:
    """The fixed point of `function`, differentiable in all that the function closes over, not in start or value.

    The gradient is that of the implicit function theorem, with df/dz and df/dtheta taken at the returned value; the
    adjoint system a = a df/dz + dL/dz* is solved by the same solver. Only once: a second derivative is an error.
    What one application of the function saves for its gradient stays in memory, under activation checkpointing too.

    Args:
        function, start, solver: as in :func:`solve`.
        value: a fixed point found otherwise, such as spiking rates that were measured: it is returned as it is, and
            nothing is solved in the forward pass.
        report: called with "forward" or "backward" and the Solution after each iteration.
    """
    if value is None:
        solution = _solve(function, start, solver, FORWARD)
        if report is not None:
            report("forward", solution)
        value = solution.value
    elif value.shape != start.shape or not value.is_floating_point():
        raise SpikelmError(
            f"value must be floating point, of the start's shape {tuple(start.shape)}; got {value.dtype} "
            f"{tuple(value.shape)}"
        )
    value = value.detach()
    if not torch.is_grad_enabled():
        return value.clone()
    point = value.clone().requires_grad_()
    # Hooks of our own keep what is saved: those of torch.utils.checkpoint would compute it anew, with the solution, for
    # every product with the Jacobian.
    with saved_tensors_hooks(_pack, _unpack):
        image = _applied(function, point)

    def vector_jacobian(vector: Tensor) -> Tensor | None:
        vector = vector.to(image.dtype)
        return torch.autograd.grad(image, point, vector, retain_graph=True, allow_unused=True)[0]

    output: Tensor = _Implicit.apply(image, value, vector_jacobian, solver, report)
    return output


class _Implicit(torch.autograd.Function):
    """value forwards; backwards to the image f(value), whose graph leads to the parameters, the adjoint's solution."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        value: Tensor,
        vector_jacobian: Callable[[Tensor], Tensor | None],
        solver: Solver,
        report: Callable[[str, Solution], None] | None,
    ) -> Tensor:
        ctx.image_type = image.dtype
        ctx.vector_jacobian, ctx.solver, ctx.report = vector_jacobian, solver, report
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the adjoint's own derivative would be missing from it
            raise SpikelmError("an equilibrium has first derivatives only; create_graph=True is not accepted")

        def adjoint(vector: Tensor) -> Tensor:
            product = ctx.vector_jacobian(vector)
            return gradient if product is None else gradient + product

        with torch.autocast(gradient.device.type, enabled=False):
            solution = _solve(adjoint, gradient, ctx.solver, BACKWARD)
        if ctx.report is not None:
            ctx.report("backward", solution)
        return solution.value.to(ctx.image_type), None, None, None, None


class _Ended(Exception):
    """Every row is within the tolerance, the evaluations are spent, or an image is not finite."""


class _Iteration:
    """Evaluates the function for a solver of torchdeq, and keeps the books that these keep otherwise than we want.

    They return an image whose residual is not known, take NaN into the best value, look at the residual from the third
    evaluation on (Anderson), want all rows within the tolerance at the same step, and mix in the autocast's type.
    """

    def __init__(self, function: Function, start: Tensor, solver: Solver) -> None:
        self.function, self.start, self.solver = function, start, solver
        self.best = start.detach().to(torch.promote_types(start.dtype, torch.float32))
        self.residuals = self.best.new_full((len(start),), math.inf, dtype=torch.float64)
        self.iterations = 0
        self.finite = True
        kind = start.device.type
        self.autocast = partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,  # a weight cast here, without gradient, is not one for the call with gradient
        )

    def run(self) -> None:
        """Evaluates at the start, then lets the solver go on from there, until _Ended."""
        image = self.evaluate(self.best)
        method, options = _method(self.solver)
        # A power of two for every row: what Anderson adds to its Gram matrix is absolute, and gradients are small.
        largest = image.flatten(1).abs().amax(1)
        scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent - 1), torch.ones_like(largest))
        scale = scale.view(-1, *[1] * (image.dim() - 1))
        waiting = [image]  # the solver begins at the start too

        def scaled(z: Tensor) -> Tensor:
            return (waiting.pop() if waiting else self.evaluate(z * scale)) / scale

        # tol=0: it is _Ended that stops it. Anderson needs 3 evaluations to begin.
        limits = {"max_iter": self.solver.max_iterations + 3, "tol": 0.0, "stop_mode": "rel"}
        try:
            method(scaled, self.best / scale, **limits, **options)
        except torch.linalg.LinAlgError:  # Anderson's residuals are multiples of each other, to the last bit
            method(scaled, self.best / scale, **limits, lam=1e-4)

    def evaluate(self, z: Tensor) -> Tensor:
        with self.autocast():
            image = _applied(self.function, z.to(self.start.dtype)).to(z.dtype)
        self.iterations += 1
        if not bool(image.isfinite().all()):
            self.finite = False
            raise _Ended
        # float64: the squares of small gradients vanish in float32.
        difference, size = (
            torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64) for x in (image - z, image)
        )
        residuals = torch.where(difference > 0, difference / size, torch.zeros_like(size))
        better = residuals < self.residuals
        self.residuals = torch.where(better, residuals, self.residuals)
        self.best = torch.where(better.view(-1, *[1] * (z.dim() - 1)), z, self.best)
        if self.iterations >= self.solver.max_iterations or bool((self.residuals <= self.solver.tolerance).all()):
            raise _Ended
        return image

    def solution(self) -> Solution:
        residual = float(self.residuals.max()) if len(self.residuals) else 0.0
        converged = self.finite and residual <= self.solver.tolerance
        return Solution(self.best.to(self.start.dtype), residual, self.iterations, converged)


@torch.no_grad()
def _solve(function: Function, start: Tensor, solver: Solver, name: str) -> Solution:
    if not start.is_floating_point() or start.dim() < 2:
        raise SpikelmError(
            f"the start must be a floating-point tensor [batch, ...]; got {start.dtype} {tuple(start.shape)}"
        )
    if start.numel() == 0:
        return Solution(start.detach().clone(), 0.0, 0, True)
    iteration = _Iteration(function, start, solver)
    try:
        with torch.autocast(start.device.type, enabled=False):
            iteration.run()
    except _Ended:
        pass
    solution = iteration.solution()
    if not solution.converged:
        _report_failure(solution, solver, name, iteration.finite)
    return solution


def _method(solver: Solver) -> tuple[Callable[..., Any], dict[str, Any]]:
    """torchdeq's function and its own options."""
    try:
        from torchdeq import solver as solvers  # type: ignore[import-untyped]
    except ImportError as error:
        raise SpikelmError(
            "a network with feedback needs torchdeq, which is not installed: pip install 'spikelm[equilibrium]'"
        ) from error
    if solver.method == "anderson":
        # Far below the Gram matrix of residuals at the tolerance, or the last steps would be mere averages. [ours]
        return solvers.anderson.anderson_solver, {"lam": 1e-2 * solver.tolerance**2}
    if solver.method == "broyden":
        return solvers.broyden.broyden_solver, {"LBFGS_thres": min(BROYDEN_MEMORY, solver.max_iterations + 3)}
    return solvers.fp_iter.fixed_point_iter, {}


def _applied(function: Function, z: Tensor) -> Tensor:
    image = function(z)
    if image.shape != z.shape:
        raise SpikelmError(f"the function must keep the shape {tuple(z.shape)}; it gives {tuple(image.shape)}")
    return image


def _report_failure(solution: Solution, solver: Solver, name: str, finite: bool) -> None:
    reason = "" if finite else "; the function gave a value that is not finite"
    message = (
        f"{name} was not found by {solver.method}: residual {{}} after {solution.iterations} iterations, tolerance "
        f"{solver.tolerance:g}, max_iterations {solver.max_iterations}{reason}"
    )
    if solver.on_failure == "raise":
        raise ConvergenceError(message.format(f"{solution.residual:.3g}"))
    # The order of magnitude: Python shows a text once for each place, and thousands of steps may fail alike.
    exponent = math.ceil(math.log10(solution.residual)) if math.isfinite(solution.residual) else None
    size = "infinite" if exponent is None else f"up to 1e{exponent}"
    warnings.warn(message.format(size), ConvergenceWarning, stacklevel=5)  # the caller of solve or equilibrium


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """Tensors with hooks are not checked by autograd itself."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the gradient of an equilibrium needs was changed in place"
        )
    return tensor
