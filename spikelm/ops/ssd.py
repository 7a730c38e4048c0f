"""The state-space scan behind Mamba-2: y_i = C_i^T S_i with S_i = exp(log_decay_i) S_{i-1} + B_i x_i^T.

Index legend: b batch, l token, c chunk, q token in a chunk, h head, g group of heads sharing B and C, r = h / g,
p head channel, n state channel.

Decays and the state are kept in log_decay's type (float32 under 16-bit x: a sum of 16-bit logarithms would lose the
decay itself); products over tokens run in x's type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ssd_step(
    x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: x [b, h, p], log_decay [b, h] (<= 0), B, C [b, g, n], state [b, h, p, n] -> y [b, h, p], state."""
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (m.repeat_interleave(heads_per_group, dim=1) for m in (B, C))
    state = state * log_decay.exp()[..., None, None] + x.unsqueeze(-1) * B.unsqueeze(-2)
    return (state @ C.unsqueeze(-1).to(state.dtype)).squeeze(-1).to(x.dtype), state


def ssd_recurrent(
    x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token. Shapes as in :func:`ssd_chunked`."""
    b, length, h, p = x.shape
    state = log_decay.new_zeros(b, h, p, B.shape[-1]) if state is None else state
    outputs = []
    for i in range(length):
        y, state = ssd_step(x[:, i], log_decay[:, i], B[:, i], C[:, i], state)
        outputs.append(y)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(x)), state


def decay_matrix(log_decay: torch.Tensor) -> torch.Tensor:
    """log_decay [..., l] -> [..., l, l] with entry (i, j) = exp(sum of log_decay over j+1..i) for i >= j, else 0."""
    total = log_decay.cumsum(-1)
    length = log_decay.shape[-1]
    above = torch.full((length, length), float("-inf"), dtype=total.dtype, device=total.device).triu(1)
    return ((total.unsqueeze(-1) + above) - total.unsqueeze(-2)).exp()


def ssd_chunked(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens in chunks: quadratic inside a chunk, linear over chunks.

    x [b, l, h, p], log_decay [b, l, h] (<= 0), B, C [b, l, g, n], state [b, h, p, n] or None -> y [b, l, h, p] and
    the state after the last token. Equals :func:`ssd_recurrent`.
    """
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk_size, max(length, 1))
    padding = -length % q
    if padding:  # x = 0 and log_decay = 0 leave the state as it is
        x, B, C = (F.pad(m, (0, 0, 0, 0, 0, padding)) for m in (x, B, C))
        log_decay = F.pad(log_decay, (0, 0, 0, padding))
    c, r = (length + padding) // q, h // g
    x = x.view(b, c, q, h, p).transpose(2, 3)  # b c h q p
    B = B.view(b, c, q, g, n).transpose(2, 3)  # b c g q n
    C = C.view(b, c, q, g, n).transpose(2, 3)
    log_decay = log_decay.view(b, c, q, h).transpose(2, 3)  # b c h q
    total = log_decay.cumsum(-1)

    # 1. inside a chunk: scores once per group, decayed per head
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3)  # b c g 1 q q
    mixing = (decay_matrix(log_decay).to(x.dtype).view(b, c, g, r, q, q) * scores).view(b, c, h, q, q)
    y = mixing @ x

    # 2. what every chunk adds to the state by its end
    decayed = x * (total[..., -1:] - total).exp().unsqueeze(-1).to(x.dtype)  # b c h q p
    added = decayed.view(b, c, g, r, q, p).transpose(-1, -2) @ B.unsqueeze(3)  # b c g r p n
    added = added.view(b, c, h, p, n)

    # 3. the state at the start of every chunk
    state = log_decay.new_zeros(b, h, p, n) if state is None else state
    chunk_decay = total[..., -1].exp()[..., None, None]  # b c h 1 1
    starts = []
    for addition, factor in zip(added.unbind(1), chunk_decay.unbind(1), strict=True):
        starts.append(state)
        state = state * factor + addition
    if not starts:
        return torch.zeros_like(x).reshape(b, length, h, p), state

    # 4. what that state gives to the tokens of the chunk
    start = torch.stack(starts, 1).view(b, c, g, r, p, n).to(x.dtype)
    carried = C.unsqueeze(3) @ start.transpose(-1, -2)  # b c g r q p
    y = y + carried.reshape(b, c, h, q, p) * total.exp().unsqueeze(-1).to(x.dtype)
    return y.transpose(2, 3).reshape(b, c * q, h, p)[:, :length], state
