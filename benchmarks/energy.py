"""Energy reports of trained students, and of the papers' models by their shapes, for docs/energy.md.

    python benchmarks/energy.py run=runs/stories student=runs/pareto/students/KEY[,..] data=tinystories.txt \\
        --output benchmarks/results/energy.json

run is a directory of examples/mar, which names the teacher and the contexts; counted are 16 held-out ones. Of models of
a billion parameters the shapes are counted, without weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from spikelm import spikify
from spikelm.data import load_contexts
from spikelm.energy import report
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.run import command_line, versions, write_json

CONTEXTS = 16
LLAMBA_1B = LlambaConfig(
    vocab_size=128256,
    d_model=2048,
    n_layer=16,
    mlp_cfg={"intermediate_size": 8192},
    ssm_cfg={"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "expand": 1, "chunk_size": 128},
)
MAMBA2_1_3B = Mamba2Config(
    hidden_size=2048,
    num_hidden_layers=48,
    state_size=128,
    num_heads=64,
    head_dim=64,
    n_groups=1,
    expand=2,
    conv_kernel=4,
    vocab_size=50288,
    tie_word_embeddings=True,
)


def load(directory: str | Path) -> Any:
    """A model in eval mode."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def shapes(kind: Any, config: Any, recipe: str) -> dict[str, Any]:
    """MAC per token by term, and of the scan by its recurrence, of a model on the meta device."""
    with torch.device("meta"):
        model = spikify(kind(config), recipe)
    phases = report(model, torch.zeros((1, 512), dtype=torch.long, device="meta")).data["phases"]
    return {name: {"terms": phase["terms"], "scan": phase["scan"]} for name, phase in phases.items()}


def main() -> None:
    """The reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="+", help="run=DIRECTORY student=DIRECTORY[,..] data=FILE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    fields = dict(field.split("=", 1) for field in options.fields)
    config = json.loads((Path(fields["run"]) / "metrics.json").read_text())["config"]
    tokenizer = AutoTokenizer.from_pretrained(Path(fields["run"]) / "stage1")
    _, held_out = load_contexts(fields["data"], tokenizer, config["context_length"], held_out=config["held_out"])
    contexts = [{"input_ids": held_out[i]["input_ids"]} for i in range(CONTEXTS)]  # one sequence at a time
    teacher = load(config["teacher"])
    students = [
        report(load(name), contexts, teacher=teacher, max_batches=CONTEXTS).data
        for name in fields["student"].split(",")
    ]
    result = {
        "students": students,
        "shapes": {
            "Llamba-1B": shapes(LlambaForCausalLM, LLAMBA_1B, "mar"),
            "mamba2-1.3b": shapes(Mamba2ForCausalLM, MAMBA2_1_3B, "spikingmamba"),
        },
        "contexts": [CONTEXTS, len(held_out[0]["input_ids"])],
        "versions": versions(),
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps([student["whole"] for student in students], indent=1))


if __name__ == "__main__":
    command_line(main)
