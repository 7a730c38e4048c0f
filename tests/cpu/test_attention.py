"""The CPU kernels of spiking attention: every width of vectors, any number of threads, and lines that matter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spikelm.cpu import attention, module
from spikelm.errors import SpikelmError
from spikelm.ops import spiking_attention as operation
from spikelm.ops.spiking_attention import pack_channels, pack_tokens, unpack_channels, unpack_tokens
from tests.attention_cases import Case, check, draw
from tests.kernel_cases import NIGHTLY
from tests.kernel_checks import changed

CASES = [
    Case(T=2, B=2, L=37, num_keys=70, d_h=37, threshold=4.0, rate=0.5),
    Case(T=2, L=6, num_keys=6, d_h=37, threshold=0.7),
    Case(T=2, L=1, num_keys=203, d_h=37, beta=0.5),
]


@pytest.fixture
def built_anew(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No specialisation is known to be built."""
    operation._refused.cache_clear()


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64", *(["x86-64-v4"] if NIGHTLY else [])])
def test_vectors(target: str, built_anew: None, build_for: Callable[[str], None]) -> None:
    """AVX2, SSE2 and, nightly, AVX-512 without the instruction that counts bits."""
    build_for(target)
    for case in CASES:
        check(case, "cpu")
    spikes = draw(CASES[0]).keys.bool()
    assert torch.equal(unpack_channels(pack_channels(spikes), 37), spikes)
    assert torch.equal(unpack_tokens(pack_tokens(spikes, 9), 70, 9), spikes)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES[0], B=3, L=70)
    monkeypatch.setattr(attention, "_WORTH_THREADS", 1)
    monkeypatch.setattr(attention, "_WORTH_THREADS_TO_PACK", 1)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        check(case, "cpu")


def test_a_kernel_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = [
        pack(tensor) for pack, tensor in zip((pack_channels, pack_channels, pack_tokens), draw(CASES[0]), strict=True)
    ]
    monkeypatch.setattr(module, "functions", lambda *_: {"attend": lambda _: 1})
    with pytest.raises(SpikelmError, match="backend 'cpu': no memory for 70 keys and 2 steps on 1 threads"):
        operation.spiking_attention(*packed, num_keys=70, threshold=1.0, beta=0.9, backend="cpu")


MUTANTS = {  # what reads so, what it becomes
    "the decay": ("constant<R>(call.beta)", "constant<R>(1)"),
    "bits of a last word": ("&= bits_below(seen - 32 * word)", "&= ~0u"),
    "the steps of keys": ("head.keys + t * call.key_strides[0]", "head.keys"),
} | (
    {
        "a key too many": ("- call.length + query + 1", "- call.length + query + 2"),
        "one word of a query": ("for (int word = 1; word < WORDS", "for (int word = 1; word < 1"),
        "the last queries": ("one = query; one < call.length", "one = query; one < query"),
        "the last channels": ("if constexpr (rest > 0)", "if constexpr (rest > 64)"),
    }
    if NIGHTLY
    else {}
)


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_changed_line_is_noticed(old: str, new: str, built_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = module.source

    def mutated(*key: str) -> str:
        text = source(*key)
        return text if key[-1] != "attention.cpp" else changed(text, old, new)

    monkeypatch.setattr(module, "source", mutated)
    with pytest.raises(AssertionError, match="differ"):
        for case in CASES:
            check(case, "cpu")
