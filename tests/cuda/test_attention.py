"""The CUDA kernel of spiking attention, thread by thread on the CPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spikelm.cuda import attention
from spikelm.ops import spiking_attention as operation
from tests.attention_cases import Case, check, name_of
from tests.cuda.shim import FORWARD, REVERSE, SHUFFLED, Shim

CASES = [
    Case(T=2, B=2, L=5, num_keys=70, d_h=37, threshold=4.0, rate=0.3),
    Case(T=1, L=3, H=1, d_h=1, rate=0.5),
    Case(L=33, threshold=0.7),
    Case(L=1, num_keys=100, threshold=4.0, beta=0.5, rate=0.4),
    Case(T=17, L=3, num_keys=33, d_h=32, beta=1.0, dtype=torch.bfloat16),  # a loop over the steps
    Case(T=3, L=4, num_keys=40, d_h=96, dtype=torch.float16),
]


@pytest.fixture
def on_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a CPU go to the CUDA kernel."""
    monkeypatch.setattr(operation.cpu, "attend", attention.attend)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_products_of_matrices(case: Case, shim: Shim, on_shim: None) -> None:
    check(case, "cpu")
    assert [(ran["T_STEPS"], ran["CHANNELS"]) for ran in shim.ran] == [(str(case.T), str(case.d_h))]


def test_any_order_of_threads(shim: Shim, on_shim: None) -> None:
    case = replace(CASES[0], L=7)
    for schedule in (FORWARD, REVERSE, SHUFFLED):
        shim.schedule = schedule
        check(case, "cpu")


MUTANTS = {  # (file, what reads so, what it becomes)
    "keys that are not seen": ("attention.cuh", "sees ? keys[", "true ? keys["),
    "a key too many": ("entries.cuh", "- call.length + query + 1", "- call.length + query + 2"),
    "the decay": ("entries.cuh", "constant<R>(call.beta)", "constant<R>(1)"),
    "the word of the values": ("attention.cuh", "first / 32 * call.value_strides[3]", "0"),
    "the last channels": (
        "attention.cuh",
        "value[t * call.value_strides[0] + 32 * w]",
        "value[t * call.value_strides[0]]",
    ),
    "the order of the results": ("attention.cuh", "+ query) * call.heads + head", "+ query) + head * call.length"),
}


@pytest.mark.parametrize(("file", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_kernel_is_found(
    file: str, old: str, new: str, mutated: Callable[[str, str, str], Shim], on_shim: None
) -> None:
    mutated(file, old, new)
    with pytest.raises(AssertionError, match="differ"):
        check(CASES[0], "cpu")
