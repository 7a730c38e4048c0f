"""Memory over a long run: steps of neurons, training steps, generated tokens. Writes a result file and a picture.

    python benchmarks/robustness.py --output benchmarks/results/robustness.json

After every fiftieth part of a run: resident memory (/proc), bytes that the C library has handed out (mallinfo2) and
blocks that Python has (sys.getallocatedblocks). A run is flat where all three add next to nothing between its second
quarter and its last one, by their medians. A control that keeps 100 bytes a step must not
be flat. The samples themselves are 200 blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from spikelm import Recipe, calibrate, deploy, spikify
from spikelm.cpu import module, store
from spikelm.files import write_json
from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.models.llamba.cache import LlambaCache
from spikelm.neurons import ATMN, TILIF, BinaryIF
from spikelm.ops.dynamics import Dynamics
from spikelm.run import keep_freed_memory, versions

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "robustness_memory.png"
SAMPLES = 50
MOST_ADDED = {"resident_bytes": 1 << 20, "allocated_bytes": 1 << 16, "python_blocks": 500}
VOCABULARY = 64
Work = Iterator[None]


def resident_bytes() -> int:
    """This process's memory in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated_bytes() -> int:
    """What the C library has handed out, tensors among it; 0 where it does not say."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def sample(step: int) -> dict[str, int]:
    """What a step has left behind."""
    gc.collect()
    return {
        "step": step,
        "resident_bytes": resident_bytes(),
        "allocated_bytes": allocated_bytes(),
        "python_blocks": sys.getallocatedblocks(),
    }


def llamba() -> LlambaForCausalLM:
    """2 layers, width 64."""
    torch.manual_seed(0)
    ssm = {"d_state": 16, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 16}
    mlp = {"intermediate_size": 128}
    config = LlambaConfig(vocab_size=VOCABULARY, d_model=64, n_layer=2, mlp_cfg=mlp, ssm_cfg=ssm, initializer_range=0.2)
    return spikify(LlambaForCausalLM(config), Recipe.preset("mar", tau=0.5, frame_weight=0.5))  # type: ignore[return-value]


def deployed() -> Any:
    """That in the form for decoding."""
    model = llamba()
    calibrate(model, [{"input_ids": torch.randint(3, VOCABULARY, (2, 32))}])
    return deploy(model)


def neuron_steps() -> Work:
    """A step of each neuron, whose membrane the next one takes, with a gradient and without."""
    neurons = [ATMN(inject="every"), TILIF(), BinaryIF(learn_threshold=True)]
    x = torch.randn(8, 256)
    while True:
        for neuron in neurons:
            neuron(x.requires_grad_()).sum().backward()
            neuron.detach()
            with torch.no_grad():
                neuron(x)
        x.grad = None
        yield


def neuron_lives() -> Work:
    """New neurons of other shapes and types at every step, reset and copied."""
    import copy

    i = 0
    while True:
        i += 1
        neuron = TILIF(D=1 + i % 5, num_channels=8 + i % 7)
        x = torch.randn(1 + i % 3, 8 + i % 7, dtype=(torch.float32, torch.float64)[i % 2])
        copy.deepcopy(neuron)(x)
        neuron(x)
        neuron.reset()
        yield


def training_steps() -> Work:
    """A step of AdamW on a spiking Llamba."""
    model = llamba().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    while True:
        ids = torch.randint(3, VOCABULARY, (1, 16))
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield


@torch.no_grad()
def llamba_tokens() -> Work:
    """Four texts without end, whose states have a fixed size."""
    model, tokens = deployed(), torch.tensor([[3], [4], [5], [6]])
    cache = LlambaCache(model.config)
    while True:
        tokens = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        yield from (None for _ in tokens)


def bispikclm_tokens() -> Work:
    """generate() again and again, four texts of 100 tokens at a time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    model = BiSpikCLMForCausalLM(BiSpikCLMConfig(vocab_size=VOCABULARY, initializer_gain=2.0, **shape)).eval()
    prompt = torch.tensor([[3, 4], [5, 6], [7, 8], [9, 10]])
    mask = torch.ones_like(prompt)
    while True:
        found = model.generate(  # type: ignore[operator]
            prompt, attention_mask=mask, min_new_tokens=100, max_new_tokens=100, do_sample=False, pad_token_id=0
        )
        yield from (None for _ in found[:, prompt.shape[1] :].flatten())


def control() -> Work:
    """A leak: a tensor of 100 bytes a step."""
    kept = []
    while True:
        kept.append(torch.zeros(25))
        yield


# name, what a step is, its steps in the whole run, the work
RUNS: tuple[tuple[str, str, int, Callable[[], Work]], ...] = (
    ("neurons", "steps of ATMN, TILIF and BinaryIF", 10_000, neuron_steps),
    ("neurons made anew", "neurons", 10_000, neuron_lives),
    ("training a Llamba", "steps", 10_000, training_steps),
    ("decoding a deployed Llamba", "tokens", 100_000, llamba_tokens),
    ("generating with BiSpikCLM", "tokens", 100_000, bispikclm_tokens),
    ("control, which leaks", "steps of 100 bytes", 10_000, control),
)


def run(name: str, unit: str, steps: int, work: Callable[[], Work]) -> dict[str, Any]:
    """SAMPLES samples, and what was added between the second quarter of the steps and the last."""
    iterator, every = work(), max(1, steps // SAMPLES)
    for _ in range(min(1000, steps)):  # kernels are built, allocators grow
        next(iterator)
    gc.collect()
    gc.freeze()  # what is there by now is not looked at again
    samples = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        next(iterator)
        if step % every == 0:
            samples.append(sample(step))
    seconds = time.perf_counter() - start
    quarter = len(samples) // 4
    parts = samples[quarter : 2 * quarter], samples[-quarter:]
    added = {
        key: round(median([one[key] for one in parts[1]]) - median([one[key] for one in parts[0]]))
        for key in MOST_ADDED
    }
    flat = all(added[key] <= most for key, most in MOST_ADDED.items())
    print(f"{name}: {steps} {unit}, {seconds:.0f} s, added by the last quarter: {added}, flat: {flat}", flush=True)
    return {
        "name": name, "unit": unit, "steps": steps, "seconds": seconds, "added": added, "flat": flat,
        "samples": samples,
    }  # fmt: skip


def warm_start() -> dict[str, Any]:
    """What a kernel that is built already costs to find, check and load: medians in microseconds over 200 calls."""
    kernel = Dynamics("integer", levels=2).kernel
    assert not isinstance(kernel, str)
    text = module.source(kernel.definitions, torch.float32, torch.float32)
    library = module.build(text)

    def typical(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e6 * median(times)

    return {
        "library_bytes": library.stat().st_size,
        "find_and_check_us": typical(lambda: module.build(text)),
        "directory_us": typical(lambda: store.private_directory("cpu")),
        "digest_us": typical(lambda: store.read_kernel(library)),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Memory handed out against the share of each run, from its first sample on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for result in results:
        first = result["samples"][0]["allocated_bytes"]
        axes.plot(
            [one["step"] / result["steps"] for one in result["samples"]],
            [(one["allocated_bytes"] - first) / 1e3 for one in result["samples"]],
            label=f"{result['name']}, {result['steps']:,} {result['unit']}",
        )
    axes.set(xlabel="share of the run", ylabel="memory added, kB")
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """The runs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "robustness.json")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every run (1)")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.perf_counter()
    results = [run(name, unit, max(SAMPLES, round(given.share * steps)), work) for name, unit, steps, work in RUNS]
    command = shlex.join(["python", "benchmarks/robustness.py", *sys.argv[1:]])
    record = {"command": command, "versions": versions(), "seconds": time.perf_counter() - start}
    record |= {"most_added": MOST_ADDED, "warm_start": warm_start(), "runs": results}
    write_json(given.output, record)
    plot(results, given.picture)


if __name__ == "__main__":
    main()
