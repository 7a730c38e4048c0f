"""The chunked scan against the sequential recurrence, and its cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spikelm.ops.ssd import decay_matrix, ssd_chunked, ssd_recurrent, ssd_step


def scan_inputs(
    length: int,
    heads: int = 4,
    groups: int = 2,
    batch: int = 2,
    p: int = 3,
    n: int = 5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "x": normal(batch, length, heads, p),
        "log_decay": -torch.nn.functional.softplus(normal(batch, length, heads)),
        "B": normal(batch, length, groups, n),
        "C": normal(batch, length, groups, n),
        "state": normal(batch, heads, p, n),
    }


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_chunked_equals_recurrent_with_gradients(length: int, chunk_size: int, groups: int, with_state: bool) -> None:
    data = scan_inputs(length, groups=groups)
    if not with_state:
        del data["state"]
    weights = None
    results = []
    for function, arguments in ((ssd_recurrent, {}), (ssd_chunked, {"chunk_size": chunk_size})):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
        y, state = function(**leaves, **arguments)
        if weights is None:
            weights = torch.randn_like(y), torch.randn_like(state)
        ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
        results.append({"y": y.detach(), "last": state.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("function", [ssd_recurrent, lambda *a: ssd_chunked(*a[:4], 8, *a[4:])])
def test_no_tokens(function: object) -> None:
    data = scan_inputs(0)
    y, state = function(*data.values())
    assert y.shape == (2, 0, 4, 3)
    assert torch.equal(state, data["state"])
    y, state = function(*list(data.values())[:4])
    assert torch.equal(state, torch.zeros(2, 4, 3, 5, dtype=torch.float64))


def test_two_parts_equal_the_whole() -> None:
    data = scan_inputs(21)
    state = data.pop("state")
    whole, last = ssd_chunked(**data, chunk_size=8, state=state)
    outputs = []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 21)):
        y, state = ssd_chunked(**{name: tensor[:, cut] for name, tensor in data.items()}, chunk_size=8, state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_it_is_a_matrix_of_decayed_scores() -> None:
    data = scan_inputs(11, groups=2)
    del data["state"]
    y, _ = ssd_chunked(**data, chunk_size=4)
    B, C = (data[name].repeat_interleave(2, dim=2).transpose(1, 2) for name in "BC")
    mixing = decay_matrix(data["log_decay"].transpose(1, 2)) * (C @ B.transpose(-1, -2))
    torch.testing.assert_close(y, (mixing @ data["x"].transpose(1, 2)).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_decay_matrix_by_hand() -> None:
    matrix = decay_matrix(torch.tensor([-7.0, -1.0, -2.0])).log()
    assert matrix.tolist() == [[0, -float("inf"), -float("inf")], [-1, 0, -float("inf")], [-3, -2, 0]]


def test_strong_decay_gives_no_nan() -> None:
    data = scan_inputs(64, dtype=torch.float32)
    data["log_decay"] = torch.full_like(data["log_decay"], -200.0).requires_grad_()
    y, state = ssd_chunked(**data, chunk_size=64)
    (y.sum() + state.sum()).backward()
    assert bool(y.isfinite().all())
    assert bool(data["log_decay"].grad.isfinite().all())


def test_sixteen_bit_products_keep_float32_decays_and_state() -> None:
    """A bfloat16 sum of many logarithms would be wrong by whole units, so the decays by factors."""
    data = scan_inputs(128, p=16, n=16, dtype=torch.float32)
    data["log_decay"] = data["log_decay"] * 3
    state = data.pop("state") * 0
    exact, last = ssd_recurrent(**data, state=state)
    half = {name: tensor.bfloat16() if name != "log_decay" else tensor for name, tensor in data.items()}
    for y, end in (ssd_chunked(**half, chunk_size=128), ssd_recurrent(**half)):
        assert y.dtype == torch.bfloat16
        assert end.dtype == torch.float32
        assert float((y.float() - exact).norm() / exact.norm()) < 0.02
        assert float((end - last).norm() / last.norm()) < 0.02


def test_one_step_of_sixteen_bit_tokens() -> None:
    data = scan_inputs(1, dtype=torch.bfloat16)
    tokens = {name: tensor[:, 0] for name, tensor in data.items() if name != "state"}
    tokens["log_decay"] = tokens["log_decay"].float()
    y, state = ssd_step(**tokens, state=data["state"].float())
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def flops(length: int, chunk_size: int) -> int:
    data = scan_inputs(length, heads=8, groups=2, batch=1, p=16, n=16, dtype=torch.float32)
    del data["state"]
    with FlopCounterMode(display=False) as counter:
        ssd_chunked(**data, chunk_size=chunk_size)
    return counter.get_total_flops()


def test_cost_is_linear_in_the_length() -> None:
    counts = [flops(length, 64) for length in (256, 512, 1024, 2048)]
    for short, long in zip(counts, counts[1:], strict=False):
        assert long / short == pytest.approx(2, rel=0.05)
    # and not so when one chunk takes the whole: the count sees the quadratic part
    assert flops(2048, 2048) / flops(1024, 1024) > 3
