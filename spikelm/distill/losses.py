"""Distillation losses as pure functions: token masks, divergences, feature and mixer distances.

Every function accepts any floating dtype and computes in float32 (float64 where it is given float64). A mean is always
taken over counted tokens, never over batch rows; `num_items` replaces the number of counted tokens, so that the losses
of several micro-batches, each divided by the tokens of all of them, add up to the loss of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikelm.neurons import BinaryIF
from spikelm.ops.multistep import multi_step


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def loss_mask(input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
    """Positions whose prediction counts, bool [B, L].

    Position t predicts token t + 1. It counts when both tokens are real (`attention_mask` not 0; without it all are)
    and `labels[:, t + 1]` is not -100 (without labels every real token is a target). The last position never counts.

    Args:
        input_ids: [B, L].  labels: [B, L], unshifted, -100 ignored.  attention_mask: [B, L], 1 for real tokens.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, -1:] = False
    if labels is not None:
        mask[:, :-1] &= labels[:, 1:] != -100
    if attention_mask is not None:
        real = attention_mask != 0
        mask[:, :-1] &= real[:, 1:] & real[:, :-1]
    return mask


def token_mean(values: Tensor, mask: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Sum of `values` [B, L] where `mask` [B, L], over `num_items` (default: the tokens in the mask; at least 1).
    Scalar.
    """
    return torch.where(mask, values, 0).sum() / _denominator(mask, num_items)


def _denominator(mask: Tensor, num_items: Tensor | float | None) -> Tensor:
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
    return count.clamp(min=1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(p || q) in nats per token, both softened by ``temperature``: logits [..., V] -> [...].

    The factor keeps the gradient's size (Hinton et al., 2015).
    """
    p_logits, q_logits = _widen(p_logits) / temperature, _widen(q_logits) / temperature
    return temperature**2 * sbds_divergence(p_logits, q_logits, alpha=1.0, beta=0.0)


def sbds_divergence(teacher_logits: Tensor, student_logits: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha KL(p || q) + beta KL(q || p) in nats per token, p the teacher: logits [..., V] -> [...]. (MAR, Eq. 5-6.)

    Evaluated as sum_k [alpha p(k) - beta q(k)] [log p(k) - log q(k)], one log-softmax of each side.
    """
    log_p = _widen(teacher_logits).log_softmax(-1)
    log_q = _widen(student_logits).log_softmax(-1)
    if beta == 0:
        weight = alpha * log_p.exp()
    elif alpha == 0:
        weight = -beta * log_q.exp()
    else:
        weight = alpha * log_p.exp() - beta * log_q.exp()
    return (weight * (log_p - log_q)).sum(-1)


def hidden_alignment(teacher: Tensor, student: Tensor, mask: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Token mean of the L2 norm over channels of teacher - student, both [B, L, d]. (MOHAWK step 2; unsquared [ours for
    SBDS].)

    The gradient where both are equal is 0.
    """
    # linalg.vector_norm takes the subgradient 0 at 0, where sqrt(sum of squares) would give NaN.
    return token_mean(torch.linalg.vector_norm(_widen(teacher) - _widen(student), dim=-1), mask, num_items)


def feature_distance(
    teacher_features: Sequence[Tensor],
    student_features: Sequence[Tensor],
    mask: Tensor,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Mean over layers of `hidden_alignment` of each pair [B, L, d]. (MAR, Eq. 7: 1/(T L) sum_t sum_l || . ||_2.)"""
    distances = [
        hidden_alignment(teacher, student, mask, num_items)
        for teacher, student in zip(teacher_features, student_features, strict=True)
    ]
    return torch.stack(distances).mean()


def relative_hidden_error(
    teacher_hidden: Sequence[Tensor],
    student_hidden: Sequence[Tensor],
    mask: Tensor,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Mean over layers and tokens of ||h_S - h_T||^2 / ||h_T||^2 over channels, each [B, L, d]. [ours for SpikingMamba]

    A token whose teacher's state is 0 counts ||h_S - h_T||^2 over the smallest normal number.
    """
    terms = []
    for teacher, student in zip(teacher_hidden, student_hidden, strict=True):
        teacher = _widen(teacher)
        energy = teacher.square().sum(-1).clamp_min(torch.finfo(teacher.dtype).tiny)
        terms.append(token_mean((_widen(student) - teacher).square().sum(-1) / energy, mask, num_items))
    return torch.stack(terms).mean()


def matrix_orientation(
    teacher_map: Tensor, student_map: Tensor, mask: Tensor | None = None, num_items: Tensor | float | None = None
) -> Tensor:
    """Frobenius norm of teacher - student per (batch, head), mean over both; maps [B, H, L, L]. (MOHAWK step 1.)

    With `mask` [B, L] only the rows (queries) in it count, and sequences are weighted by their counted tokens [ours],
    which leaves equally long sequences alone and makes micro-batches add up.
    """
    difference = _widen(teacher_map) - _widen(student_map)
    if mask is None:
        mask = torch.ones(difference.shape[0], difference.shape[2], dtype=torch.bool, device=difference.device)
    else:
        difference = torch.where(mask[:, None, :, None], difference, 0)
    per_sequence = torch.linalg.vector_norm(difference, dim=(-2, -1)).mean(1)
    return (per_sequence * mask.sum(1)).sum() / _denominator(mask, num_items)


def as_weights(rows: Tensor, head: nn.Module) -> Tensor:
    """In the head's type: a residual stream may be float32 in a 16-bit model."""
    return rows.to(next(head.parameters()).dtype)


def chunked_logit_loss(
    divergence: Callable[[Tensor, Tensor], Tensor],
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    student_hidden: Tensor,
    student_head: nn.Module,
    mask: Tensor,
    chunk_size: int,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Token mean of `divergence(teacher_logits [N, V], student_logits [N, V]) -> [N]` over the tokens in `mask`.
    Scalar.

    Only counted tokens go through the heads. More than `chunk_size` of them are taken in chunks whose logits are formed
    again in the backward pass, so that the memory is chunk_size * V whatever the batch. The teacher gets no gradient.

    Args:
        teacher_hidden, student_hidden: [B, L, d], what the heads (d -> V) are fed.  mask: bool [B, L].
    """

    def chunk_sum(teacher_rows: Tensor, student_rows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(as_weights(teacher_rows, teacher_head))
        return divergence(teacher_logits, student_head(as_weights(student_rows, student_head))).sum()

    total = chunked_sum(chunk_sum, (teacher_hidden[mask], student_hidden[mask]), chunk_size)
    return total / _denominator(mask, num_items)


def chunked_sum(function: Callable[..., Tensor], rows: Sequence[Tensor], chunk_size: int) -> Tensor:
    """function(*rows), a sum over their first axis, formed in chunks of at most ``chunk_size`` of it.

    Where there are several, each is formed again in the backward pass, so that one chunk's graph exists at a time.
    """
    if len(rows[0]) <= chunk_size:
        return function(*rows)
    chunks = zip(*(part.split(chunk_size) for part in rows), strict=True)
    sums = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum(0)


@torch.no_grad()
def teacher_rate(values: Tensor, T: int, beta: float, v_threshold: float) -> Tensor:
    """SN of BiSpikCLM (Eq. 1) on a teacher's values of any shape: the share of T steps at which it fires, in [0, 1].

    The same value enters at each step. Without gradient.
    """
    values = _widen(values)
    neuron = BinaryIF(beta, v_threshold, reset_delay=True)
    x_seq = values.unsqueeze(0).expand(T, *values.shape)
    threshold = values.new_tensor(v_threshold)
    spikes, _ = multi_step(x_seq, None, threshold, neuron.dynamics, keep_state=False, spike_dtype=torch.int8)
    counts = spikes.sum(
        0, dtype=torch.int8 if T <= 127 else torch.int32
    )  # in a wider type all of them are copied first
    return counts.to(values.dtype) / T


def row_max_scaled(attention_map: Tensor) -> Tensor:
    """Every row of a map [..., L, L] of entries >= 0 over its largest entry; a row of zeros stays. [ours]"""
    attention_map = _widen(attention_map)
    return attention_map / attention_map.amax(-1, keepdim=True).clamp_min(torch.finfo(attention_map.dtype).tiny)


def embedding_alignment(
    teacher: Tensor, student: Tensor, mask: Tensor, num_items: Tensor | float | None = None
) -> Tensor:
    """Mean over tokens and channels of (student - teacher)^2, both [B, L, d], the student's a rate. (SpAD, EA.)"""
    return token_mean((_widen(student) - _widen(teacher)).square().mean(-1), mask, num_items)


def feature_alignment(
    teacher: Tensor,
    rate: Tensor,
    student: Tensor,
    mask: Tensor,
    num_items: Tensor | float | None = None,
    gamma: float = 0.5,
) -> Tensor:
    """Mean over tokens and channels of gamma (student - rate)^2 + (1 - gamma) (student - teacher)^2. (SpAD, SFA.)

    All [B, L, d]; rate is `teacher_rate` of the teacher's.
    """
    return token_mean(_two_targets(teacher, rate, student, gamma).mean(-1), mask, num_items)


def attention_alignment(
    teacher: Tensor,
    rate: Tensor,
    student: Tensor,
    mask: Tensor,
    num_items: Tensor | float | None = None,
    gamma: float = 0.5,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Mean of gamma (student - rate)^2 + (1 - gamma) (student - teacher)^2 over heads, keys and queries. (SpAD, SAA.)

    The keys of a query are those up to itself that are real, the queries are the tokens in the mask; each query weighs
    the same. [ours]

    Args:
        teacher, rate, student: maps [B, H, L, L]; rate is `teacher_rate` of the teacher's.
        mask: bool [B, L].  attention_mask: [B, L], 1 for real tokens; None, all are.
    """
    allowed = torch.ones(student.shape[-2:], dtype=torch.bool, device=student.device).tril()
    if attention_mask is not None:
        allowed = allowed & (attention_mask != 0)[:, None, :]  # b l l
    error = _two_targets(teacher, rate, student, gamma).mean(1)
    error = torch.where(allowed, error, 0).sum(-1) / allowed.sum(-1).clamp(min=1)
    return token_mean(error, mask, num_items)


def _two_targets(teacher: Tensor, rate: Tensor, student: Tensor, gamma: float) -> Tensor:
    """gamma (student - rate)^2 + (1 - gamma) (student - teacher)^2, as one square with a gradient and a constant."""
    teacher, rate = _widen(teacher), _widen(rate)
    between = torch.lerp(teacher, rate, gamma)
    return (_widen(student) - between).square() + gamma * (1 - gamma) * (rate - teacher).square()


def soft_target(
    teacher_logits: Tensor,
    student_logits: Tensor,
    mask: Tensor,
    num_items: Tensor | float | None = None,
    temperature: float = 2.0,
) -> Tensor:
    """Token mean of `kl_divergence`, logits [..., V] and mask [...]: in nats. (SpAD, STA.)"""
    return token_mean(kl_divergence(teacher_logits, student_logits, temperature), mask, num_items)


def hard_target(logits: Tensor, targets: Tensor, mask: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Token mean of the cross-entropy with the next token, in nats. (SpAD, HTA.)

    Args:
        logits: [..., V].  targets: [...], the token after each, see `next_tokens`; unread outside the mask [...].
    """
    targets = torch.where(mask, targets, 0)
    losses = F.cross_entropy(_widen(logits).flatten(0, -2), targets.flatten(), reduction="none")
    return token_mean(losses.view(mask.shape), mask, num_items)


def next_tokens(input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """What each position of [B, L] predicts, by `labels` where there are any; the last position's entry is no token."""
    return (input_ids if labels is None else labels).roll(-1, dims=1)
