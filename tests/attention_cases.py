"""Cases for spiking attention, and what it must compute: as matrix products of float spikes around BinaryIF."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from spikelm.neurons import BinaryIF
from spikelm.ops.spiking_attention import pack_channels, pack_tokens, spiking_attention


@dataclass(frozen=True)
class Case:
    """One call; ``rate`` is the share of ones. num_keys None: as many as there are queries."""

    T: int = 4
    B: int = 1
    L: int = 33
    num_keys: int | None = None
    H: int = 2
    d_h: int = 64
    threshold: float = 1.0
    beta: float = 0.9
    rate: float = 0.2
    dtype: torch.dtype = torch.float32

    @property
    def S(self) -> int:
        return self.num_keys or self.L


class Spikes(NamedTuple):
    """Float32 [T, B, tokens, H, d_h] in {0, 1}; as many keys and values as Case.S."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def name_of(case: Case) -> str:
    return "-".join(f"{name}={value}" for name, value in vars(case).items() if value != getattr(Case, name))


def draw(case: Case) -> Spikes:
    """The spikes of a case, the same at every call."""
    generator = torch.Generator().manual_seed(case.L + 7 * case.S + 31 * case.d_h)
    sizes = [(case.T, case.B, tokens, case.H, case.d_h) for tokens in (case.L, case.S, case.S)]
    return Spikes(*((torch.rand(size, generator=generator) < case.rate).float() for size in sizes))


def dense(case: Case, spikes: Spikes, mask_again: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums and the map [T, B, H, L, S] in float; the map times ``mask_again``, if there is one."""
    queries, keys, values = (tensor.transpose(2, 3) for tensor in spikes)
    counts = (queries @ keys.transpose(-1, -2)).tril(case.S - case.L)
    neuron = BinaryIF(
        beta=case.beta, v_threshold=case.threshold, reset_delay=True, step_mode="m", backend="torch"
    )  # fmt: skip
    fired = neuron(counts)
    if mask_again is not None:
        fired = fired * mask_again
    return (fired @ values).transpose(2, 3), fired


def in_cache(packed: torch.Tensor, axis: int, room: int = 3) -> torch.Tensor:
    """A view of what is packed, as part of a larger cache: two more heads, ``room`` more places along ``axis``, and
    every bit outside of it set."""
    shape = list(packed.shape)
    shape[2] += 2
    shape[axis] += room
    cache = torch.full(shape, -1, dtype=torch.int32, device=packed.device)
    view = cache[:, :, 1:-1]
    view.narrow(axis, 0, packed.shape[axis]).copy_(packed)
    return view


def run(case: Case, spikes: Spikes, backend: str = "auto", device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over caches that are larger than what is in them and poisoned beyond; results on the CPU."""
    queries, keys, values = (tensor.to(device) for tensor in spikes)
    values_packed = in_cache(pack_tokens(values), 3, 2)
    beyond = -(1 << case.S % 32) if case.S % 32 else 0  # bits of the last word that are no tokens
    values_packed[:, :, :, (case.S - 1) // 32] |= beyond
    out, fired = spiking_attention(
        pack_channels(queries), in_cache(pack_channels(keys), 4), values_packed,
        num_keys=case.S, threshold=case.threshold, beta=case.beta, dtype=case.dtype, backend=backend,
    )  # fmt: skip
    return out.cpu(), fired.cpu()


def check(case: Case, backend: str = "auto", device: str = "cpu") -> None:
    """Every sum and every count of the map's entries, exactly."""
    spikes = draw(case)
    (out, fired), (expected, entries) = run(case, spikes, backend, device), dense(case, spikes)
    assert out.dtype == case.dtype
    assert fired.dtype == torch.int32
    assert torch.equal(out, expected.to(case.dtype)), f"{(out != expected).float().mean():.2%} of the sums differ"
    assert torch.equal(fired, entries.sum(-1).transpose(2, 3).int()), "counts of the map differ"
