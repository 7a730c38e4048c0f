"""Which dynamics have a kernel, what it is compiled for, and the numbers that it gets."""

import itertools
import math
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate

from spikelm.neurons.atmn import ATMN
from spikelm.neurons.binary_if import BinaryIF
from spikelm.neurons.tilif import TILIF
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel, kernel_of

ATAN = ("ATAN", 1.0, math.pi)  # ATan(alpha=2), every neuron's surrogate unless given
WORDS = ("FIRE", "RESET", "SURROGATE", "INJECT_FIRST", "DETACH_RESET", "SGC")


def words(kernel: Kernel | str) -> tuple[str, ...]:
    """The definitions' values, whose names have to be WORDS in this order, one a line."""
    assert isinstance(kernel, Kernel), kernel
    assert kernel.definitions.endswith("\n")
    lines = [line.split() for line in kernel.definitions.splitlines()]
    assert [line[:2] for line in lines] == [["#define", word] for word in WORDS]
    return tuple(line[2] for line in lines)


def numbers(kernel: Kernel | str) -> dict[str, float]:
    """By the names of struct Arguments."""
    assert isinstance(kernel, Kernel), kernel
    assert all(type(number) is float for number in kernel.numbers)
    return dict(zip(("decay", "v_reset", "scale", "alpha", "levels", "sgc_weight"), kernel.numbers, strict=True))


@pytest.mark.parametrize(
    ("neuron", "definitions", "values"),
    [
        (ATMN(tau=2.0), "TERNARY SOFT ATAN 1 0 0", {"decay": 0.5, "scale": ATAN[1], "alpha": ATAN[2]}),
        (ATMN(tau=4.0, detach_reset=True), "TERNARY SOFT ATAN 1 1 0", {"decay": 0.25}),
        (ATMN(surrogate_function=surrogate.Sigmoid(alpha=4.0)), "TERNARY SOFT SIGMOID 1 0 0", {"alpha": 4.0}),
        (BinaryIF(v_reset=None), "BINARY SOFT ATAN 0 0 0", {"decay": 1.0}),
        (BinaryIF(v_reset=0.5, beta=0.75), "BINARY HARD ATAN 0 0 0", {"decay": 0.75, "v_reset": 0.5}),
        (BinaryIF(v_reset=None, reset_delay=True), "BINARY SOFT_DELAYED ATAN 0 0 0", {"v_reset": 0.0}),
        (
            BinaryIF(v_reset=None, surrogate_function=snntorch.surrogate.fast_sigmoid(25)),
            "BINARY SOFT INVERSE_SQUARE 0 0 0",
            {"scale": 1.0, "alpha": 25.0},
        ),
        (TILIF(D=4), "INTEGER SOFT WINDOW 0 0 0", {"levels": 4.0, "scale": 1.0, "alpha": 0.25}),
        (TILIF(D=8, alpha=0.5, beta=0.5), "INTEGER SOFT WINDOW 0 0 0", {"levels": 8.0, "scale": 0.5, "decay": 0.5}),
        (TILIF(D=4, sgc="gradient", sgc_weight=0.3), "INTEGER SOFT WINDOW 0 0 1", {"sgc_weight": 0.3, "alpha": 0.25}),
        (TILIF(D=4, sgc="gradient", sgc_weight=0.3).eval(), "INTEGER SOFT WINDOW 0 0 0", {"levels": 4.0}),
        (TILIF(D=4, sgc="blend", sgc_weight=0.0), "INTEGER SOFT WINDOW 0 0 0", {"levels": 4.0}),
    ],
)
def test_the_neurons(neuron: Any, definitions: str, values: dict[str, float]) -> None:
    kernel = kernel_of(neuron.dynamics)
    assert words(kernel) == tuple(definitions.split())
    found = numbers(kernel)
    assert {name: found[name] for name in values} == values


def test_every_dynamics_has_its_own_definitions() -> None:
    seen = {}
    for fire, reset, inject, detach in itertools.product(
        ("binary", "ternary", "integer"), ("soft", "soft_delayed", "hard"), ("every", "first"), (False, True)
    ):
        function = None if fire == "integer" else surrogate.ATan(alpha=2.0)
        kernel = kernel_of(Dynamics(fire, function, reset=reset, inject=inject, detach_reset=detach))
        window = "WINDOW" if fire == "integer" else "ATAN"
        expected = (fire.upper(), reset.upper(), window, str(int(inject == "first")), str(int(detach)), "0")
        assert words(kernel) == expected
        assert isinstance(kernel, Kernel)
        assert kernel.inject_first == (inject == "first")
        seen[kernel.definitions] = kernel
    assert len(seen) == 36


def test_numbers_do_not_change_what_is_compiled() -> None:
    one, other = (
        kernel_of(Dynamics("ternary", surrogate.ATan(alpha=alpha), decay=decay, reset="hard", v_reset=v_reset))
        for alpha, decay, v_reset in ((2.0, 1.0, 0.0), (3.0, 0.5, 0.25))
    )
    assert words(one) == words(other)
    assert isinstance(other, Kernel)
    assert other.numbers == (0.5, 0.25, 1.5, math.pi / 2 * 3.0, 1.0, 0.0)


def test_integers_become_floats() -> None:
    """Python's integers are accepted as numbers, and so is a parameter of a surrogate that is one."""
    found = numbers(kernel_of(Dynamics("binary", surrogate.ATan(alpha=2), decay=1, reset="hard", v_reset=0)))
    assert (found["decay"], found["v_reset"], found["scale"]) == (1.0, 0.0, 1.0)
    assert numbers(kernel_of(Dynamics("integer", levels=5, alpha=2)))["scale"] == 2.0


class Mine(surrogate.ATan):
    """One's own."""


def a_function(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("dynamics", "reason"),
    [
        (Dynamics("binary", Mine(alpha=2.0)), "no kernel for the surrogate Mine"),
        (Dynamics("ternary", a_function), "no kernel for the surrogate a_function"),
        (Dynamics("binary", surrogate.S2NN()), "no kernel for the surrogate S2NN"),
        (
            Dynamics("binary", surrogate.ATan(alpha=2.0, spiking=False)),
            "no kernel for the surrogate ATan, spiking=False",
        ),
        (
            Dynamics("binary", snntorch.surrogate.triangular()),
            "no kernel for the surrogate triangular.<locals>.inner",
        ),
        (
            Dynamics("integer", levels=4, sgc="blend", sgc_weight=0.1),
            "no kernel for sgc='blend', whose spikes are no integers",
        ),
        (Dynamics("integer", levels=2**24), "no kernel for 16777216 levels, which float32 does not count"),
    ],
)
def test_reasons_why_there_is_none(dynamics: Dynamics, reason: str) -> None:
    assert kernel_of(dynamics) == reason


def test_the_largest_number_of_levels() -> None:
    assert numbers(kernel_of(Dynamics("integer", levels=2**24 - 1)))["levels"] == 2.0**24 - 1


def test_the_weight_counts_where_it_is_used_alone() -> None:
    """Without sgc, or at weight 0, the plain window is compiled."""
    for options in ({"sgc_weight": 0.5}, {"sgc": "gradient", "sgc_weight": 0.0}):
        assert words(kernel_of(Dynamics("integer", levels=4, **options)))[-1] == "0"
