"""A small trained student, where dispatch and not memory bounds decoding: the same text in every form, and how fast.

    python benchmarks/student_decoding.py run=runs/stories student=runs/pareto/students/KEY[,..] data=tinystories.txt \\
        --output benchmarks/results/student_decoding.json

run has the dense stage 1 and names the teacher. From the first tokens of 50 held-out contexts every student and its
deployed form decode greedily; then both see the contexts' own tokens, the deployed form one by one from the cache, and
their logits are compared, as are the undeployed student's own from the cache. Speeds are those of generate, on one
sequence, of the first student.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spikelm
from spikelm.data import load_contexts
from spikelm.evaluate_decoding import decoding_speed
from spikelm.files import write_json
from spikelm.run import command_line, versions

PROMPTS, PROMPT, NEW = 50, 16, 40


def load(directory: str | Path) -> PreTrainedModel:
    """A model in eval mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    return model.eval()


def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """NEW tokens behind every prompt, one prompt at a time [prompts, NEW]."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    texts = [
        model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)[0, len(row) :]
        for row in tqdm(ids, desc="texts")
    ]
    return torch.stack(texts)


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits behind each token of ids [B, L] but the first, from the cache [B, L - 1, V]."""
    outputs = model(ids[:, :1], use_cache=True)
    logits = []
    for token in ids[:, 1:].split(1, dim=1):
        outputs = model(token, use_cache=True, past_key_values=outputs.past_key_values)
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def compare(student: Any, deployed: Any, ids: torch.Tensor) -> dict[str, Any]:
    """How far the two forms are apart."""
    texts = greedy(student, ids[:, :PROMPT]), greedy(deployed, ids[:, :PROMPT])
    same = (texts[0] == texts[1]).all(1)
    wanted = student(ids).logits[:, 1:]
    found = torch.cat([stepwise(deployed, part) for part in ids.split(2)])
    error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    own = torch.cat([stepwise(student, part) for part in ids.split(2)])
    own_error = (own - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    return {
        "prompts": len(ids),
        "new_tokens": NEW,
        "same_texts": int(same.sum()),
        "logits_compared": error.numel(),
        "logits_within_1e-5": (error < 1e-5).float().mean().item(),
        "undeployed_from_the_cache_within_1e-5": (own_error < 1e-5).float().mean().item(),
        "median_error": error.median().item(),
        "largest_error": error.max().item(),
    }


def main() -> None:
    """The comparison and the speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="+", help="run=DIRECTORY student=DIRECTORY data=FILE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    fields = dict(field.split("=", 1) for field in options.fields)
    config = json.loads((Path(fields["run"]) / "metrics.json").read_text())["config"]
    tokenizer = AutoTokenizer.from_pretrained(Path(fields["run"]) / "stage1")
    _, held_out = load_contexts(fields["data"], tokenizer, config["context_length"], held_out=config["held_out"])
    ids = torch.tensor([held_out[i]["input_ids"] for i in range(PROMPTS)])[:, : PROMPT + NEW]
    students = fields["student"].split(",")
    same = [compare(load(name), spikelm.deploy(load(name)), ids) for name in students]
    forms = {
        "dense Llama (teacher)": lambda: load(config["teacher"]),
        "dense Llamba (stage 1)": lambda: load(Path(fields["run"]) / "stage1"),
        "spiking": lambda: load(students[0]),
        "deployed": lambda: spikelm.deploy(load(students[0])),
        "deployed, bfloat16": lambda: spikelm.deploy(load(students[0]).to(torch.bfloat16)),
        "deployed, int8 weights and head": lambda: spikelm.deploy(load(students[0]), weights="int8", head="int8"),
    }
    rows = [{"form": name, **decoding_speed(make(), ids[:1, :PROMPT], 100)} for name, make in forms.items()]
    result = {"same": same, "rows": rows, "versions": versions()}
    print(json.dumps(result, indent=1))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    command_line(main)
