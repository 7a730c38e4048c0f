"""Keeps on disk what the teacher of stage 2 says of every training context, for train.py objective=stored.

    python examples/mar/store_teacher.py run=runs/stories output_dir=runs/stories-store k=64
    python examples/mar/train.py --preset tiny teacher=PATH data=stories.txt stage1=runs/stories/stage1 \
        objective=stored teacher_store=runs/stories-store output_dir=runs/stored

run is the output_dir of a finished train.py: its data are read, and its spiking.teacher says whether the Llama or its
stage 1 is asked. The same command goes on with an interrupted store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from settings import Config

from spikelm.data import load_contexts, load_teacher, load_whole
from spikelm.data.teacher_store import store_teacher
from spikelm.distributed import world_size
from spikelm.errors import SpikelmError
from spikelm.experiment import finished_settings, say
from spikelm.models.llamba import LlambaForCausalLM
from spikelm.presets import config_from_command_line
from spikelm.run import command_line

PRESETS = Path(__file__).parent / "store_presets"


@dataclass(frozen=True)
class Store:
    """Which run's teacher, where to, how many of its likeliest tokens, and contexts asked about at once."""

    run: str
    output_dir: str
    k: int = 64
    batch_size: int = 8


def main() -> None:
    """Read the run, ask its teacher."""
    settings = config_from_command_line(Store, PRESETS, description=str(__doc__), default_preset="store")
    if world_size() > 1:
        raise SpikelmError(f"WORLD_SIZE={world_size()}: this program runs in a single process")
    config = finished_settings(Config, settings.run, "stage1")
    if config.streaming:
        raise SpikelmError("a store needs contexts that stay the same: the run streams its data")
    model, tokenizer = load_teacher(config.teacher)
    contexts, _ = load_contexts(
        config.data, tokenizer, config.context_length, held_out=config.held_out, text_field=config.text_field,
        max_tokens=config.max_tokens, max_bad_documents=config.max_bad_documents,
    )  # fmt: skip
    teacher = model
    if config.spiking.teacher == "stage1":
        teacher = load_whole(LlambaForCausalLM, str(Path(settings.run) / "stage1"), "stage1").eval()
    device: torch.types.Device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher.to(device)  # type: ignore[arg-type]
    rows = np.asarray(contexts["input_ids"], dtype=np.int32)
    store = store_teacher(settings.output_dir, teacher, rows, k=settings.k, batch_size=settings.batch_size)
    say(f"{len(store)} contexts in {settings.output_dir}")


if __name__ == "__main__":
    command_line(main)
