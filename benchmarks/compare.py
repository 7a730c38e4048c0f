"""Measures the neurons against SpikingJelly's, snnTorch's, torch.compile and a copy of the same bytes.

    python benchmarks/compare.py --output benchmarks/results/cpu.json     # about ten minutes; --device cuda on a GPU
    python benchmarks/tables.py                                           # docs/benchmarks.md and its picture from it

All contenders run interleaved in one process, with the same allocator settings, each in the way its library offers.
Whoever does not compute what the definition computes (spikelm/ops/reference.py) gets no speed-up: the row has its time
and by how much it is off. If that is ours, nothing is written. --quick is a smoke run of seconds on small tensors.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for all contenders; torch reads it once

import contenders as field  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
from contenders import ALL_OURS, COMPILED, INT8, NEURONS, OP, OURS, SPIKINGJELLY  # noqa: E402
from tqdm import tqdm  # noqa: E402

from spikelm.errors import SpikelmError  # noqa: E402
from spikelm.files import write_json  # noqa: E402
from spikelm.neurons import ATMN  # noqa: E402
from spikelm.run import command_line  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = {"forward": False, "forward + backward": True}
WIDER = {"ternary", "integer"}  # more than zeros and ones
SUM_WEIGHTS = (1.0, 0.5)


@dataclass(frozen=True)
class Plan:
    """What is measured. N are the elements of one step; ``most`` bounds T N, a fourth of it with the backward."""

    N: int
    T: int = 4
    steps: tuple[int, ...] = (1, 4, 16)
    sizes: tuple[int, ...] = (2**10, 2**14, 2**17, 2**20, 2**22, 2**24)
    most: int = 2**26
    shapes_of: tuple[str, ...] = ("LIF, hard reset", "ternary")
    types_of: tuple[str, ...] = ("LIF, hard reset", "ternary", "integer")
    types: tuple[str, ...] = ("float32", "bfloat16", "float16")
    sum_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    dispatch_N: int = 256
    memory_of: tuple[str, ...] = tuple(NEURONS)
    memory_T: int = 16
    memory_N: int = 2**20
    seconds: float = 6.0  # for each direction of a neuron at N; a third of it for the other groups
    most_rounds: int = 201


PLANS = {
    "cpu": Plan(N=2**20),
    "cuda": Plan(N=2**24, most=2**28, memory_N=2**22),
    "quick": Plan(
        N=2**12, steps=(1, 4), sizes=(2**10, 2**12), shapes_of=("ternary",), types_of=("ternary",), types=("bfloat16",),
        sum_steps=(1, 4), memory_of=("ternary",), memory_N=2**19, seconds=0.0, most_rounds=5,
    ),
}  # fmt: skip


class Comparison:
    """The rows of one run: each is one contender in one group that was measured together."""

    def __init__(self, plan: Plan, device: str, with_compile: bool) -> None:
        self.plan, self.device, self.with_compile = plan, device, with_compile
        self.rows: list[dict[str, Any]] = []
        self.compile_seconds: list[dict[str, Any]] = []

    def groups(self) -> list[tuple[str, Callable[[], None]]]:
        """(what the progress bar says, what to call), in order."""
        plan = self.plan
        found: list[tuple[str, Callable[[], None]]] = []

        def add(section: str, kind: str, T: int, N: int, dtype: str, direction: str, **options: Any) -> None:
            def run() -> None:
                self.group(section, kind, T, N, dtype, direction, **options)

            found.append((f"{section}, {kind}", run))

        for kind in NEURONS:
            for direction in DIRECTIONS:
                add(
                    "neurons", kind, plan.T, plan.N, "float32", direction,
                    with_compile=self.with_compile, seconds=plan.seconds,
                )  # fmt: skip
        for kind in plan.types_of:
            for dtype in plan.types:
                for direction in DIRECTIONS:
                    add("types", kind, plan.T, plan.N, dtype, direction, int8=True)
        for kind in plan.shapes_of:
            for T in plan.steps:
                for N in plan.sizes:
                    for direction in DIRECTIONS:
                        if T * N <= (plan.most // 4 if DIRECTIONS[direction] else plan.most):
                            add("shapes", kind, T, N, "float32", direction)
        for kind in plan.shapes_of:
            for direction in DIRECTIONS:
                add("dispatch", kind, plan.T, plan.dispatch_N, "float32", direction, block=25)
        found.append(("weighted sums", self.sums))
        return found

    def warm_up(self) -> None:
        """The first group, unrecorded: while it runs the heap grows to what all later ones find there."""
        kind = next(iter(NEURONS))
        self.group("warm up", kind, self.plan.T, self.plan.N, "float32", "forward + backward")
        self.rows.clear()

    def group(
        self,
        section: str,
        kind: str,
        T: int,
        N: int,
        dtype: str,
        direction: str,
        *,
        int8: bool = False,
        with_compile: bool = False,
        seconds: float | None = None,
        block: int = 1,
    ) -> None:
        """Checks and times everyone on one input, and adds their rows."""
        neuron, backward = NEURONS[kind], DIRECTIONS[direction]
        x = field.inputs(T, N, DTYPES[dtype], self.device, neuron.non_negative)
        gradient = field.inputs(T, N, DTYPES[dtype], self.device) if backward else None
        expected = field.outcome(field.ours(neuron, "torch"), x, gradient)
        where = {"section": section, "neuron": kind, "direction": direction, "T": T, "N": N, "dtype": dtype}
        everyone, differences = [], {}
        for one in field.field_of(neuron, self.device, backward=backward, int8=int8, compile=with_compile):
            begin = time.perf_counter()
            differences[one.name] = field.difference(field.outcome(one, x, gradient), expected)
            if one.name == COMPILED:
                spent = round(time.perf_counter() - begin, 2)
                self.compile_seconds.append({"neuron": kind, "direction": direction, "seconds": spent})
            everyone.append(one)
        del expected
        refuse_ours_if_wrong(where, differences, x.dtype)
        calls = {one.name: (one.prepare, field.call_of(one, x, gradient)) for one in everyone}
        bytes_of = {one.name: measure.least_bytes(x.dtype, one.spikes or x.dtype, backward) for one in everyone}
        with torch.set_grad_enabled(backward):
            timings = self.time(calls, x, self.plan.seconds / 3 if seconds is None else seconds, block)
        self.rows += measure.rows(where, timings, bytes_of, differences, x)

    def time(
        self, calls: dict[str, measure.Call], x: torch.Tensor, seconds: float, block: int = 1
    ) -> dict[str, measure.Timing]:
        """The timings of calls, a copy and a read of x."""
        target, words = torch.empty_like(x), x.flatten().view(torch.float32)
        floors = {"copy": (_nothing, lambda: target.copy_(x)), "read": (_nothing, words.sum)}
        return measure.interleave(
            {**calls, **floors}, self.device,
            seconds=seconds, most=self.plan.most_rounds, block=block, host=block > 1,
        )  # fmt: skip

    def sums(self) -> None:
        """The weighted sum of ATMN's T frames: every T and both codes in one group, float32, and bfloat16 to int8."""
        for dtype, spikes in (("float32", None), ("bfloat16", torch.int8)):
            x = field.inputs(1, self.plan.N, DTYPES[dtype], self.device)[0]
            where = {"section": "sums", "direction": "forward", "N": self.plan.N, "dtype": dtype}
            calls, differences, bytes_of, what = {}, {}, {}, {}
            for weight in SUM_WEIGHTS:
                for T in self.plan.sum_steps:
                    if spikes == torch.int8 and weight != 1 and T > 7:
                        continue  # int8 holds the integers of seven binary digits
                    neuron = ATMN(tau=weight, T=T, frame_weight=weight, learn_threshold=False)
                    call = partial(neuron.encode_sum, x, spikes)
                    name = f"frame weight {weight:g}, T = {T}"
                    found, neuron.backend = call(), "torch"
                    differences[name] = field.difference((found, None), (call(), None))
                    neuron.backend = "auto"
                    calls[name], what[name] = (_nothing, call), {"frame_weight": weight, "T": T}
                    bytes_of[name] = x.itemsize + (spikes or x.dtype).itemsize
            refuse_ours_if_wrong(where, differences, x.dtype, set(calls))
            timings = self.time(calls, x, self.plan.seconds)
            found = measure.rows(where, timings, bytes_of, differences, x)
            self.rows += [row | what.get(row["contender"], {}) for row in found]

    def saved(self) -> list[dict[str, Any]]:
        """Bytes per element-step held for the backward, float32 and bfloat16."""
        found = []
        for kind, neuron in NEURONS.items():
            for dtype in ("float32", "bfloat16"):
                x = field.inputs(self.plan.T, 2**14, DTYPES[dtype], self.device, neuron.non_negative)
                for one in field.field_of(neuron, self.device, backward=True):
                    saved = measure.saved_bytes(one, x)
                    per_step = {"per_element_step": sum(saved.values()) / x.numel()}
                    found.append({"neuron": kind, "contender": one.name, "dtype": dtype, **saved, **per_step})
        return found

    def memory(self) -> list[dict[str, Any]]:
        """Peak memory of forward + backward, float32."""
        plan = self.plan
        who = [
            (kind, one.name)
            for kind in plan.memory_of
            for one in field.field_of(NEURONS[kind], self.device, backward=True)
            if one.name != OP
        ]
        return measure.peak_memory(who, plan.memory_T, plan.memory_N, self.device)


def _nothing() -> None:
    pass


def refuse_ours_if_wrong(
    where: dict[str, Any],
    differences: dict[str, tuple[float, float]],
    dtype: torch.dtype,
    ours: set[str] | None = None,
) -> None:
    """Raises SpikelmError where ours is not the definition: nothing is worth timing then."""
    for name in ours or set(ALL_OURS) & set(differences):
        if not field.is_equal(differences[name], dtype):
            share, gradient = differences[name]
            raise SpikelmError(
                f"{name} does not compute what spikelm/ops/reference.py does ({where}): {share:.2%} of the spikes "
                f"differ, the gradient by {gradient:.2g} of its norm. Nothing is written"
            )


def must_show(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the kernels are to show, each line with the worst of the figures that it is about.

    None where nothing was measured, or a peer computed something else: a line is not met by leaving a neuron out.
    """
    lines: list[dict[str, Any]] = []

    def add(line: str, sign: str, aim: float, figures: dict[str, float | None]) -> None:
        known = [figure for figure in figures.values() if figure is not None]
        worst = (max if sign == "<=" else min)(known) if known and len(known) == len(figures) else None
        met = None if worst is None or result["quick"] else worst <= aim if sign == "<=" else worst >= aim
        lines.append({"line": line, "aim": f"{sign} {aim:g}", "measured": worst, "met": met, "each": figures})

    def rows(section: str, who: str, direction: str, dtype: str = "float32") -> list[dict[str, Any]]:
        wanted = {"section": section, "contender": who, "direction": direction, "dtype": dtype}
        return [row for row in result["rows"] if wanted.items() <= row.items()]

    def floors(section: str, who: str, direction: str, dtype: str = "float32") -> dict[str, float]:
        return {row["neuron"]: row["to_floor"] for row in rows(section, who, direction, dtype)}

    def faster(section: str, who: str, direction: str, than: str, dtype: str = "float32") -> dict[str, float | None]:
        took_part = {row["neuron"] for row in rows(section, than, direction, dtype)}
        found = rows(section, who, direction, dtype)
        return {row["neuron"]: row["times_faster"].get(than) for row in found if row["neuron"] in took_part}

    if result["device"] == "cpu":
        for direction, floor, binary, wider in (("forward", 1.15, 8, 10), ("forward + backward", 1.35, 6, 8)):
            for who in (OP, OURS):
                add(f"{direction}, {who}: time in byte floors", "<=", floor, floors("neurons", who, direction))
            speeds = faster("neurons", OURS, direction, SPIKINGJELLY)
            for name, aim, among in (
                ("binary", binary, set(speeds) - WIDER),
                ("ternary and integer", wider, set(speeds) & WIDER),
            ):
                chosen = {neuron: speeds[neuron] for neuron in speeds if neuron in among}
                add(f"{direction}, {name}: times faster than SpikingJelly", ">=", aim, chosen)
            compiled = faster("neurons", OP, direction, COMPILED)
            share = {neuron: speed and round(1 / speed, 4) for neuron, speed in compiled.items()}
            add(f"{direction}, {OP}: time in those of torch.compile", "<=", 1.05, share)
            name = f"one call of {result['dispatch_N']} neurons, {direction}"
            for who in (OP, OURS):
                times = {row["neuron"]: row["us"] for row in rows("dispatch", who, direction)}
                add(f"{name}, {who}: us", "<=", 45 if DIRECTIONS[direction] else 12, times)
        speeds = faster("types", INT8, "forward", SPIKINGJELLY, "bfloat16")
        add("forward, bfloat16 to int8: times faster than SpikingJelly in bfloat16", ">=", 14, speeds)
    else:
        for dtype, aim in (("float32", 1.5), ("bfloat16", 5)):
            for direction in DIRECTIONS:
                share = {kind: round(100 / floor, 2) for kind, floor in floors("types", OP, direction, dtype).items()}
                add(f"{direction}, {dtype}, {OP}: percent of the copy's bandwidth", ">=", 85, share)
                speeds = faster("types", OURS, direction, SPIKINGJELLY, dtype)
                add(f"{direction}, {dtype}: times faster than SpikingJelly", ">=", aim, speeds)
    spread = {}
    for weight in SUM_WEIGHTS:
        sums = [row for row in result["rows"] if (row["section"], row.get("frame_weight")) == ("sums", weight)]
        for dtype in {row["dtype"]: None for row in sums}:
            times = [row["us"] for row in sums if row["dtype"] == dtype]
            spread[f"frame weight {weight:g}, {dtype}"] = round(max(times) / min(times) - 1, 4)
    for dtype in sorted({name.rpartition(" ")[2] for name in spread}, reverse=True):
        of_type = {name: share for name, share in spread.items() if name.endswith(dtype)}
        add(f"weighted sum, {dtype}: slowest T above the fastest, as a share", "<=", 0.15, of_type)
    ours = [row for row in result["saved"] if row["contender"] == OURS]
    besides = {f"{row['neuron']}, {row['dtype']}": row["besides"] - 4 for row in ours}
    add("saved for backward besides x and the threshold: bytes", "<=", 0, besides)
    peaks = {(row["neuron"], row["contender"]): row["peak"] for row in result["memory"]}
    share = {kind: round(peaks[kind, OURS] / peak, 4) for (kind, who), peak in peaks.items() if who == SPIKINGJELLY}
    add(f"peak memory of forward + backward, T = {result['memory_T']}: share of SpikingJelly's", "<=", 0.5, share)
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file to write; without it the lines are only printed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small tensors, few calls: figures without meaning")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, minutes less")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SpikelmError("--device cuda: torch sees no CUDA device")
    gc.collect()
    gc.freeze()  # what the imports made is never looked at again: collections between groups are short
    begin = time.perf_counter()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        "commit": measure.commit(ROOT),
        "device": arguments.device,
        "versions": measure.machine(),
        "environment": {"THP_MEM_ALLOC_ENABLE": "1", "malloc": measure.reuse_memory()},
        "quick": arguments.quick,
    }
    plan = PLANS["quick" if arguments.quick else arguments.device]
    result |= {"N": plan.N, "T": plan.T, "dispatch_N": plan.dispatch_N, "memory_T": plan.memory_T}
    comparison = Comparison(plan, arguments.device, with_compile=not arguments.no_compile)
    result["memory"] = comparison.memory()
    with tempfile.TemporaryDirectory() as empty, tqdm(comparison.groups(), file=sys.stderr) as progress:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # else compile times are those of an earlier run
        if not arguments.quick:
            comparison.warm_up()
        for name, run in progress:
            progress.set_description(name)
            run()
    result |= {"saved": comparison.saved(), "compile": comparison.compile_seconds, "rows": comparison.rows}
    result["must_show"] = must_show(result)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    for line in result["must_show"]:
        met = {True: "met", False: "NOT MET", None: "not judged"}[line["met"]]
        print(f"{line['line']}: {line['measured']} (aim {line['aim']}): {met}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        print(write_json(arguments.output, result))


if __name__ == "__main__":
    command_line(main)
