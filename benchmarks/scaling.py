"""Memory of a process for the presets of one node with 8 GPUs, counted on fake tensors; nothing is allocated.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json     # about a minute on one core

Also the same count for a tiny model beside what torch's profiler measures of its step on this machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from spikelm import Recipe, spikify
from spikelm.distill import SBDS, HiddenMatch
from spikelm.distill.objectives import Objective
from spikelm.distill.parallel import Parallel
from spikelm.files import write_json
from spikelm.memory import training_memory
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.run import command_line, versions

PLACES = {
    "DDP": Parallel(),
    "sharded": Parallel(student="sharded", teacher="sharded"),
    "offloaded": Parallel(student="offloaded", teacher="offloaded"),
}
# Shapes of the published configurations, so that nothing is downloaded.
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
MAMBA2_1B3 = {
    "vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64,
    "state_size": 128, "expand": 2, "n_groups": 1, "chunk_size": 256, "tie_word_embeddings": True,
}  # fmt: skip
PROCESSES, CONTEXT_LENGTH = 8, 2048


def llamba_pair(shape: dict[str, Any], chunk_size: int) -> tuple[nn.Module, nn.Module, Objective]:
    """MAR's stage 2: the dense Llamba teaches the spiking one."""
    teacher = LlambaForCausalLM.from_llama(LlamaForCausalLM(LlamaConfig(**shape)), chunk_size=chunk_size)
    student = LlambaForCausalLM(teacher.config)
    spikify(student, Recipe.preset("mar"))
    return student, teacher, SBDS()


def mamba2_pair(shape: dict[str, Any]) -> tuple[nn.Module, nn.Module, Objective]:
    """SpikingMamba's single stage, embeddings frozen as in the preset."""
    config = Mamba2Config(**shape)
    student, teacher = Mamba2ForCausalLM(config), Mamba2ForCausalLM(config)
    spikify(student, Recipe.preset("spikingmamba", sgc="gradient"))
    student.get_input_embeddings().requires_grad_(False)
    return student, teacher, HiddenMatch()


def preset_rows(name: str, pair: tuple[nn.Module, nn.Module, Objective], batch_size: int) -> list[dict[str, Any]]:
    """A row for each place."""
    rows = []
    for place, parallel in PLACES.items():
        found = training_memory(
            *pair, batch_size=batch_size, context_length=CONTEXT_LENGTH, bf16=True, gradient_checkpointing=True,
            processes=PROCESSES, parallel=parallel,
        )  # fmt: skip
        shape = {"preset": name, "place": place, "batch_size": batch_size, "context_length": CONTEXT_LENGTH}
        rows.append(shape | asdict(found) | {"peak": found.peak})
        print(rows[-1], file=sys.stderr)
    return rows


def tiny_row() -> dict[str, Any]:
    """The count for a tiny spiking Llamba beside the profiler's."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    student, teacher, objective = llamba_pair(shape, chunk_size=32)
    teacher.eval().requires_grad_(False)
    estimated = training_memory(student, teacher, objective, batch_size=16, context_length=128)
    measured = measured_peak(student, teacher, objective, 16, 128)
    return {"estimated": estimated.peak, "measured": measured, "ratio": estimated.peak / measured}


def measured_peak(
    student: nn.Module, teacher: nn.Module, objective: Objective, batch_size: int, context_length: int
) -> int:
    """Bytes that torch's allocator had given out at the most in the second update, the models and AdamW's state too."""
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    ids = torch.randint(0, 64, (batch_size, context_length))
    student.train()

    def update() -> None:
        objective(student, teacher, {"input_ids": ids}, float(batch_size * (context_length - 1)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    held = sum(p.nbytes for model in (student, teacher) for p in model.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        update()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = highest = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        highest = max(highest, now)
    return held + highest


def main() -> None:
    """Count, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    tiny = tiny_row()
    print(tiny, file=sys.stderr)
    with torch.device("meta"):
        pairs = {"llamba_1b_8gpu": llamba_pair(LLAMA_1B, 128), "mamba2_1b3_8gpu": mamba2_pair(MAMBA2_1B3)}
    rows = []
    parameters = {}
    for name, pair in pairs.items():
        parameters[name] = {
            "student": sum(p.numel() for p in pair[0].parameters()),
            "trained": sum(p.numel() for p in pair[0].parameters() if p.requires_grad),
            "teacher": sum(p.numel() for p in pair[1].parameters()),
        }
        rows += preset_rows(name, pair, 4 if name.startswith("llamba") else 8)
    command = "python benchmarks/scaling.py --output benchmarks/results/scaling.json"
    result = {"command": command, "processes": PROCESSES, "parameters": parameters, "rows": rows, "tiny": tiny}
    write_json(output, result | {"versions": versions()})


if __name__ == "__main__":
    command_line(main)
