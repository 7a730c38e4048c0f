"""Energy reports of trained students, and of the papers' models by their shapes, for docs/energy.md.

    python benchmarks/energy.py run=runs/stories data=tinystories.txt \\
        student=runs/pareto/students/78c8aebdb0de,runs/pareto/students/0e8145a165b9 \\
        --output benchmarks/results/energy.json

run is the output_dir of a finished examples/mar/train.py, which names the teacher and the contexts; counted are 16
held-out ones. The students are of examples/mar/pareto.py, which names them after their row: 78c8aebdb0de is T = 4, tau
0.5, 1,200 steps without a target, 0e8145a165b9 3,500 steps with the target 0.5. Of models of a billion parameters the
shapes are counted, without weights.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from spikelm import spikify
from spikelm.data import load_contexts
from spikelm.energy import report
from spikelm.errors import SpikelmError
from spikelm.files import write_json
from spikelm.models.llamba import LlambaConfig, LlambaForCausalLM
from spikelm.run import command_line, versions

CONTEXTS = 16
FIELDS = {"run", "student", "data"}
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


def fields_of(given: Sequence[str]) -> dict[str, str]:
    """The three fields, each once."""
    fields = dict(field.partition("=")[::2] for field in given)
    if len(given) != len(FIELDS) or set(fields) != FIELDS or not all(fields.values()):
        raise SpikelmError(
            f"run=DIRECTORY student=DIRECTORY[,..] data=FILE are needed, each once; got {' '.join(given)}"
        )
    return fields


def settings_of(run: Path) -> dict[str, Any]:
    """Of a finished run: its teacher and its contexts."""
    try:
        config = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["config"]
        settings = {name: config[name] for name in ("teacher", "context_length", "held_out")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpikelmError(f"run must be the output_dir of a finished examples/mar/train.py; got {run}") from error
    if settings["teacher"] == "embedded":
        settings["teacher"] = str(run / "teacher")
    return settings


def check_directory(role: str, name: str | Path) -> str | Path:
    """The directory of a saved model; SpikelmError for another one."""
    if not (Path(name) / "config.json").is_file():
        raise SpikelmError(f"{role} must be a directory written by save_pretrained; got {name or 'nothing'}")
    return name


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
    fields = fields_of(options.fields)
    if options.output and not options.output.parent.is_dir():
        raise SpikelmError(f"--output must be a file in a directory that exists; got {options.output}")
    settings = settings_of(Path(fields["run"]))
    names = [check_directory("student", name) for name in fields["student"].split(",")]
    teacher = load(check_directory("the run's teacher", settings["teacher"]))
    tokenizer = AutoTokenizer.from_pretrained(check_directory("the run's stage1", Path(fields["run"]) / "stage1"))
    _, held_out = load_contexts(fields["data"], tokenizer, settings["context_length"], held_out=settings["held_out"])
    if len(held_out) < CONTEXTS:
        raise SpikelmError(f"data must have {CONTEXTS} held-out contexts; {fields['data']} has {len(held_out)}")
    contexts = [{"input_ids": held_out[i]["input_ids"]} for i in range(CONTEXTS)]  # one sequence at a time
    students = [report(load(name), contexts, teacher=teacher, max_batches=CONTEXTS).data for name in names]
    result = {
        "students": students,
        "shapes": {
            "Llamba-1B": shapes(LlambaForCausalLM, LLAMBA_1B, "mar"),
            "mamba2-1.3b": shapes(Mamba2ForCausalLM, MAMBA2_1_3B, "spikingmamba"),
        },
        "contexts": [CONTEXTS, len(held_out[0]["input_ids"])],
        "command": shlex.join(["python", "benchmarks/energy.py", *sys.argv[1:]]),
        "versions": versions(),
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps([student["whole"] for student in students], indent=1))


if __name__ == "__main__":
    command_line(main)
