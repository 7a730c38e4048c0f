"""The CUDA kernels, thread by thread on the CPU, against the reference."""

from dataclasses import replace

import pytest
import torch

from spikelm.cuda import launch
from spikelm.ops.layout import channels_of, pack, read
from tests.cuda.cases import name_of, neurons, sums, ways
from tests.cuda.checks import bits_equal, check, check_rounding, check_sum, run
from tests.cuda.shim import FORWARD, REVERSE, SHUFFLED, Shim
from tests.kernel_cases import Case, draw, dynamics, kernel_for

PLAIN = Case(dynamics("ternary", "soft_delayed", "TRIANGLE"), frame=(6, 40), threshold=(40,), with_v=True)


@pytest.mark.parametrize("case", neurons(), ids=name_of)
def test_every_neuron(case: Case, shim: Shim) -> None:
    check(case)


@pytest.mark.parametrize("case", ways(), ids=name_of)
def test_every_way_through_the_driver(case: Case, shim: Shim) -> None:
    check(case)


@pytest.mark.parametrize(("case", "frame_weight"), sums(), ids=name_of)
def test_weighted_sums(case: Case, frame_weight: float, shim: Shim) -> None:
    check_sum(case, frame_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_in_int8(dtype: torch.dtype, shim: Shim) -> None:
    check(replace(PLAIN, dtype=dtype), spike_dtype=torch.int8)
    assert shim.ran[0]["SPIKE_T"] == "signed char"


# A row of 48 is a multiple of all; T = 33 has its membranes in memory. (T, forward, backward) by type.
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, [(1, 2, 2), (8, 2, 2), (16, 2, 1), (32, 1, 1), (33, 2, 1)]),
        (torch.float32, [(1, 4, 4), (8, 4, 4), (16, 4, 2), (32, 2, 1), (33, 4, 1)]),
        (torch.bfloat16, [(1, 8, 8), (4, 8, 8), (8, 8, 4), (16, 8, 2), (32, 4, 1), (33, 8, 1)]),
    ],
)
def test_neurons_of_a_thread_by_type_and_steps(dtype: torch.dtype, expected: list[tuple[int, int, int]]) -> None:
    found = [
        (T, launch.most_neurons("FORWARD", dtype, T), launch.most_neurons("BACKWARD", dtype, T)) for T, *_ in expected
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("frame", "threshold", "layout", "expected"),
    [
        ((48,), (), "dense", "8"),
        ((12,), (), "dense", "4"),
        ((10,), (), "dense", "2"),
        ((4, 2), (4, 1), "dense", "8"),
        ((63,), (), "dense", "1"),
        ((48,), (), "offset", "1"),  # 2 bytes off any alignment
        ((4, 16), (), "strided", "8"),  # copied
    ],
)
def test_neurons_of_a_thread_by_layout(
    frame: tuple[int, ...], threshold: tuple[int, ...], layout: str, expected: str, shim: Shim
) -> None:
    inputs = draw(replace(PLAIN, frame=frame, threshold=threshold, dtype=torch.bfloat16, layout=layout))
    launch.forward(kernel_for(PLAIN), inputs.x, None, inputs.threshold, 4, torch.bfloat16, 0.0, False, False)
    assert [ran["VECTOR"] for ran in shim.ran] == [expected]


# (rows of x apart, its steps apart, expected): what the gaps between rows leave of 8
@pytest.mark.parametrize(("row", "step", "expected"), [(48, 512, "8"), (44, 512, "4"), (48, 290, "2"), (41, 512, "1")])
def test_rows_with_gaps(row: int, step: int, expected: str, shim: Shim) -> None:
    case = replace(PLAIN, dtype=torch.bfloat16)
    (x, v, threshold, grad_spikes, grad_v_last), kernel = draw(case), kernel_for(case)
    memory = torch.full((2048,), float("nan"), dtype=x.dtype)
    apart = memory.as_strided(x.shape, (step, row, 1)).copy_(x)
    batch_first = grad_spikes.transpose(0, 1).contiguous().transpose(0, 1)
    spikes, v_last = launch.forward(kernel, apart, v, threshold, 4, x.dtype, 0.0, False, True)
    grads = launch.backward(kernel, apart, v, threshold, 4, batch_first, grad_v_last, 0.0, False, True, True)
    assert [ran["VECTOR"] for ran in shim.ran] == [expected, expected]
    for found, dense in zip((spikes, v_last, *grads), vars(run(case)).values(), strict=True):
        assert found is not None
        torch.testing.assert_close(found, dense, rtol=1e-6, atol=0)  # sums of thresholds are split otherwise


@pytest.mark.parametrize("threshold", [(), (40,), (6, 1)])
@pytest.mark.parametrize("T", [4, 33])
def test_any_order_of_threads_gives_the_same_bits(T: int, threshold: tuple[int, ...], shim: Shim) -> None:
    results = []
    for schedule in (FORWARD, REVERSE, SHUFFLED):
        shim.schedule = schedule
        results.append(run(replace(PLAIN, T=T, threshold=threshold)))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("threshold", [(), (40,), (6, 1)])
@pytest.mark.parametrize("T", [4, 33])
def test_threads_that_take_neurons_again_and_again(
    T: int, threshold: tuple[int, ...], shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are more than the grid, or the scratch memory, has threads for."""
    monkeypatch.setattr(launch, "_KEPT_THREADS", 21)
    monkeypatch.setattr(launch, "_MOST_BLOCKS", 1)
    check(replace(PLAIN, T=T, threshold=threshold, frame=(5, 6, 40)))


@pytest.mark.parametrize("T", [4, 33])
def test_no_gradient_of_a_result_is_a_zero_one(T: int, shim: Shim) -> None:
    case = replace(PLAIN, T=T)
    (x, v, threshold, grad_spikes, grad_v_last), kernel = draw(case), kernel_for(case)
    for grads in ((grad_spikes, None), (None, grad_v_last), (None, None)):
        zeros = [torch.zeros_like(grad_spikes), torch.zeros_like(grad_v_last)]
        filled = [zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=True)]
        found = launch.backward(kernel, x, v, threshold, T, *grads, 0.0, False, True, True)
        expected = launch.backward(kernel, x, v, threshold, T, *filled, 0.0, False, True, True)
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            assert b is not None
            assert bits_equal(a, b)


def test_only_what_is_asked_for(shim: Shim) -> None:
    (x, v, threshold, grad_spikes, grad_v_last), kernel = draw(PLAIN), kernel_for(PLAIN)
    spikes, v_last = launch.forward(kernel, x, v, threshold, 4, torch.float32, 0.0, False, False)
    assert v_last is None
    assert bits_equal(spikes, run(PLAIN).spikes)
    grads = launch.backward(kernel, x, v, threshold, 4, grad_spikes, grad_v_last, 0.0, False, False, False)
    assert grads[1:] == (None, None)
    assert bits_equal(grads[0], run(PLAIN).grad_x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(dtype: torch.dtype, shim: Shim) -> None:
    check_rounding(dtype)


def test_subnormal_numbers_are_kept(shim: Shim) -> None:
    x = torch.full((1, 4), 1e-40)
    kernel = kernel_for(PLAIN)
    _, v_last = launch.forward(kernel, x, None, torch.tensor(1.0), 1, torch.float32, 0.0, False, True)
    assert v_last is not None
    assert torch.equal(v_last, x[0])


def test_places_beyond_two_to_the_31(shim: Shim) -> None:
    """Index arithmetic on a frame of nearly 2 ** 40 elements in which x has gaps; nothing is allocated."""
    strides = (2**36, 3 * 2**29, 5 * 2**33, 2**33 + 16, 1)
    x = torch.empty_strided((4, 2**30 + 1, 3, 5, 48), strides, device="meta")
    threshold, kernel = torch.tensor([0.25, 0.5, 0.75]), kernel_for(PLAIN)
    channels, inner = channels_of((3, 1, 1), x.shape[1:])
    tensors = (None, None, threshold, *[None] * 8)
    options = (False, 0.0, 1.0, 1.0, 1)
    arguments = pack(kernel, tensors, 4, read(x, None, False, False), (channels, inner), *options) + bytes(128)
    library = shim.library(launch.definitions(kernel.definitions, x.dtype, x.dtype, "FORWARD", 4, 1, False))
    frame = x[0].numel()
    for i in (0, 47, 48, 2**31 - 1, 2**31, 2**32 + 77, 2**35 + 12345, frame - 1):
        row, column = divmod(i, 48)
        outer, channel, inner_row = row // 15, row // 5 % 3, row % 5
        place = outer * strides[1] + channel * strides[2] + inner_row * strides[3] + column
        assert library.place_of(arguments, i) == place
        assert library.threshold_of(arguments, i) == threshold[channel]
    assert library.element_of(2**31 - 2, 127) == (2**31 - 2) * 128 + 127
