"""Trains a tiny student: by itself, or under torchrun in several processes. Takes one argument, JSON.

output_dir and, of one training or of several under "runs", each in a directory of its name: objective, student
("llama", "llamba", "spiking" or "bert"), dtype, parallel {"student", "teacher"}, rows, streaming, fail_at (a step that
ends with an error, on one rank or all) and the options of spikelm.distill.trainer.train.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainerCallback

import spikelm
from spikelm import distributed
from spikelm.data.classification import collate_classification
from spikelm.distill import SBDS, Activity, HiddenAlignment, InternalKD, LogitDistillation, MatrixOrientation, SpAD
from spikelm.distill.parallel import Parallel
from spikelm.distill.trainer import collate, train
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.models.spikingbert import from_bert
from spikelm.run import command_line


class NanOnRankOne:
    """The KL, and at the fifth and seventh call on rank 1 not a number."""

    calls = 0

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        """One process's loss that the others do not see."""
        self.calls += 1
        bad = self.calls in (5, 7) and distributed.rank() == 1
        return {"loss": LogitDistillation()(*args)["loss"] * (float("nan") if bad else 1)}


# Within what the rate of a batch goes through, so that it is above on one process and below on the other.
TARGET = 0.803

OBJECTIVES: dict[str, Any] = {
    "sbds": SBDS(),
    "kl": LogitDistillation(chunk_size=20),
    "orientation": MatrixOrientation(),
    "alignment": HiddenAlignment(),
    "spad": SpAD(),
    "activity": Activity(SBDS(), target=TARGET, weight=5.0),
    "internal": InternalKD(),
    "nan": NanOnRankOne(),
    "prediction": InternalKD.stage("prediction", hard_weight=1.0),
}


class FailAt(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise SpikelmError(f"failed at step {self.step}")


def llama() -> LlamaForCausalLM:
    """Two layers, tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert() -> BertForSequenceClassification:
    """Two layers, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def models(kind: str) -> tuple[Any, Any]:
    """Student and teacher."""
    if kind == "bert":
        teacher: Any = bert()
        return from_bert(teacher, T=4, classifier_dropout=0.0), teacher
    teacher = llama()
    if kind == "llama":
        student: Any = copy.deepcopy(teacher)
    else:
        student = LlambaForCausalLM.from_llama(teacher, chunk_size=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    if kind == "spiking":
        spikelm.spikify(student, spikelm.Recipe.preset("mar", tau=0.5, frame_weight=0.5))
    return student.requires_grad_(True), teacher


def rows_of(count: int, length: int, labels: bool) -> list[dict[str, Any]]:
    """Rows of three lengths."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 64, (count, length), generator=generator).tolist()
    rows: list[dict[str, Any]] = [{"input_ids": row[: length - number % 3]} for number, row in enumerate(ids)]
    for number, row in enumerate(rows if labels else []):
        row |= {"labels": number % 2, "attention_mask": [1] * len(row["input_ids"])}
    return rows


def main() -> None:
    """The trainings asked for."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    output_dir = Path(options.pop("output_dir"))
    for name, each in options.pop("runs", {"": options}).items():
        one_training(output_dir / name, each)


def one_training(output_dir: Path, options: dict[str, Any]) -> None:
    """Its result goes to output_dir/result.json, the student to output_dir/student."""
    objective = options.pop("objective", "sbds")
    kind = options.pop("student", "llama")
    student, teacher = models(kind)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    student, teacher = student.to(dtype), teacher.to(dtype)
    rows = rows_of(options.pop("rows", 30), 8, kind == "bert")
    dataset: Any = Dataset.from_list(rows)
    if options.pop("streaming", False):
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    parallel = Parallel(**options.pop("parallel", {}))
    step, on = options.pop("fail_at", (None, None))
    callbacks = [FailAt(step)] if step is not None and on in (None, distributed.rank()) else []
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    collator = collate_classification if kind == "bert" else collate
    defaults: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "save_steps": 1000, "logging_steps": 1}
    result = train(
        student, teacher, dataset, OBJECTIVES[objective], output_dir=output_dir / "training", parallel=parallel,
        data_collator=collator, callbacks=callbacks, **(defaults | options),
    )  # fmt: skip
    assert type(student.forward).__name__ == "method" and not any("FSDP" in str(type(m)) for m in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())
    assert all(type(value) is nn.Parameter and value.isfinite().all() for value in student.parameters())
    if distributed.is_first():
        student.save_pretrained(output_dir / "student")
        (output_dir / "result.json").write_text(json.dumps(result))
    sums = [float(value.detach().double().abs().sum()) for value in student.parameters()]
    assert distributed.on_first_rank(lambda: sums) == sums, "the processes end with different students"


if __name__ == "__main__":
    command_line(main)
