"""The tests of the CUDA kernels go red when the kernels are wrong."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.cuda.checks import check, check_rounding, check_sum, run
from tests.cuda.shim import FORWARD, REVERSE, SHUFFLED, Shim
from tests.kernel_cases import Case, dynamics

PLAIN = Case(dynamics("ternary", "soft_delayed", "TRIANGLE"), frame=(6, 40), threshold=(40,), with_v=True)
SOFT = replace(PLAIN, dynamics=dynamics("ternary", "soft", "TRIANGLE"))
ONCE = replace(PLAIN, dynamics=dynamics("ternary", "soft", "TRIANGLE", first=True))
REPEATED = replace(PLAIN, frame=(3, 6, 40), threshold=(6, 1))

MUTATIONS = [
    ("steps.cuh", "{h, s, h - s * V}", "{h, s, h + s * V}", SOFT),
    ("steps.cuh", "grad_spikes - carry * V", "grad_spikes + carry * V", SOFT),
    ("steps.cuh", "at_threshold = -(s * carry)", "at_threshold = s * carry", SOFT),
    ("steps.cuh", "(h >= V ? one : zero) -", "(h > V ? one : zero) -", SOFT),
    ("multistep.cuh", "axis = 3; axis >= 0", "axis = 3; axis > 0", replace(PLAIN, frame=(4, 3, 40), layout="swapped")),
    ("multistep.cuh", "== a.channels ? 0 :", "== a.channels ? 1 :", replace(PLAIN, frame=(8, 3), threshold=(3,))),
    ("multistep.cuh", "i / a.inner;", "i;", replace(PLAIN, threshold=(6, 1))),
    ("multistep.cuh", "t == T - 1 ? last", "t == 0 ? last", PLAIN),
    ("multistep.cuh", "!once || (t == 0 && !a.started)) store", "!once || (t == 1 && !a.started)) store", ONCE),
    ("multistep.cuh", "= (STATE_T)a.start", "= 0", replace(PLAIN, with_v=False, start=0.5)),
    ("multistep.cuh", "a.threads * VECTOR : 0", "0 : 0", replace(PLAIN, T=33)),
    ("multistep.cuh", "distance = 16", "distance = 8", replace(PLAIN, threshold=())),
    ("multistep.cuh", "outer * a.channels * inner", "outer * inner", REPEATED),
]


@pytest.mark.parametrize(("file", "old", "new", "case"), MUTATIONS)
def test_a_wrong_kernel_is_found(
    file: str, old: str, new: str, case: Case, mutated: Callable[[str, str, str], Shim]
) -> None:
    mutated(file, old, new)
    with pytest.raises(AssertionError):
        check(case)


@pytest.mark.parametrize(
    ("old", "new"), [("(bits >> 16) & 1)", "(~bits >> 16) & 1)"), ("0x7fc0 : nearest", "nearest : nearest")]
)
def test_a_wrong_rounding_is_found(old: str, new: str, mutated: Callable[[str, str, str], Shim]) -> None:
    mutated("scalars.cuh", old, new)
    with pytest.raises(AssertionError):
        check_rounding(torch.bfloat16)


def test_a_wrong_sum_is_found(mutated: Callable[[str, str, str], Shim]) -> None:
    mutated("multistep.cuh", "pow(call.a.frame_weight, (double)t)", "pow(call.a.frame_weight, (double)t + 1)")
    with pytest.raises(AssertionError):
        check_sum(replace(ONCE, T=33), 0.5)


def test_a_missing_barrier_is_found(mutated: Callable[[str, str, str], Shim]) -> None:
    shim = mutated("multistep.cuh", "    __syncthreads();\n", "")
    results = []
    for schedule in (FORWARD, REVERSE, SHUFFLED):
        shim.schedule = schedule
        results.append(run(replace(PLAIN, threshold=())))
    assert not (results[0].equal(results[1]) and results[0].equal(results[2]))


def test_an_index_of_32_bits_is_found(mutated: Callable[[str, str, str], Shim]) -> None:
    shim = mutated("multistep.cuh", "(long long)blockIdx.x * blockDim.x", "blockIdx.x * blockDim.x")
    run(PLAIN)
    (library, *_) = shim.loaded.values()
    assert library.element_of(2**31 - 2, 127) != (2**31 - 2) * 128 + 127
