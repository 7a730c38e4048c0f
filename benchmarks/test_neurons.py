"""One call of each contender, by pytest-benchmark: what to look at while working on a kernel.

    make bench        # or: python -m pytest benchmarks/test_neurons.py -k "ternary and forward"

benchmarks/compare.py is the measurement with floors, interleaved calls and more sizes, which docs/benchmarks.md shows.
"""

from typing import Any

import pytest
import torch

from benchmarks import contenders

T, N = 4, 2**16
CASES = [
    pytest.param(kind, who, backward, id=f"{kind}, {'forward + backward' if backward else 'forward'}, {who}")
    for kind, neuron in contenders.NEURONS.items()
    for backward in (False, True)
    for who in (contenders.OURS, contenders.OP, neuron.peer)
]


@pytest.mark.parametrize(("kind", "who", "backward"), CASES)
def test_neuron(benchmark: Any, kind: str, who: str, backward: bool) -> None:
    neuron = contenders.NEURONS[kind]
    everyone = {one.name: one for one in contenders.field_of(neuron, "cpu", backward=backward)}
    if who not in everyone:
        pytest.skip(f"{who} is not installed")
    x = contenders.inputs(T, N, torch.float32, "cpu", neuron.non_negative)
    gradient = contenders.inputs(T, N, torch.float32, "cpu") if backward else None
    expected = contenders.outcome(contenders.ours(neuron, "torch"), x, gradient)
    found = contenders.outcome(everyone[who], x, gradient)
    assert contenders.is_equal(contenders.difference(found, expected), x.dtype), f"{who} computes something else"
    benchmark.group = f"{kind}, {'forward + backward' if backward else 'forward'}"
    call = contenders.call_of(everyone[who], x, gradient)
    with torch.set_grad_enabled(backward):
        benchmark.pedantic(call, setup=everyone[who].prepare, rounds=50, warmup_rounds=3)
