"""Tokens per second at batch 1 of a Llamba of a billion parameters: dense, spiking, and deployed for decoding.

    python benchmarks/decoding.py --output benchmarks/results/decoding.json       # 15 minutes, 16 GB

Weights are random. Thresholds are set from the activations of real text, so that every bank's union rate (channels that
fire in any frame, whose weights are read) is as asked for: --rates, then 20 % and 10 %. Every form decodes the same
text, token by token; peak memory is that of decoding alone. Every projection is checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import spikelm
from spikelm.convert import spike_sites
from spikelm.data import python_documentation
from spikelm.deploy import int8_layer
from spikelm.files import write_json
from spikelm.layers import GatherLinear
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.models.llamba.decoding import banks_of
from spikelm.run import command_line, versions

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SITES = {"mixer_in": "in_proj", "mixer_out": "out_proj", "ffn_in": "gate_proj", "ffn_out": "down_proj"}
T, TAU = 4, 0.5
PROMPT, CALIBRATION = 16, 192  # tokens
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Shape:
    """The defaults are Llamba-1B's and Llama-3.2-1B's."""

    d_model: int = 2048
    n_layer: int = 16
    heads: int = 32
    d_state: int = 64
    intermediate_size: int = 8192
    vocab_size: int = 128256
    tokens: int = 40

    def llamba(self) -> LlambaForCausalLM:
        """The student."""
        return LlambaForCausalLM(
            LlambaConfig(
                vocab_size=self.vocab_size, d_model=self.d_model, n_layer=self.n_layer,
                mlp_cfg={"intermediate_size": self.intermediate_size},
                ssm_cfg={"d_state": self.d_state, "n_v_heads": self.heads, "n_qk_heads": self.heads},
            )
        )  # fmt: skip

    def llama(self) -> LlamaForCausalLM:
        """A teacher of the same width."""
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab_size, hidden_size=self.d_model, num_hidden_layers=self.n_layer,
                num_attention_heads=self.heads, num_key_value_heads=max(1, self.heads // 4),
                intermediate_size=self.intermediate_size, tie_word_embeddings=True,
            )
        )  # fmt: skip


def text_ids(tokens: int, vocab_size: int) -> torch.Tensor:
    """Real text, words of Python's documentation, each of which is one id, [1, tokens]."""
    words = " ".join(python_documentation()[:400]).split()
    known = {word: 1 + place % (vocab_size - 1) for place, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([[known[word] for word in words[:tokens]]])


@torch.no_grad()
def set_rates(model: PreTrainedModel, ids: torch.Tensor, rates: Rates) -> None:
    """Sets every bank's thresholds, in the order of the layers, so that its input fires at its site's union rate.

    A channel fires in any frame where |x| >= V tau^(T - 1). V is a multiple of the channel's root mean square.
    """
    handles = []
    for name, owner in spike_sites(model).items():
        site = next(site for site, end in SITES.items() if name.endswith(end))

        def choose(module: Any, inputs: tuple[torch.Tensor, ...], site: str = site) -> None:
            x = inputs[0].float().flatten(0, -2)
            scale = x.square().mean(0).sqrt().clamp_min(1e-20)
            sizes = (x / scale).abs().flatten()
            factor = sizes.kthvalue(1 + round((1 - rates[site]) * (len(sizes) - 1))).values
            module.neuron.v_threshold = scale * factor / TAU ** (T - 1)

        handles.append(owner.register_forward_pre_hook(choose))
    model(ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()


def read_share(model: PreTrainedModel) -> float:
    """The share of the blocks' weights that the last token's step read."""
    read = total = 0
    for bank, active in banks_of(model.backbone):
        outputs = sum(layer.out_features for layer in bank)
        read, total = read + active * outputs, total + bank[0].in_features * outputs
    return read / total


def peak_bytes(reset: bool = False) -> int:
    """The largest resident memory of this process since the last reset."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what deploy has freed is not decoding's
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@torch.no_grad()
def timed(name: str, model: PreTrainedModel, shape: Shape, **more: Any) -> dict[str, Any]:
    """A row of the result: the tokens of a text one by one, with the greedy choice that they leave unused."""
    ids = text_ids(PROMPT + shape.tokens, shape.vocab_size)[:, -PROMPT - shape.tokens :]
    deployed = any(isinstance(module, GatherLinear) for module in model.modules())
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    peak_bytes(reset=True)
    times, shares = [], []
    for token in ids[:, PROMPT:].split(1, dim=1):
        start = time.perf_counter()
        model(token, use_cache=True, past_key_values=cache).logits.argmax(-1)
        times.append(time.perf_counter() - start)
        shares += [read_share(model)] if deployed else []
    hidden = torch.randn(1, 1, shape.d_model, dtype=model.dtype)
    row = {"form": name, "seconds_per_token": statistics.median(times[3:]), "peak_bytes": peak_bytes()}
    row |= {"tokens_per_second": 1 / row["seconds_per_token"]} | more
    row |= {"read_share": statistics.fmean(shares[3:])} if deployed else {}
    row |= {"head_seconds": head_seconds(model.get_output_embeddings(), hidden)}
    print(f"{name:<40}{row['tokens_per_second']:8.2f} tokens/s", file=sys.stderr, flush=True)
    return row


@torch.no_grad()
def head_seconds(head: torch.nn.Module, hidden: torch.Tensor) -> float:
    """The quickest of several calls of the output embeddings."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        head(hidden)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def run_dense(shape: Shape, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The teacher's shape, as transformers runs it."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = shape.llama().to(dtype).eval()
    return [timed("dense Llama", model, shape)]


def run_student(shape: Shape, dtype: torch.dtype, rates: Mapping[str, Rates]) -> list[dict[str, Any]]:
    """The student in every form."""
    torch.manual_seed(0)
    model: Any = shape.llamba().to(dtype).eval()
    rows = [timed("dense Llamba", model, shape)]
    spikelm.spikify(model, spikelm.Recipe.preset("mar", T=T, tau=TAU, frame_weight=TAU))
    ids = text_ids(CALIBRATION, shape.vocab_size)
    set_rates(model, ids, next(iter(rates.values())))
    rows.append(timed(f"spiking, {next(iter(rates))}", model, shape))
    spikelm.deploy(model)
    check(model)
    projections = [layer for layer in model.modules() if isinstance(layer, GatherLinear)]
    for layer in projections:
        layer.spiking = False
    rows.append(timed("dense Llamba, our loop", model, shape))
    for layer in projections:
        layer.spiking = True
    for name, wanted in rates.items():
        set_rates(model, ids, wanted)
        rows.append(timed(f"deployed, {name}", model, shape))
    head = model.get_output_embeddings()
    model.set_output_embeddings(int8_layer(head))
    rows.append(timed(f"deployed, {name}, int8 head", model, shape))
    model.set_output_embeddings(head)
    return rows


@torch.no_grad()
def check(model: PreTrainedModel) -> None:
    """Nothing is timed that computes something else: every projection on an input of its own.

    Whole models are compared in tests/models/test_llamba_decoding.py. Here rounding alone moves some of the quarter of
    a million spikes of a token, and random weights make another text of it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, GatherLinear):
            x = layer.neuron.v_threshold.mean() * torch.randn(1, layer.in_features)
            spikes = layer.neuron.encode_sum(x.to(model.dtype)).float()
            wanted = torch.nn.functional.linear(spikes, layer.weight.float())
            error = ((layer(x.to(model.dtype)).float() - wanted).abs().max() / wanted.abs().max()).item()
            assert error < (1e-5 if model.dtype == torch.float32 else 1e-2), f"{name} is off by {error}"


def main() -> None:
    """Every type and form, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small model: a smoke run of seconds")
    parser.add_argument("--rates", help="JSON: name -> {site: union rate}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, shape, dtype, rates = json.loads(options.one)
        run = run_student if kind == "student" else run_dense
        arguments = (rates,) if kind == "student" else ()
        print(json.dumps(run(Shape(**shape), TYPES[dtype], *arguments)))
        return
    shape = Shape(256, 2, 4, 16, 512, 1024, 8) if options.quick else Shape()
    rates = {f"{share:.0%}": dict.fromkeys(SITES, share) for share in (0.2, 0.1)}
    rates = (json.loads(options.rates) if options.rates else {}) | rates
    rows = []
    for dtype, kind in tqdm([(dtype, kind) for dtype in TYPES for kind in ("dense", "student")]):
        one = json.dumps([kind, asdict(shape), dtype, rates])
        command = [sys.executable, __file__, "--one", one]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows += [{"dtype": dtype, **row} for row in found]
    result = {"shape": asdict(shape), "rates": rates, "rows": rows, "versions": versions()}
    print(json.dumps(result, indent=1))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    command_line(main)
