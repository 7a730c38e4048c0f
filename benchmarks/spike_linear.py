"""Projections of sparse spikes at batch 1 against dense ones and against reading memory, weights from DRAM.

    python benchmarks/spike_linear.py --output benchmarks/results/spike_linear.json     # five minutes, AVX-512, 4 GB
    python benchmarks/tables.py                                                         # docs/inference.md from it

Copies of the weights, more than any cache holds, are used in turn. Peers: torch.mv and F.linear with weights as torch
wants them, our own kernel with every channel active (the best dense loop that we have in that layout), for 2-bit
weights a dense loop over VNNI instructions, and the floor, a read of all bytes. Every result is checked first. Medians.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from spikelm.cpu import module
from spikelm.files import write_json
from spikelm.ops.spike_linear import SpikeWeights, dense_linear, spike_linear
from spikelm.ops.weight_quantization import pack_codes
from spikelm.run import command_line, versions

SHAPES = ((5632, 2048), (11008, 4096))  # outputs, inputs
DENSITIES = (1.0, 0.3, 0.2, 0.1, 0.05)
FORMS = ("float32", "bfloat16", "int8", "ternary", "binary")
TOKENS = (1, 2, 4)
BYTES = 1 << 30  # of all copies
ROUNDS = 3


def peers() -> dict[str, Callable[..., int]]:
    """The functions of spike_linear_peers.cpp."""
    library = ctypes.CDLL(str(module.build((Path(__file__).parent / "spike_linear_peers.cpp").read_text())))
    pointer, number = ctypes.c_void_p, ctypes.c_longlong
    library.read_all.argtypes = [pointer, number, number]
    library.dense_ternary.argtypes = [pointer, pointer, pointer, number, number, number]
    return {"read_all": library.read_all, "dense_ternary": library.dense_ternary}


def draw(tokens: int, channels: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """Ternary spikes [tokens, channels], exactly that share of which is not 0 in every token."""
    spikes = torch.zeros(tokens, channels)
    for row in spikes:
        chosen = torch.randperm(channels, generator=generator)[: round(density * channels)]
        row[chosen] = torch.randint(0, 2, (len(chosen),), generator=generator).float() * 2 - 1
    return spikes


def median(call: Callable[[int], object], copies: int) -> float:
    """Seconds of call(i), i going through the copies."""
    times = []
    for i in [0, 1, *range(copies)] + [i for _ in range(ROUNDS) for i in range(copies)]:
        start = time.perf_counter()
        call(i % copies)
        times.append(time.perf_counter() - start)
    return statistics.median(times[copies:])


def make(form: str, outputs: int, inputs: int) -> tuple[torch.Tensor, SpikeWeights]:
    """A random matrix [outputs, inputs] of that form, as numbers, and as the kernel reads it."""
    if form in ("float32", "bfloat16"):
        matrix = (0.02 * torch.randn(outputs, inputs)).to(getattr(torch, form))
        return matrix, SpikeWeights.of(matrix)
    codes = torch.randint(-127, 128, (outputs, inputs)) if form == "int8" else torch.randint(-1, 2, (outputs, inputs))
    if form == "binary":
        codes = torch.randint(0, 2, (outputs, inputs)) * 2 - 1
    scale = 0.01 * torch.rand(outputs) + 0.01
    packed = pack_codes(codes.to(torch.int8), form)
    size = None if form == "int8" else outputs
    return codes.float() * scale.unsqueeze(1), SpikeWeights(packed, form, size, scale)


def copies_of(weights: SpikeWeights, count: int) -> list[SpikeWeights]:
    return [SpikeWeights(weights.rows.clone(), weights.form, weights.out_features, weights.scale) for _ in range(count)]


def dense_peers(
    form: str, matrix: torch.Tensor, weights: SpikeWeights, count: int, library: dict[str, Callable[..., int]]
) -> dict[str, float]:
    """Seconds of every dense contender of a form, and of the floor."""
    outputs, inputs = matrix.shape
    threads = torch.get_num_threads()
    found: dict[str, float] = {}
    rows = copies_of(weights, count)
    size = rows[0].rows.nbytes // 64 * 64
    found["floor"] = median(lambda i: library["read_all"](rows[i].rows.data_ptr(), size, threads), count)
    if form in ("float32", "bfloat16", "int8"):
        x = torch.randn(1, inputs).to(matrix.dtype)
        error = (dense_linear(x, weights).float() - x.float() @ matrix.float().t()).abs().max()
        assert error < 2e-2, f"the dense loop of {form} is off by {error}"
        found["our dense loop"] = median(lambda i: dense_linear(x, rows[i]), count)
    rows.clear()
    if form in ("float32", "bfloat16"):
        dense = [matrix.clone() for _ in range(count)]
        found["torch.mv"] = median(lambda i: torch.mv(dense[i], x[0]), count)
        found["F.linear"] = median(lambda i: F.linear(x, dense[i]), count)
    if form == "ternary":
        codes = (matrix / weights.scale.unsqueeze(1)).round() if weights.scale is not None else matrix
        values = (codes + 1).to(torch.uint8).view(outputs, inputs // 256, 4, 64)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
        dense = [(values << shifts).sum(2, dtype=torch.uint8).flatten(1).contiguous() for _ in range(count)]
        spikes, y = torch.randint(-1, 2, (inputs,), dtype=torch.int8), torch.empty(outputs)
        run = library["dense_ternary"]

        def call(i: int) -> int:
            return run(dense[i].data_ptr(), spikes.data_ptr(), y.data_ptr(), outputs, inputs, threads)

        call(0)
        assert torch.equal(y, codes @ spikes.float()), "the dense 2-bit loop is wrong"
        found["dense loop (VNNI)"] = median(call, count)
    return found


def gathers(
    form: str, matrix: torch.Tensor, weights: SpikeWeights, count: int, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Every number of tokens and density, checked and timed."""
    copies, rows = copies_of(weights, count), []
    for tokens, density in itertools.product(TOKENS, DENSITIES):
        plain = [draw(tokens, matrix.shape[1], density, generator) for _ in range(16)]
        spikes = [one.to(matrix.dtype) for one in plain]
        wanted = plain[0] @ matrix.float().t()
        error = ((spike_linear(spikes[0], weights).float() - wanted).abs().max() / wanted.abs().max()).item()
        assert error < (1e-2 if form == "bfloat16" else 1e-5), f"{form} is off by {error}"

        def gather(i: int, spikes: list[torch.Tensor] = spikes) -> torch.Tensor:
            return spike_linear(spikes[i % 16], copies[i])

        union = (plain[0] != 0).any(0).float().mean().item()
        row = {"contender": "gather", "tokens": tokens, "density": density, "union": union, "error": error}
        rows.append({**row, "seconds": median(gather, count)})
    return rows


def main() -> None:
    """All shapes, forms, densities and numbers of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="one small shape: a smoke run of seconds")
    options = parser.parse_args()
    shapes, most = (((512, 256),), 1 << 22) if options.quick else (SHAPES, BYTES)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    library, rows = peers(), []
    for outputs, inputs in shapes:
        for form in tqdm(FORMS, desc=f"{outputs}x{inputs}"):
            matrix, weights = make(form, outputs, inputs)
            count = min(256, max(4, most // weights.rows.nbytes))
            where = {"outputs": outputs, "inputs": inputs, "form": form, "bytes": weights.rows.nbytes}
            dense = dense_peers(form, matrix, weights, count, library)
            rows += [{**where, "contender": name, "seconds": seconds} for name, seconds in dense.items()]
            rows += [{**where, **row} for row in gathers(form, matrix, weights, count, generator)]
    result = {"rows": rows, "threads": torch.get_num_threads(), "copies_bytes": most, "versions": versions()}
    for row in rows:
        print({key: value if not isinstance(value, float) else round(value, 7) for key, value in row.items()})
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    command_line(main)
