"""What a training step keeps for its backward, and its peak memory, with spikes stored as bits and without.

    python benchmarks/training_memory.py --output benchmarks/results/training_memory.json     # minutes on one core

Random spiking models, a row for each model, neuron and type. Both arms take the same steps, each in a process of its
own: `dense` is F.linear as it is, `bits` is what SpikingLinear does (spikelm/ops/spike_storage.py). Nothing is computed
from shapes:

* kept: the storages that the autograd graph of the loss refers to behind the forward, each once, parameters aside: the
  spikes that projections keep, the inputs that neurons keep, and everything else;
* held: what torch's allocator has given out during the forward and not got back (torch's profiler). It has to be
  what is kept, else something keeps memory that the graph does not need;
* peak: what the allocator had given out at most during forward and backward, above what it had before;
* resident peak: the same as the system counts it for the process, at the first step, where the C library gives freed
  blocks back at once;
* seconds: the quickest of a few steps of both arms in turn, in a third process.

The gradients of both arms have to be equal bit for bit, else nothing is written. --quick is a smoke run of seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from spikelm import Recipe, spikify
from spikelm.errors import SpikelmError
from spikelm.files import write_json
from spikelm.layers import SpikingLinear
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.ops import spike_storage
from spikelm.run import command_line, versions

ROOT = Path(__file__).resolve().parents[1]
LLAMBA, LLAMA = "Llamba", "Llama"
ARMS = {"dense": False, "bits": True}
NEURONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ternary, T = 1": ("ATMN", {"T": 1}),
    "ternary, T = 4, counts": ("ATMN", {"T": 4}),
    "ternary, T = 4, weights 2^-t": ("ATMN", {"T": 4, "tau": 0.5, "frame_weight": 0.5}),
    "integer, D = 4": ("TILIF", {"D": 4}),
}
TERNARY = next(iter(NEURONS))
AIM = 6  # times fewer bytes of ternary spikes in bfloat16


@dataclass(frozen=True)
class Case:
    """One row: a model of this shape, its neurons, the type of all tensors, and a batch of tokens."""

    model: str = LLAMBA
    neuron: str = TERNARY
    dtype: str = "bfloat16"
    context: int = 512
    tokens: int = 2048
    width: int = 512
    layers: int = 4
    vocabulary: int = 2048
    steps: int = 5  # that are timed


FULL = [
    *(Case(neuron=neuron, dtype=dtype) for neuron in NEURONS for dtype in ("bfloat16", "float32")),
    Case(LLAMBA, context=2048),
    *(Case(LLAMA, dtype=dtype) for dtype in ("bfloat16", "float32")),
    Case(LLAMA, context=2048),
]
QUICK = [Case(model, context=32, tokens=128, width=64, layers=2, vocabulary=64, steps=1) for model in (LLAMBA, LLAMA)]


# ---- one arm, in this process


class Step:
    """A random spiking model and a batch."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.model = student(case)
        self.ids = torch.randint(0, case.vocabulary, (case.tokens // case.context, case.context))
        self.loss(self.ids[:1, :32]).backward()  # whatever is loaded and built at a first call

    def loss(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The forward; the gradients of the step before are dropped."""
        self.model.zero_grad()
        ids = self.ids if ids is None else ids
        return self.model(input_ids=ids, labels=ids).loss


def student(case: Case) -> Any:
    """The model of a case, spiking, in training mode."""
    width, heads = case.width, case.width // 64
    if case.model == LLAMBA:
        mixer = {"d_state": 64, "n_v_heads": heads, "n_qk_heads": heads, "chunk_size": 64}
        model: Any = LlambaForCausalLM(
            LlambaConfig(
                vocab_size=case.vocabulary, d_model=width, n_layer=case.layers,
                mlp_cfg={"intermediate_size": 4 * width}, ssm_cfg=mixer,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=case.vocabulary, hidden_size=width, num_hidden_layers=case.layers,
                num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=case.context,
            )
        )  # fmt: skip
    name, arguments = NEURONS[case.neuron]
    recipe = Recipe.preset("mar" if case.model == LLAMBA else "llama", neuron=name, **arguments)
    return spikify(model.to(getattr(torch, case.dtype)), recipe).train()


@contextmanager
def spikes_stored(as_bits: bool) -> Iterator[None]:
    """Within it SpikingLinear keeps its spikes as bits, or as F.linear keeps any input."""
    worth_it = spike_storage._worth_it if as_bits else lambda *arguments: False
    with mock.patch.object(spike_storage, "_worth_it", worth_it):
        yield


def measured(case: Case, arm: str) -> dict[str, Any]:
    """The figures of one arm, in this process."""
    give_back_freed_memory()
    with spikes_stored(ARMS[arm]):
        step = Step(case)
        step.model.zero_grad()
        gc.collect()
        resident = measure._resident("VmRSS")
        measure._reset_resident_peak()
        step.loss().backward()
        resident = measure._resident("VmHWM") - resident
        gradients = digest(step.model)
        step.model.zero_grad()
        loss, held, highest = allocated(step.loss)
        by_keeper, by_projection = kept(step.model, loss)
        _, _, backward = allocated(loss.backward)
    return {
        "kept": by_keeper,
        "kept_of_first_layer": {name: size for name, size in by_projection.items() if ".0." in name},
        "held": held,
        "peak": max(highest, held + backward),
        "resident_peak": resident,
        "gradients": gradients,
    }


def give_back_freed_memory() -> None:
    """Has glibc map every large block by itself; else it keeps freed ones, and the resident peak has its gaps in it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def kept(model: torch.nn.Module, loss: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes behind the saved tensors of the loss's graph, parameters aside: by who keeps them, each storage once, and
    of every projection's spikes, by its name; projections of one bank keep the same."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    projections = {
        module.weight.untyped_storage().data_ptr(): name
        for name, module in model.named_modules()
        if isinstance(module, SpikingLinear)
    }
    found: dict[str, dict[int, int]] = {"spikes": {}, "neurons": {}, "others": {}}
    by_projection = {}
    for node in _nodes(loss.grad_fn):
        storages = {storage.data_ptr(): storage.nbytes() for storage in _saved(node)}
        sizes = {place: size for place, size in storages.items() if place not in parameters}
        names = [projections[place] for place in storages if place in projections]
        by_projection |= {name: sum(sizes.values()) for name in names}
        found["spikes" if names else "neurons" if "EncodeSum" in type(node).__name__ else "others"] |= sizes
    for place in [*found["spikes"], *found["neurons"]]:
        found["others"].pop(place, None)
    order = [name for name in projections.values() if name in by_projection]
    return {who: sum(sizes.values()) for who, sizes in found.items()}, {name: by_projection[name] for name in order}


def _nodes(root: Any) -> Iterator[Any]:
    """All nodes of an autograd graph."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new


def _saved(node: Any) -> Iterator[torch.UntypedStorage]:
    """What a node of the graph keeps: the tensors that it saved, or what hooks made of them."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, (tuple, list)) else [saved]:
                data = one.data[0].data if isinstance(one.data, tuple) else one.data
                if data is not None:
                    yield data.untyped_storage()


def allocated(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of run(), the bytes of torch's allocator still in use behind it, and how many were at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        highest = max(highest, used)
    return result, used, highest


def digest(model: torch.nn.Module) -> str:
    """A hash of all gradients, in the order of the parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.grad is not None:
            found.update(parameter.grad.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def seconds(case: Case) -> dict[str, float]:
    """The shortest time of forward and backward of each arm, in turn."""
    step = Step(case)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for timed in [False] + [True] * case.steps:
        for arm, as_bits in ARMS.items():
            with spikes_stored(as_bits):
                begin = time.perf_counter()
                step.loss().backward()
                if timed:
                    times[arm].append(time.perf_counter() - begin)
    return {arm: min(each) for arm, each in times.items()}


# ---- all rows


def row(case: Case) -> dict[str, Any]:
    """Both arms of a case. Raises SpikelmError where the gradients differ, or memory is held beside what is kept."""
    arms = {arm: _elsewhere(measured, case, arm) for arm in ARMS}
    check(case, arms)
    for arm, each in _elsewhere(seconds, case).items():
        arms[arm]["seconds"] = measure.rounded(each)
    return {**asdict(case), **arms}


def check(case: Case, arms: dict[str, dict[str, Any]]) -> None:
    """Raises SpikelmError where the figures would mean nothing."""
    if arms["dense"]["gradients"] != arms["bits"]["gradients"]:
        raise SpikelmError(f"the gradients of {case} differ with spikes stored as bits. Nothing is written")
    for arm, figures in arms.items():
        of_graph = sum(figures["kept"].values())
        if figures["held"] > 1.02 * of_graph:
            raise SpikelmError(
                f"{case}, {arm}: {figures['held']} bytes are in use behind the forward and the graph keeps only "
                f"{of_graph} of them. Nothing is written"
            )


def _elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def must_show(rows: list[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """The line to meet, for the worst of the rows that it is about."""
    ratios = [
        each["dense"]["kept"]["spikes"] / each["bits"]["kept"]["spikes"]
        for each in rows
        if (each["neuron"], each["dtype"]) == (TERNARY, "bfloat16")
    ]
    line = "ternary spikes in bfloat16: times fewer bytes kept"
    return [
        {"line": line, "aim": f">= {AIM}", "measured": min(ratios), "met": None if quick else min(ratios) >= AIM},
        {"line": "gradients equal bit for bit", "aim": "all", "measured": len(rows), "met": True},
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file to write; without it the lines are only printed")
    parser.add_argument("--quick", action="store_true", help="small models: a smoke run")
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of the processes to come says nothing
    begin = time.perf_counter()
    rows = [row(case) for case in tqdm(QUICK if arguments.quick else FULL, file=sys.stderr)]
    result = {
        "command": shlex.join(["python", "benchmarks/training_memory.py", *sys.argv[1:]]),
        "commit": measure.commit(ROOT),
        "versions": versions(),
        "quick": arguments.quick,
        "rows": rows,
        "must_show": must_show(rows, arguments.quick),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    for line in result["must_show"]:
        met = {True: "met", False: "NOT MET", None: "not judged"}[line["met"]]
        print(f"{line['line']}: {line['measured']} (aim {line['aim']}): {met}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        print(write_json(arguments.output, result))


if __name__ == "__main__":
    command_line(main)
