"""Measures spiking attention on bits against the same in matrix products, and against dense softmax attention.

    python benchmarks/attention.py --output benchmarks/results/attention.json     # about two minutes on a CPU

One layer's attention of a 125M model: 12 heads of 64 channels, T = 4, random spikes. All contenders of a group run
interleaved in one process, with the same number of threads. Before anything is timed, ours has to equal the products of
float spikes around BinaryIF in every sum and every count of the map; else nothing is written. Another contender that
does not equal them has its time and no ratio: dense softmax attention, which computes something else once, not for T
steps; and bfloat16, if its sums are not the exact ones rounded once (its counts within the map are below 256: exact).
--quick is a smoke run of seconds on small tensors.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for all contenders; torch reads it once

import measure  # noqa: E402
import torch  # noqa: E402
from spikingjelly.activation_based import surrogate  # noqa: E402
from torch.nn.functional import pad, scaled_dot_product_attention  # noqa: E402
from tqdm import tqdm  # noqa: E402

from spikelm.errors import SpikelmError  # noqa: E402
from spikelm.files import write_json  # noqa: E402
from spikelm.ops.dynamics import Dynamics  # noqa: E402
from spikelm.ops.multistep import multi_step  # noqa: E402
from spikelm.ops.spiking_attention import pack_channels, pack_tokens, spiking_attention  # noqa: E402
from spikelm.run import command_line  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OURS, PACKED = ALL_OURS = "spikelm, with packing", "spikelm"
FLOAT32, BLOCKS = IN_FLOAT32 = "matrix products, float32", "matrix products in causal blocks, float32"
BFLOAT16, SOFTMAX = "matrix products in causal blocks, bfloat16", "dense softmax, float32, once"
ROWS = {BLOCKS: 128, BFLOAT16: 512}  # queries of a block: the best of 64, 128, 256 and 512
THRESHOLD, BETA, RATE = 1.0, 0.9, 0.2
DYNAMICS = Dynamics("binary", surrogate.ATan(alpha=2.0), decay=BETA, reset="soft_delayed")
AIM = 4  # times faster than the products in float32


@dataclass(frozen=True)
class Plan:
    """What is measured: whole sequences of ``lengths`` tokens, and one token behind num_keys - 1 others."""

    lengths: tuple[int, ...] = (512, 2048)
    num_keys: int = 2048
    T: int = 4
    B: int = 1
    H: int = 12
    d_h: int = 64
    seconds: float = 12.0  # for each group
    most_rounds: int = 101


PLANS = {"full": Plan(), "quick": Plan(lengths=(33, 64), num_keys=40, H=2, seconds=0.0, most_rounds=5)}


class Attention:
    """Spikes of L queries and S keys and values, and everyone's call on them."""

    def __init__(self, plan: Plan, L: int, S: int) -> None:
        generator = torch.Generator().manual_seed(L + S)
        self.plan, self.L, self.S = plan, L, S
        self.queries, self.keys, self.values = (
            (torch.rand(plan.T, plan.B, tokens, plan.H, plan.d_h, generator=generator) < RATE).float()
            for tokens in (L, S, S)
        )
        self.packed = pack_channels(self.queries), pack_channels(self.keys), pack_tokens(self.values)

    def calls(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Everyone's output; only what is new is packed: all of a sequence, or one token."""
        sixteen = [tensor.bfloat16() for tensor in self.by_heads()]
        thirty_two = [tensor.contiguous() for tensor in self.by_heads()]
        once = [tensor[0] for tensor in thirty_two]
        whole = self.L == self.S
        return {
            OURS: lambda: self.ours(*self.pack())[0],
            PACKED: lambda: self.ours(*self.packed)[0],
            FLOAT32: lambda: self.products(*thirty_two, rows=self.L),
            BLOCKS: lambda: self.products(*thirty_two, rows=ROWS[BLOCKS]),
            BFLOAT16: lambda: self.products(*sixteen, rows=ROWS[BFLOAT16]),
            SOFTMAX: lambda: scaled_dot_product_attention(*once, is_causal=whole),
        }

    def pack(self) -> tuple[torch.Tensor, ...]:
        new = slice(self.S - self.L, self.S)
        queries, keys, values = pack_channels(self.queries), pack_channels(self.keys[:, :, new]), self.values[:, :, new]
        if self.L == self.S:
            return queries, keys, pack_tokens(values)
        self.packed[1][..., new] = keys  # as a cache does
        self.packed[2][:, :, :, new.start // 32 :] |= pack_tokens(values, new.start % 32)
        return queries, *self.packed[1:]

    def ours(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return spiking_attention(queries, keys, values, num_keys=self.S, threshold=THRESHOLD, beta=BETA)

    def by_heads(self) -> list[torch.Tensor]:
        """Queries, keys and values [T, B, H, tokens, d_h]."""
        return [tensor.transpose(2, 3) for tensor in (self.queries, self.keys, self.values)]

    def products(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, rows: int, backend: str = "auto"
    ) -> torch.Tensor:
        """Counts, causal mask, our fused neuron, sums: ``rows`` queries of a head at a time and the keys that they see,
        so that a map has room; all heads at once for a single query."""
        step, threshold = 1 if self.L > 1 else self.plan.H, torch.tensor(THRESHOLD)
        out = queries.new_empty((*queries.shape[:-1], values.shape[-1]))
        for h in range(0, self.plan.H, step):
            for i in range(0, self.L, rows):
                block = (slice(None), slice(None), slice(h, h + step), slice(i, i + rows))
                seen = (*block[:3], slice(self.S - self.L + min(i + rows, self.L)))
                counts = queries[block] @ keys[seen].transpose(-1, -2)
                if self.L > 1:
                    counts.tril_(self.S - self.L + i)
                fired, _ = multi_step(counts, None, threshold, DYNAMICS, keep_state=False, backend=backend)
                out[block] = fired @ values[seen]
        return out.transpose(2, 3)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, and how many keys fired, by the definition (spikelm/ops/reference.py) in float32."""
        queries, keys, values = self.by_heads()
        ones = pad(values, (0, 1), value=1)  # one more channel, which counts the map's entries
        both = self.products(queries, keys, ones, rows=self.L, backend="torch")
        return both[..., :-1], both[..., -1].int()

    def least_bytes(self) -> int:
        """What anyone moves: the bits of queries, keys and values in, float32 sums out."""
        return sum(tensor.nbytes for tensor in self.packed) + self.queries.nbytes


def group(plan: Plan, phase: str, L: int, S: int, threads: int) -> list[dict[str, Any]]:
    """Checks and times everyone on one input: a row for each. Raises SpikelmError where ours is wrong."""
    attention = Attention(plan, L, S)
    where = {"phase": phase, "L": L, "num_keys": S, "T": plan.T, "B": plan.B, "H": plan.H, "d_h": plan.d_h}
    calls, (expected, fired) = attention.calls(), attention.expected()
    equal = {name: torch.equal(call(), expected.to(call().dtype)) for name, call in calls.items() if name != SOFTMAX}
    equal[PACKED] = equal[PACKED] and torch.equal(attention.ours(*attention.packed)[1], fired)
    for name in ALL_OURS:
        if not equal[name]:
            raise SpikelmError(f"{name} does not equal products of float spikes around BinaryIF ({where})")
    source = torch.empty(1 << 24)
    target = torch.empty_like(source)
    timings = measure.interleave(
        {name: (_nothing, call) for name, call in (calls | {"copy": lambda: target.copy_(source)}).items()},
        "cpu", seconds=plan.seconds, most=plan.most_rounds,
    )  # fmt: skip
    floor = timings.pop("copy").median / (2 * source.nbytes) * attention.least_bytes()
    seen = torch.arange(S - L + 1, S + 1).view(-1, 1)
    found = []
    for name, timing in timings.items():
        row = {**where, "threads": threads, "contender": name, "calls": timing.calls, "us": 1e6 * timing.median}
        row |= {"quartiles_us": [1e6 * timing.low, 1e6 * timing.high], "equal": equal.get(name, False)}
        if name in ALL_OURS:
            others = [other for other in (*IN_FLOAT32, BFLOAT16) if equal[other]]
            row["times_faster"] = {other: timings[other].median / timing.median for other in others}
            row |= {"to_floor": timing.median / floor, "in_those_of_softmax": timing.median / timings[SOFTMAX].median}
            row["density_of_the_map"] = float((fired / seen).mean())
        found.append({key: measure.rounded(value) for key, value in row.items()})
    return found


def _nothing() -> None:
    pass


def must_show(rows: list[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """The line to meet, for every length and number of threads; None where the products computed something else."""
    lines = []
    for row in rows:
        if row["contender"] == OURS:
            speeds = {name: row["times_faster"].get(name) for name in IN_FLOAT32}
            slowest = None if None in speeds.values() else min(speeds.values())
            met = None if quick or slowest is None else slowest >= AIM
            line = f"{row['phase']}, {row['num_keys']} keys, {row['threads']} threads: times faster than float32"
            lines.append({"line": line, "aim": f">= {AIM}", "measured": slowest, "met": met, "each": speeds})
    return lines


def cache_bits(plan: Plan) -> dict[str, float]:
    """Bits of memory for each element of cached keys and values."""
    attention = Attention(plan, 1, plan.num_keys)
    kept = sum(tensor.nbytes for tensor in attention.packed[1:])
    return {"spikelm": 8 * kept / (attention.keys.numel() + attention.values.numel()), "bfloat16": 16}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file to write; without it the lines are only printed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="small tensors, few calls: figures without meaning")
    arguments = parser.parse_args()
    plan = PLANS["quick" if arguments.quick else "full"]
    begin = time.perf_counter()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
        "commit": measure.commit(ROOT),
        "versions": measure.machine(),
        "environment": {"THP_MEM_ALLOC_ENABLE": "1", "malloc": measure.reuse_memory()},
        "quick": arguments.quick,
        "neuron": {"threshold": THRESHOLD, "beta": BETA},
        "firing_rate": RATE,
        "cache_bits_per_element": cache_bits(plan),
        "rows": [],
    }
    groups = [("a sequence", L, L) for L in plan.lengths] + [("one token", 1, plan.num_keys)]
    before = torch.get_num_threads()
    with torch.no_grad(), tqdm([(*one, n) for n in arguments.threads for one in groups], file=sys.stderr) as progress:
        for phase, L, S, threads in progress:
            progress.set_description(f"{phase}, {S} keys, {threads} threads")
            torch.set_num_threads(threads)
            result["rows"] += group(plan, phase, L, S, threads)
    torch.set_num_threads(before)
    result["must_show"] = must_show(result["rows"], arguments.quick)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    for line in result["must_show"]:
        met = {True: "met", False: "NOT MET", None: "not judged"}[line["met"]]
        print(f"{line['line']}: {line['measured']} (aim {line['aim']}): {met}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        print(write_json(arguments.output, result))


if __name__ == "__main__":
    command_line(main)
