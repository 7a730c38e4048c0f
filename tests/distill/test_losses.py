"""Distillation losses against slow loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spikelm.distill.losses import (
    attention_alignment,
    chunked_logit_loss,
    chunked_sum,
    embedding_alignment,
    feature_alignment,
    feature_distance,
    hard_target,
    hidden_alignment,
    kl_divergence,
    loss_mask,
    matrix_orientation,
    next_tokens,
    relative_hidden_error,
    row_max_scaled,
    sbds_divergence,
    soft_target,
    teacher_rate,
    token_mean,
)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_kl(p: Tensor, q: Tensor) -> float:
    p_exp, q_exp = [math.exp(v) for v in p.tolist()], [math.exp(v) for v in q.tolist()]
    p_list, q_list = [v / sum(p_exp) for v in p_exp], [v / sum(q_exp) for v in q_exp]
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p_list, q_list, strict=True))


def slow_mask(input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None) -> list[list[bool]]:
    batch, length = input_ids.shape
    rows = []
    for b in range(batch):
        row = []
        for t in range(length):
            counts = t + 1 < length
            if counts and labels is not None:
                counts = labels[b, t + 1].item() != -100
            if counts and attention_mask is not None:
                counts = bool(attention_mask[b, t + 1]) and bool(attention_mask[b, t])
            row.append(counts)
        rows.append(row)
    return rows


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size = batch * length
    input_ids = torch.arange(size).view(batch, length)
    labels = draw(st.none() | st.lists(st.sampled_from([-100, 3]), min_size=size, max_size=size))
    attention = draw(st.none() | st.lists(st.sampled_from([0, 1]), min_size=size, max_size=size))
    as_tensor = lambda values: None if values is None else torch.tensor(values).view(batch, length)  # noqa: E731
    return input_ids, as_tensor(labels), as_tensor(attention)


@given(masked_batches(), st.floats(0, 2), st.floats(0, 2))
def test_sbds_is_the_weighted_sum_of_both_divergences_under_masks(
    batch: tuple[Tensor, Tensor | None, Tensor | None], alpha: float, beta: float
) -> None:
    mask = loss_mask(*batch)
    expected_mask = slow_mask(*batch)
    assert mask.tolist() == expected_mask
    p, q = logits(*mask.shape, 7, seed=1), logits(*mask.shape, 7, seed=2)
    counted = [(b, t) for b, row in enumerate(expected_mask) for t, on in enumerate(row) if on]
    slow = sum(alpha * slow_kl(p[at], q[at]) + beta * slow_kl(q[at], p[at]) for at in counted) / max(len(counted), 1)
    assert token_mean(sbds_divergence(p, q, alpha, beta), mask).item() == pytest.approx(slow, abs=1e-12)


def test_divergence_gradient_reaches_the_student_and_matches_finite_differences() -> None:
    teacher, student = logits(2, 5, seed=3), logits(2, 5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: sbds_divergence(teacher, q, 0.2, 0.7), (student,))


def test_divergence_in_half_precision_is_computed_in_float32() -> None:
    p, q = logits(4, 50, seed=1).bfloat16(), logits(4, 50, seed=2).bfloat16()
    result = kl_divergence(p, q)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, kl_divergence(p.double(), q.double()).float(), rtol=1e-5, atol=1e-5)
    assert (kl_divergence(p, p) == 0).all()


def test_forward_and_reverse_are_not_swapped() -> None:
    teacher = torch.tensor([[0.0, 0.0]])
    student = torch.tensor(
        [[10.0, 0.0]]
    )  # misses the teacher's second mode: dear under KL(p || q), cheap under KL(q || p)
    assert sbds_divergence(teacher, student, 1.0, 0.0).item() == pytest.approx(10 / 2 - math.log(2), abs=1e-3)
    assert sbds_divergence(teacher, student, 0.0, 1.0).item() == pytest.approx(math.log(2), abs=1e-3)


def test_token_mean_ignores_what_is_masked_even_nan_and_survives_an_empty_mask() -> None:
    values = torch.tensor([[1.0, float("nan")], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert token_mean(values, mask).item() == 3.0
    assert token_mean(values, mask, num_items=9).item() == 1.0
    assert token_mean(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_feature_distance_against_a_slow_loop_with_mask() -> None:
    teacher = [logits(2, 3, 4, seed=seed) for seed in (1, 2)]
    student = [logits(2, 3, 4, seed=seed) for seed in (3, 4)]
    mask = torch.tensor([[True, True, False], [False, True, False]])
    slow = 0.0
    for a, b in zip(teacher, student, strict=True):
        for at in ((0, 0), (0, 1), (1, 1)):
            slow += math.sqrt(sum((x - y) ** 2 for x, y in zip(a[at].tolist(), b[at].tolist(), strict=True)))
    assert feature_distance(teacher, student, mask).item() == pytest.approx(slow / 3 / 2, abs=1e-12)
    with pytest.raises(ValueError, match="shorter"):
        feature_distance(teacher, student[:1], mask)


def test_gradient_of_equal_features_and_maps_is_zero() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    features = logits(1, 2, 3).requires_grad_()
    hidden_alignment(features.detach(), features, mask).backward()
    assert features.grad is not None and (features.grad == 0).all()
    maps = logits(1, 1, 2, 2).requires_grad_()
    matrix_orientation(maps.detach(), maps).backward()
    assert maps.grad is not None and (maps.grad == 0).all()


def test_matrix_orientation_is_the_mean_frobenius_norm() -> None:
    teacher, student = logits(2, 3, 4, 4, seed=1), logits(2, 3, 4, 4, seed=2)
    slow = sum(
        math.sqrt(sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)))
        for a, b in zip(teacher.flatten(0, 1), student.flatten(0, 1), strict=True)
    )
    assert matrix_orientation(teacher, student).item() == pytest.approx(slow / 6, abs=1e-12)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, -1] = False
    rows = matrix_orientation(teacher[:, :, :3], student[:, :, :3])
    assert matrix_orientation(teacher, student, mask).item() == pytest.approx(rows.item(), abs=1e-12)


def test_micro_batches_over_all_items_add_up_to_the_whole() -> None:
    teacher, student = logits(4, 2, 3, 3, seed=1), logits(4, 2, 3, 3, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    whole = matrix_orientation(teacher, student, mask)
    parts = [
        matrix_orientation(teacher[rows], student[rows], mask[rows], num_items=mask.sum())
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5, generator=generator) > 0.4
    teacher_head, head = nn.Linear(4, 11).double(), nn.Linear(4, 11).double()
    teacher_hidden = logits(3, 5, 4, seed=1)

    def run(size: int) -> list[Tensor]:
        hidden = logits(3, 5, 4, seed=2).requires_grad_()
        head.zero_grad()
        loss = chunked_logit_loss(
            lambda p, q: sbds_divergence(p, q, 0.2, 0.7), teacher_hidden, teacher_head, hidden, head, mask, size
        )
        loss.backward()
        assert hidden.grad is not None and head.weight.grad is not None and teacher_head.weight.grad is None
        return [loss.detach(), hidden.grad, head.weight.grad.clone()]

    plain = token_mean(
        sbds_divergence(teacher_head(teacher_hidden), head(logits(3, 5, 4, seed=2)), 0.2, 0.7), mask
    ).detach()
    results = run(chunk_size)
    torch.testing.assert_close(results[0], plain, rtol=0, atol=1e-12)
    for chunked, whole in zip(results, run(10**6), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_chunks_never_hold_all_logits_and_skip_masked_tokens() -> None:
    seen: list[int] = []

    def divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        seen.append(len(student_logits))
        return kl_divergence(teacher_logits, student_logits)

    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    head = nn.Linear(4, 6)
    hidden = torch.randn(2, 8, 4, requires_grad=True)
    chunked_logit_loss(divergence, torch.randn(2, 8, 4), nn.Linear(4, 6), hidden, head, mask, 4)
    assert seen == [4, 4, 2]


def test_chunked_loss_of_no_token_is_zero_with_a_gradient() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    head = nn.Linear(4, 6)
    loss = chunked_logit_loss(kl_divergence, torch.randn(1, 3, 4), head, hidden, head, torch.zeros(1, 3).bool(), 2)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and (hidden.grad == 0).all()


def test_temperature_softens_both_sides_and_keeps_the_gradients_size() -> None:
    p, q = logits(5, 7, seed=1), logits(5, 7, seed=2)
    for temperature in (0.5, 1.0, 4.0):
        found = kl_divergence(p, q, temperature)
        for row in range(5):
            expected = temperature**2 * slow_kl(p[row] / temperature, q[row] / temperature)
            assert found[row].item() == pytest.approx(expected, rel=1e-12)
    # for a high temperature the gradient tends to the difference of centred logits over V, whatever the temperature
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(p, q, 1e4).sum(), q)
    difference = q - p
    torch.testing.assert_close(gradient, (difference - difference.mean(-1, keepdim=True)) / 7, rtol=1e-2, atol=1e-3)


def test_relative_hidden_error_against_a_slow_loop() -> None:
    teacher = [logits(2, 4, 3, seed=s) for s in (1, 2)]
    student = [layer + 0.1 * logits(2, 4, 3, seed=s) for layer, s in zip(teacher, (3, 4), strict=True)]
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        for b, position in mask.nonzero().tolist():
            difference = [x - y for x, y in zip(s[b, position].tolist(), t[b, position].tolist(), strict=True)]
            total += sum(d * d for d in difference) / sum(x * x for x in t[b, position].tolist())
    assert relative_hidden_error(teacher, student, mask).item() == pytest.approx(total / 5 / 2, rel=1e-12)
    assert relative_hidden_error(teacher, student, mask, 10).item() == pytest.approx(total / 10 / 2, rel=1e-12)
    assert relative_hidden_error(teacher, teacher, mask).item() == 0


def test_a_silent_teacher_gives_no_nan() -> None:
    zero, mask = torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    assert relative_hidden_error([zero], [zero], mask).item() == 0
    student = torch.zeros(1, 3, 4, requires_grad=True)
    relative_hidden_error([zero], [student], mask).backward()
    assert bool((student.grad == 0).all())


def slow_rate(value: float, T: int, beta: float, v_threshold: float) -> float:
    membrane, spike, count = 0.0, 0, 0
    for _ in range(T):
        membrane = value + beta * membrane - spike * v_threshold
        spike = int(membrane >= v_threshold)
        count += spike
    return count / T


@pytest.mark.parametrize(
    ("v_threshold", "value", "of_two", "of_four"),
    [(1.0, 0.3, 0, 0.25), (1.0, 0.5, 0, 0.25), (1.0, 0.7, 0.5, 0.5), (1.0, 1.0, 0.5, 0.75), (1.0, 2.0, 1, 1)]
    + [(0.7, 0.25, 0, 0.25), (0.7, 0.4, 0.5, 0.5), (0.7, 0.7, 0.5, 0.75), (0.7, 1.0, 1, 1), (0.7, -3.0, 0, 0)],
)
def test_teacher_rate_of_golden_currents(v_threshold: float, value: float, of_two: float, of_four: float) -> None:
    values = torch.full((2, 3), value)
    for T, expected in ((2, of_two), (4, of_four)):
        assert (teacher_rate(values, T, 0.9, v_threshold) == expected).all()


def test_teacher_rate_against_a_slow_loop_for_any_shape() -> None:
    values = logits(2, 3, 5, 5, scale=1.5).requires_grad_()
    rate = teacher_rate(values, 5, 0.8, 0.6)
    slow = [slow_rate(value, 5, 0.8, 0.6) for value in values.flatten().tolist()]
    assert rate.flatten().tolist() == pytest.approx(slow) and len(set(slow)) > 4
    assert rate.shape == values.shape and rate.dtype == torch.float64 and not rate.requires_grad
    assert teacher_rate(torch.tensor(0.5).bfloat16(), 4, 0.9, 1.0) == torch.tensor(0.25)
    assert teacher_rate(torch.zeros(0, 3), 4, 0.9, 1.0).shape == (0, 3)


def test_the_rates_of_a_long_context_are_zero_without_row_scaling() -> None:
    """A probability fires from V / 3.439 on (T = 4, beta 0.9): evenly over four keys or more, none does."""
    even = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    plain, scaled = (teacher_rate(each, 4, 0.9, 1.0) for each in (even, row_max_scaled(even)))
    assert (plain[:3].tril() > 0).sum() == 6 and (plain[3:] == 0).all()
    assert (scaled == 0.75 * torch.ones(8, 8).tril()).all()
    rows = row_max_scaled(torch.tensor([[0.2, 0.1, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]))


@given(masked_batches(), st.floats(0, 1), st.none() | st.integers(1, 50))
def test_alignments_against_slow_loops(
    batch: tuple[Tensor, Tensor | None, Tensor | None], gamma: float, num_items: int | None
) -> None:
    input_ids, labels, attention_mask = batch
    size, length = input_ids.shape
    mask = loss_mask(*batch)
    counted = mask.nonzero().tolist()
    items = max(1, len(counted)) if num_items is None else num_items
    teacher, rate, student = (logits(size, length, 3, seed=seed) for seed in (1, 2, 3))
    embedding = features = maps = 0.0
    for b, q in counted:
        for c in range(3):
            s, t, r = (each[b, q, c].item() for each in (student, teacher, rate))
            embedding += (s - t) ** 2 / 3 / items
            features += (gamma * (s - r) ** 2 + (1 - gamma) * (s - t) ** 2) / 3 / items
    teacher_map, rate_map, student_map = (logits(size, 2, length, length, seed=seed) for seed in (4, 5, 6))
    for b, q in counted:
        keys = [k for k in range(q + 1) if attention_mask is None or attention_mask[b, k]]
        for head in range(2):
            for k in keys:
                s, t, r = (each[b, head, q, k].item() for each in (student_map, teacher_map, rate_map))
                maps += (gamma * (s - r) ** 2 + (1 - gamma) * (s - t) ** 2) / len(keys) / 2 / items
    assert embedding_alignment(teacher, student, mask, num_items).item() == pytest.approx(embedding, abs=1e-10)
    found = feature_alignment(teacher, rate, student, mask, num_items, gamma)
    assert found.item() == pytest.approx(features, abs=1e-10)
    found = attention_alignment(teacher_map, rate_map, student_map, mask, num_items, gamma, attention_mask)
    assert found.item() == pytest.approx(maps, abs=1e-10)


@given(masked_batches(), st.none() | st.integers(1, 50))
def test_targets_against_slow_loops(batch: tuple[Tensor, Tensor | None, Tensor | None], num_items: int | None) -> None:
    input_ids, labels, attention_mask = batch
    mask = loss_mask(*batch)
    counted = mask.nonzero().tolist()
    items = max(1, len(counted)) if num_items is None else num_items
    teacher, student = logits(*mask.shape, 20, seed=1), logits(*mask.shape, 20, seed=2)
    soft = hard = 0.0
    for b, t in counted:
        soft += 4 * slow_kl(teacher[b, t] / 2, student[b, t] / 2) / items
        target = int((input_ids if labels is None else labels)[b, t + 1])
        exponentials = [math.exp(v) for v in student[b, t].tolist()]
        hard -= math.log(exponentials[target] / sum(exponentials)) / items
    assert soft_target(teacher, student, mask, num_items).item() == pytest.approx(soft, abs=1e-10)
    targets = next_tokens(input_ids, labels)
    assert hard_target(student, targets, mask, num_items).item() == pytest.approx(hard, abs=1e-10)


def test_alignments_in_half_precision_are_computed_in_float32() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    half = [logits(2, 4, 4, seed=seed).bfloat16() for seed in range(3)]
    maps = [each.unsqueeze(1) for each in half]
    for function, given_to in (
        (lambda t, r, s, m: embedding_alignment(t, s, m), half),
        (feature_alignment, half),
        (attention_alignment, maps),
        (lambda t, r, s, m: soft_target(t, s, m), half),
        (lambda t, r, s, m: hard_target(s, torch.zeros(2, 4, dtype=torch.long), m), half),
    ):
        found = function(*given_to, mask)
        assert found.dtype == torch.float32
        wide = function(*(each.double() for each in given_to), mask)
        assert wide.dtype == torch.float64
        torch.testing.assert_close(found, wide.float(), rtol=1e-5, atol=1e-6)


def test_chunked_sum_of_several_values() -> None:
    rows = logits(7, 3), torch.arange(7)
    whole = chunked_sum(lambda x, n: torch.stack([x.sum(), (x[:, 0] * n).sum()]), rows, 100)
    chunked = chunked_sum(lambda x, n: torch.stack([x.sum(), (x[:, 0] * n).sum()]), rows, 2)
    assert whole.shape == (2,)
    torch.testing.assert_close(chunked, whole)
