"""Checkpoints of a training: directories checkpoint-<step>/ that are whole or absent; damaged ones are put aside."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from spikelm.errors import SpikelmError
from spikelm.files import PARTIAL, put_in_place, read_manifest, remove

DAMAGED = ".damaged"

logger = logging.getLogger(__name__)


def unfinished(output_dir: str | Path) -> Path:
    """Where a checkpoint is written, by its own name, before it is put in place."""
    return Path(output_dir) / f"checkpoints{PARTIAL}"


def finish_checkpoint(output_dir: str | Path, step: int) -> Path:
    """Put what was written to unfinished(output_dir)/checkpoint-<step> in place; returns its directory.

    It takes the place of a checkpoint of the same step.
    """
    final, written = Path(output_dir) / f"checkpoint-{step}", unfinished(output_dir) / f"checkpoint-{step}"
    if final.exists():
        final.rename(written.with_name("before"))
    put_in_place(written, final, step=step)
    remove(unfinished(output_dir))
    return final


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is as it was written. Reads all of it."""
    try:
        step = read_manifest(directory).get("step")
    except SpikelmError as error:
        return str(error)
    return None if step == checkpoint_step(directory) else f"it is of step {step}"


def checkpoint_step(directory: str | Path) -> int | None:
    """The step in the name of a checkpoint directory, or None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(directory).name)
    return int(match.group(1)) if match else None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint directories of a training, damaged ones too, by rising step."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    steps = {path: checkpoint_step(path) for path in output_dir.iterdir() if path.is_dir()}
    return [path for _, path in sorted((step, path) for path, step in steps.items() if step is not None)]


def last_whole(output_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step that is as it was written, or None. Changes nothing."""
    return next((path for path in reversed(checkpoints(output_dir)) if damage(path) is None), None)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step, or None.

    A damaged one of a higher step is moved aside to checkpoint-<step>.damaged, with a logged warning that names the
    file; what a killed process left unfinished is deleted.
    """
    remove(unfinished(output_dir))
    whole, moved = None, False
    for path in reversed(checkpoints(output_dir)):
        wrong = damage(path)
        if wrong is None:
            whole = path
            break
        aside = path.with_name(path.name + DAMAGED)
        remove(aside)
        path.rename(aside)
        logger.warning("%s is damaged: %s; it is now %s", path, wrong, aside.name)
        moved = True
    if moved:
        logger.warning("the training goes on from %s", whole or "its beginning: no whole checkpoint is left")
    return whole


def keep_latest(output_dir: str | Path, count: int) -> None:
    """Delete all but the `count` (>= 1) checkpoints of the highest steps."""
    for path in checkpoints(output_dir)[:-count]:
        # Renamed first, so that a deletion cut short leaves nothing that looks like a damaged checkpoint.
        remove(unfinished(output_dir))
        path.rename(unfinished(output_dir))
        remove(unfinished(output_dir))
