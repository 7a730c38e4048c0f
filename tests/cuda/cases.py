"""Which cases the CUDA kernels are tested with: a sample by default, all of them with SPIKELM_NIGHTLY=1."""

import itertools
import os
import random
from collections.abc import Sequence
from typing import Any

import torch

from tests.kernel_cases import LAYOUTS, SURROGATES, Case, dynamics

NIGHTLY = os.environ.get("SPIKELM_NIGHTLY") == "1"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STEPS = (1, 2, 4, 16, 32, 33, 64)
# (frame, threshold): odd sizes, rows of 2, 4 and 8 neurons, channels in every place, and so many neurons that threads
# take several
FRAMES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1,), ()),
    ((63,), (1,)),
    ((1023,), ()),
    ((2, 3, 5), (5,)),
    ((2, 6, 4), (6, 1)),
    ((3, 4, 8), (8,)),
    ((2, 3, 4, 6), (3, 1, 1)),
    ((5, 2, 16), (2, 1)),
    ((4, 130, 4), ()),
)


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows as of :func:`covering`; all rows with SPIKELM_NIGHTLY=1."""
    return list(itertools.product(*axes)) if NIGHTLY else covering(*axes)


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis in which any two values of two axes meet."""
    indices = [range(len(axis)) for axis in axes]
    missing = {
        (first, i, second, j)
        for first, second in itertools.combinations(range(len(axes)), 2)
        for i in indices[first]
        for j in indices[second]
    }
    draws, rows = random.Random(0), []
    while missing:
        best: tuple[int, tuple[int, ...]] = (0, ())
        first, i, second, j = min(missing)
        for _ in range(60):
            row = [draws.choice(index) for index in indices]
            row[first], row[second] = i, j
            met = sum((a, row[a], b, row[b]) in missing for a, b in itertools.combinations(range(len(axes)), 2))
            best = max(best, (met, tuple(row)))
        row = list(best[1])
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(axes)), 2)}
        rows.append(tuple(axis[index] for axis, index in zip(axes, row, strict=True)))
    return rows


def neurons() -> list[Case]:
    """Every equation: firing, surrogate, reset, injection, detached reset, and where the membrane comes from."""
    firing = [("binary", {}), ("ternary", {}), ("integer", {}), ("integer", {"sgc": "gradient", "sgc_weight": 0.25})]
    membranes = [(True, 0.0, False), (False, 0.0, False), (False, 0.625, True)]  # v, start, started
    rows = pairwise(firing, list(SURROGATES), ("soft", "soft_delayed", "hard"), (False, True), (False, True), membranes)
    cases = [
        Case(
            dynamics(fire, reset, name, first=first, detach=detach, **options),
            frame=(3, 20), threshold=(20,), T=4,
            with_v=with_v, start=start, started=started and first, special=with_v,
        )
        for (fire, options), name, reset, first, detach, (with_v, start, started) in rows
    ]  # fmt: skip
    return list(dict.fromkeys(cases))  # integer firing has no surrogate


def ways() -> list[Case]:
    """Every way through the driver: types, steps, shapes and layouts, on one neuron that is exact in all of them."""
    others = LAYOUTS[3:] + LAYOUTS[:3]
    return [
        Case(
            dynamics("ternary", "soft_delayed", "TRIANGLE", first=first),
            dtype, T, frame, threshold, with_v=T % 2 == 0, start=0.375, layout=layout, grad_layout=grad_layout,
        )
        for (dtype, T, first), (frame, threshold), (layout, grad_layout) in joined(
            pairwise(DTYPES, STEPS, (False, True)), FRAMES, list(zip(LAYOUTS, others, strict=True))
        )
    ]  # fmt: skip


def sums() -> list[tuple[Case, float]]:
    """The weighted sums."""
    firing = [("ternary", "soft"), ("binary", "hard"), ("integer", "soft_delayed")]
    return [
        (
            Case(
                dynamics(fire, reset, "TRIANGLE", first=first),
                dtype, T, frame, threshold, layout=layout, grad_layout=layout,
            ),
            weight,
        )
        for ((fire, reset), dtype, T, first), (frame, threshold), layout, weight in joined(
            pairwise(firing, DTYPES, (1, 4, 16, 33), (True, False)), FRAMES[::2], LAYOUTS[::2], (1.0, 0.5, 0.8125)
        )
    ]  # fmt: skip


def joined(rows: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Each row with the next value of every axis; with SPIKELM_NIGHTLY=1 with all of them."""
    if NIGHTLY:
        return list(itertools.product(rows, *axes))
    return list(zip(rows, *(itertools.cycle(axis) for axis in axes), strict=False))


def name_of(case: object) -> str | None:
    """The words by which pytest names a case."""
    if not isinstance(case, Case):
        return None
    neuron = case.dynamics
    surrogate = next((name for name, found in SURROGATES.items() if found is neuron.surrogate_function), "WINDOW")
    words: list[object] = [neuron.fire, neuron.reset, surrogate, neuron.inject, *["sgc"] * bool(neuron.sgc)]
    words += [str(case.dtype).removeprefix("torch."), f"T{case.T}", "x".join(map(str, case.frame))]
    return "-".join(map(str, [*words, case.layout, case.grad_layout])).replace(" ", "_").lower()
