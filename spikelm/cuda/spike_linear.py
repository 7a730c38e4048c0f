"""Runs the CUDA kernels of projections behind neurons: the list of active channels, sums over parts of it, theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from spikelm.cpu.module import storage
from spikelm.cpu.spike_linear import definitions, pack
from spikelm.cuda import module
from spikelm.cuda.module import Launch
from spikelm.ops.kernel import Kernel

if TYPE_CHECKING:
    from spikelm.ops.spike_linear import Encoder, SpikeWeights

SOURCE = "spike_linear.cuh"
_WARP = 32
_MOST_FINDING = 1024  # threads that list the active channels
_GATHERING = 256  # threads of a block; what spike_linear.cuh calls WARPS warps
_FINISHING = 256
_ENOUGH_BLOCKS = 512  # of gather, which fill a GPU
_FEWEST_CHANNELS = 256  # active or not, of a part; partial sums of fewer cost more memory traffic than rows do
_MOST_BYTES = 16  # that a thread loads at once
_MOST_CODE_BYTES = 4  # of packed codes: the sums of a thread's outputs are to fit into registers
_HEADER = 8  # words before the lists: the count and the totals


class Plan(NamedTuple):
    """What is built and launched for one shape; ``words`` of 4 bytes are its scratch memory."""

    definitions: str
    launches: tuple[Launch, ...]
    parts: int
    words: int


def project(
    kernel: Kernel,
    encoder: Encoder,
    x: torch.Tensor,
    weights: Sequence[SpikeWeights],
    y: Sequence[torch.Tensor],
    most: int,
) -> int:
    """Fills y on torch's current stream; nothing waits for it. x and y are dense.

    A graph may capture it: how many channels are active stays on the device. So ``most`` is not looked at, and 0 is
    returned whatever their number: it is not known here.
    """
    first, channels = weights[0], x.shape[-1]
    tokens = x.numel() // channels
    text = definitions(kernel.definitions, encoder.spiking, first.rows.dtype, first.form) + storage(x.dtype, x.dtype)
    loaded = min(_bytes_loaded(one, tokens) for one in weights)
    sizes = tuple(one.outputs for one in weights)
    if not any(sizes):
        return 0
    found = plan(text, first.form, tokens, channels, sizes, loaded, loaded // first.rows.element_size())
    scratch = torch.empty(found.words, dtype=torch.int32, device=x.device)
    start = scratch.data_ptr()
    arguments = pack(kernel, encoder, x, weights, y, most, start, start, found.parts)
    module.launch(found.definitions, found.launches, arguments, x.device, SOURCE)
    return 0


@lru_cache(maxsize=256)
def plan(
    text: str, form: str, tokens: int, channels: int, outputs: tuple[int, ...], loaded: int, elements: int
) -> Plan:
    """How projections of so many ``outputs`` run; a thread loads ``loaded`` bytes of a row, which are ``elements``."""
    codes = {"binary": 8, "ternary": 4}.get(form, 1)
    tile = _WARP * elements * codes
    tiles = sum(math.ceil(size / tile) for size in outputs)
    parts = max(1, min(_ENOUGH_BLOCKS // tiles, channels // _FEWEST_CHANNELS))
    results = tokens * tiles * tile
    finding = min(_MOST_FINDING, math.ceil(channels / _WARP) * _WARP)
    launches = (
        Launch("find_active", 1, finding),
        Launch("gather", tiles * parts, _GATHERING),
        Launch("finish", math.ceil(results / _FINISHING), _FINISHING),
    )
    words = _HEADER + channels * (2 * tokens + 1) + parts * results
    return Plan(f"{text}#define TOKENS {tokens}\n#define BYTES {loaded}\n", launches, parts, words)


def _bytes_loaded(weights: SpikeWeights, tokens: int) -> int:
    """Bytes of a row that a thread loads at once: rows' addresses and, of numbers, lengths are multiples of them."""
    rows = weights.rows
    size = rows.element_size()
    multiple = rows.data_ptr() | rows.stride(0) * size
    if weights.form in ("binary", "ternary"):
        most = _MOST_CODE_BYTES // 2 if weights.form == "binary" and tokens > 2 else _MOST_CODE_BYTES
    else:
        most, multiple = _MOST_BYTES, multiple | weights.outputs * size
    return min(most, multiple & -multiple)


def build(kernel: str, spiking: bool, io: torch.dtype, weights: torch.dtype, form: str) -> None:
    """Compiles the specialisation for one token; that for more is compiled at the first launch with them.

    Raises:
        SpikelmError: NVRTC failed, with its log.
    """
    text = definitions(kernel, spiking, weights, form) + storage(io, io)
    most = _MOST_CODE_BYTES if form in ("binary", "ternary") else _MOST_BYTES
    major, minor = torch.cuda.get_device_capability()
    module.build(f"{text}#define TOKENS 1\n#define BYTES {most}\n", f"sm_{major}{minor}", SOURCE)
