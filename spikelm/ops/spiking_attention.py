"""Softmax-free spiking attention on bits (BiSpikCLM, arXiv 2605.13859, Algorithm 1): AND and popcount, no product.

q, k, v = pack_channels(Q), pack_channels(K), pack_tokens(V)  # spikes [T, B, tokens, H, d_h] to bits
out, fired = spiking_attention(q, k, v, num_keys=S, threshold=1.0, beta=0.9)

Inference alone: bits have no gradient. torch.compile takes the attention as one node, and compiles the packing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import torch
from spikingjelly.activation_based import surrogate
from torch.nn.functional import pad

from spikelm.cpu import attention as cpu
from spikelm.errors import SpikelmError
from spikelm.ops import reference
from spikelm.ops.dynamics import Dynamics
from spikelm.ops.kernel import Kernel
from spikelm.ops.multistep import check_backend, choose, unavailable

_BITS = 32  # of a word
_MAP_ELEMENTS = 1 << 20  # of a map that the reference holds at once
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_channels(spikes: torch.Tensor) -> torch.Tensor:
    """Spikes [T, B, L, H, d_h] of queries or keys as int32 [T, B, H, W, L], W = ceil(d_h / 32).

    Bit c % 32 of word c // 32 is channel c of that token; unused bits are 0. What is not 0 is a spike, in any type but
    a complex one, through any strides.
    """
    _check_spikes(spikes)
    if spikes.numel() and not torch.compiler.is_compiling() and _packs_in_kernel(spikes):
        return cpu.pack_channels(spikes)
    bits = pad(spikes != 0, (0, -spikes.shape[-1] % _BITS)).unflatten(4, (_words_for(spikes.shape[-1]), _BITS))
    return _words(bits, 5).permute(0, 1, 3, 4, 2).contiguous()


def pack_tokens(spikes: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Spikes [T, B, S, H, d_h] of values as int32 [T, B, H, ceil((first + S) / 32), d_h].

    Bit (first + j) % 32 of word (first + j) // 32 is token j; the others are 0, so that a cache whose last word holds
    ``first`` tokens, 0 to 31, takes these by OR. Spikes as in :func:`pack_channels`.
    """
    _check_spikes(spikes)
    if not 0 <= first < _BITS:
        raise SpikelmError(f"first must be an integer within 0..31; got {first!r}")
    if spikes.numel() and not torch.compiler.is_compiling() and _packs_in_kernel(spikes):
        return cpu.pack_tokens(spikes, first)
    tokens = first + spikes.shape[2]
    bits = pad(spikes != 0, (0, 0, 0, 0, first, -tokens % _BITS)).unflatten(2, (_words_for(tokens), _BITS))
    return _words(bits, 3).transpose(2, 3).contiguous()


def unpack_channels(packed: torch.Tensor, d_h: int) -> torch.Tensor:
    """Booleans [T, B, L, H, d_h] of int32 [T, B, H, W, L] from :func:`pack_channels`."""
    bits = (packed.unsqueeze(4) >> _places(packed.device).view(-1, 1)) & 1
    return bits.flatten(3, 4)[:, :, :, :d_h].bool().permute(0, 1, 4, 2, 3)


def unpack_tokens(packed: torch.Tensor, S: int, first: int = 0) -> torch.Tensor:
    """Booleans [T, B, S, H, d_h] of int32 [T, B, H, words, d_h] from :func:`pack_tokens`."""
    bits = (packed.unsqueeze(4) >> _places(packed.device).view(-1, 1)) & 1
    return bits.flatten(3, 4)[:, :, :, first : first + S].bool().transpose(2, 3)


def spiking_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_keys: int,
    threshold: float,
    beta: float,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention whose map is fired by a binary neuron with delayed soft reset (BinaryIF, reset_delay=True)::

        u_t[i, j] = beta u_{t-1}[i, j] - A_{t-1}[i, j] threshold + popcount(q_t[i] & k_t[j])    for j <= past + i
        A_t[i, j] = 1 where u_t[i, j] >= threshold, else 0;  all states 0 before the first step, all arithmetic float32
        out_t[i]  = sum_j A_t[i, j] v_t[j]

    where past = num_keys - L. Padding needs no mask: the key and value bits of a padded token are all 0, so its counts
    are 0 and, as the threshold is above 0, its entries of the map never fire. Masking again behind the neuron, as the
    paper does, changes nothing for the same reason.

    Args:
        queries: int32 [T, B, H, W, L], from :func:`pack_channels`, with W = ceil(d_h / 32).
        keys: int32 [T, B, H, W, capacity], likewise; capacity >= num_keys, further tokens are not looked at.
        values: int32 [T, B, H, words, d_h] from :func:`pack_tokens`; words >= ceil(num_keys / 32), likewise. Both may
            be views into a larger cache: they are read through their strides, only the last axis has to be dense.
        num_keys: tokens of keys and values, the L queries being the last of them.
        threshold: > 0, a normal number of float32.
        beta: factor on the membrane between steps, within (0, 1].
        dtype: of ``out``: float32, float16 or bfloat16. Sums are integers, rounded where they are stored.
        backend: one of :data:`spikelm.ops.multistep.BACKENDS`.

    Returns:
        out [T, B, L, H, d_h], and the number of keys that fired, int32 [T, B, L, H]: its mean over past + i + 1 is the
        density of the map.
    """
    _check(queries, keys, values, num_keys, threshold, beta, dtype)
    check_backend(backend)
    attend = _attend_op if torch.compiler.is_compiling() else _attend
    return attend(queries, keys, values, num_keys, float(threshold), float(beta), dtype, backend)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    beta: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, fired = _empty(queries, keys, values, num_keys, threshold, beta, dtype, backend)
    if out.numel() == 0 or queries.is_meta:
        return out, fired
    T, channels, dynamics = len(queries), values.shape[-1], _dynamics(beta)
    kernel = dynamics.kernel
    assert isinstance(kernel, Kernel), kernel
    name = choose(queries, backend, lambda natural: _refused(natural, kernel.definitions, T, channels, dtype))
    if name is None:
        _reference(queries, keys, values, num_keys, threshold, dynamics, out, fired)
    else:
        _attend_on(name)(kernel, queries, keys, values, num_keys, threshold, out, fired)
    return out, fired


def _empty(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    beta: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an attention of these arguments fills."""
    T, B, H, _, L = queries.shape
    return queries.new_empty((T, B, L, H, values.shape[-1]), dtype=dtype), queries.new_empty((T, B, L, H))


_attend_op = torch.library.custom_op("spikelm::spiking_attention", _attend, mutates_args=())
_attend_op.register_fake(_empty)


# ---- the definition in torch


def _reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    dynamics: Dynamics,
    out: torch.Tensor,
    fired: torch.Tensor,
) -> None:
    """Fills ``out`` and ``fired``, a few queries at a time: the map is never held whole. The products are exact."""
    T, B, H, _, L = queries.shape
    d_h, past = values.shape[-1], num_keys - L
    V = torch.tensor(threshold, dtype=torch.float32, device=queries.device)
    k = unpack_channels(keys[..., :num_keys], d_h).permute(0, 1, 3, 4, 2).float()  # [T, B, H, d_h, S]
    v = unpack_tokens(values, num_keys).transpose(2, 3).float()  # [T, B, H, S, d_h]
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        for rows in _chunks(L, max(1, _MAP_ELEMENTS // (T * B * H * num_keys))):
            seen = past + rows.stop
            q = unpack_channels(queries[..., rows], d_h).transpose(2, 3).float()  # [T, B, H, rows, d_h]
            causal = torch.ones(len(q[0, 0, 0]), seen, device=q.device).tril(past + rows.start)
            counts = (q @ k[..., :seen]) * causal
            spikes, _ = reference.multi_step(counts, torch.zeros_like(counts[0]), V, dynamics)
            out[:, :, rows] = (spikes @ v[..., :seen, :]).transpose(2, 3).to(out.dtype)
            fired[:, :, rows] = spikes.sum(-1).transpose(2, 3).to(fired.dtype)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


@lru_cache(maxsize=256)
def _dynamics(beta: float) -> Dynamics:
    """The surrogate is never asked for anything here."""
    return Dynamics("binary", surrogate.ATan(alpha=2.0), decay=beta, reset="soft_delayed")


def _words_for(count: int) -> int:
    return -(-count // _BITS)


def _words(bits: torch.Tensor, axis: int) -> torch.Tensor:
    """Booleans, 32 along ``axis``, as int32 without it."""
    weights = (1 << _places(bits.device)).view(-1, *[1] * (bits.dim() - 1 - axis))
    return (bits * weights).sum(axis, dtype=torch.int32)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(_BITS, dtype=torch.int32, device=device)


# ---- the choice of a backend


@cache
def _refused(backend: str, kernel: str, T: int, channels: int, dtype: torch.dtype) -> str | None:
    """Why this specialisation cannot run; builds it if need be. On CUDA that is at the first launch."""
    if backend != "cpu":
        return unavailable(backend)
    try:
        cpu.build(kernel, T, channels, dtype)
    except SpikelmError as error:
        return str(error)
    return None


def _attend_on(backend: str) -> Callable[..., None]:
    if backend == "cpu":
        return cpu.attend
    from spikelm.cuda import attention as cuda  # which launches through CuPy

    return cuda.attend


def _packs_in_kernel(spikes: torch.Tensor) -> bool:
    """Whether there is a kernel: on a CPU. Elsewhere torch packs."""
    return spikes.is_cpu and choose(spikes, "auto", lambda _: cpu.refused_packing(spikes.dtype)) == "cpu"


# ---- wrong input


def _check_spikes(spikes: torch.Tensor) -> None:
    if spikes.dim() != 5 or spikes.shape[-1] < 1:
        raise SpikelmError(f"spikes must be [T, B, tokens, H, d_h] with d_h >= 1; got shape {tuple(spikes.shape)}")
    if spikes.is_complex() or spikes.layout != torch.strided:
        raise SpikelmError(f"spikes must be real and dense (torch.strided); got {spikes.dtype}, {spikes.layout}")


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_keys: int,
    threshold: float,
    beta: float,
    dtype: torch.dtype,
) -> None:
    """The kernels take all this on trust."""
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.dtype != torch.int32 or tensor.dim() != 5 or tensor.device != queries.device:
            raise SpikelmError(
                f"{name} must be int32 words of five axes on {queries.device}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    *outer, words, L = queries.shape
    d_h = values.shape[-1]
    if keys.shape[:4] != queries.shape[:4] or list(values.shape[:3]) != outer:
        raise SpikelmError(
            "queries [T, B, H, W, L], keys [T, B, H, W, tokens] and values [T, B, H, words, d_h] must agree in "
            f"T, B, H and W; got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if d_h < 1 or words != _words_for(d_h):
        raise SpikelmError(f"queries and keys of d_h = {d_h} channels have W = ceil(d_h / 32) words; got {words}")
    most = min(keys.shape[-1], _BITS * values.shape[-2])
    if not (isinstance(num_keys, int) and L <= num_keys <= most):
        raise SpikelmError(f"num_keys must be an integer within {L}..{most}, for L = {L} queries; got {num_keys!r}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= threshold <= limits.max:
        raise SpikelmError(f"threshold must be within [{limits.tiny:.4g}, {limits.max:.4g}]; got {threshold!r}")
    if not 0 < beta <= 1:
        raise SpikelmError(f"beta must be within (0, 1]; got {beta!r}")
    if dtype not in _DTYPES:
        raise SpikelmError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16; got {dtype}")
