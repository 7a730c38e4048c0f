"""Tunes tiny students by preferences: by itself, or under torchrun in several processes. Takes one argument, JSON.

output_dir, and runs, one training each, by name: student ("llamba" or "spiking"), pairs, fail_at (a step that ends with
an error) and the options of spikelm.distill.preference.train_preferences.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import spikelm
from spikelm import distributed
from spikelm.data import train_tokenizer
from spikelm.distill.preference import train_preferences
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.run import command_line
from tests.distill.shared_training import FailAt


def student_of(kind: str) -> Any:
    """Two layers of a Llamba, another one on every process: the first one's counts."""
    torch.manual_seed(distributed.rank())
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    student: Any = LlambaForCausalLM.from_llama(LlamaForCausalLM(config), chunk_size=4)
    if kind == "spiking":
        spikelm.spikify(student, spikelm.Recipe.preset("mar", tau=0.5, frame_weight=0.5))
    return student.train()


def pairs_of(count: int, first: int = 0) -> list[dict[str, str]]:
    """The cat is preferred to the dog; lengths differ."""
    return [
        {"prompt": f"{n * 37} saw", "chosen": " the cat" + " and" * (n % 3), "rejected": " a dog" + " bird" * (n % 2)}
        for n in range(first, first + count)
    ]


def one_training(output_dir: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    """Its result goes to output_dir/result.json, where it has come to its end."""
    student, count, fail_at = student_of(options.pop("student")), options.pop("pairs"), options.pop("fail_at", None)
    defaults = {"batch_size": 4, "learning_rate": 1e-3, "beta": 0.1, "save_steps": 1000, "logging_steps": 1}
    try:
        result = train_preferences(
            student, None, pairs_of(count), pairs_of(6, count), tokenizer, output_dir=output_dir,
            callbacks=[] if fail_at is None else [FailAt(fail_at)], **{**defaults, **options},
        )  # fmt: skip
    except SpikelmError as error:
        assert str(error) == f"failed at step {fail_at}", error
        return
    everywhere = {
        "result": result,
        "sums": [float(value.detach().double().abs().sum()) for value in student.parameters()],
    }
    del everywhere["result"]["wall_s"]
    assert distributed.on_first_rank(lambda: everywhere) == everywhere, "the processes end differently"
    if distributed.is_first():
        (output_dir / "result.json").write_text(json.dumps(result))


def main() -> None:
    """The trainings asked for."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    distributed.start()
    tokenizer = train_tokenizer("the cat saw a dog and a bird 0123456789 " * 50, 300)
    for name, more in options["runs"].items():
        one_training(Path(options["output_dir"]) / name, tokenizer, more)


if __name__ == "__main__":
    command_line(main)
