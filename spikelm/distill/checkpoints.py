"""Checkpoint directories that count only when whole: checkpoint-<step>/ with a COMPLETE file written last."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

MARKER = "COMPLETE"

logger = logging.getLogger(__name__)


def mark_complete(directory: str | Path, step: int) -> None:
    """Flush every file of the directory to disk, then write COMPLETE (json: step, size of each file in bytes) in one
    move.
    """
    directory = Path(directory)
    files: dict[str, int] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MARKER:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            files[path.relative_to(directory).as_posix()] = path.stat().st_size
    write_text_atomically(directory / MARKER, json.dumps({"step": step, "files": files}, indent=1))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a neighbour file, flush it, and move it over `path`: a reader sees the old text or the new one, never a
    part.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def is_complete(directory: str | Path) -> bool:
    """Whether COMPLETE is there and every file it names has its size."""
    directory = Path(directory)
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return sizes == marker["files"] and checkpoint_step(directory) == marker.get("step")


def checkpoint_step(directory: str | Path) -> int | None:
    """The step in the name of a checkpoint directory, or None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(directory).name)
    return int(match.group(1)) if match else None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint directories of a run, whole or not, by rising step."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    steps = {path: checkpoint_step(path) for path in output_dir.iterdir() if path.is_dir()}
    return [path for _, path in sorted((step, path) for path, step in steps.items() if step is not None)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step, or None. Checkpoints that are not whole are deleted, with a logged
    warning.
    """
    whole = None
    for path in checkpoints(output_dir):
        if is_complete(path):
            whole = path
        else:
            logger.warning("deleting %s: it is not whole (no valid %s file, or a file of another size)", path, MARKER)
            shutil.rmtree(path, ignore_errors=True)
    return whole


def keep_latest(output_dir: str | Path, count: int) -> None:
    """Delete all but the `count` (>= 1) checkpoints of the highest steps."""
    for path in checkpoints(output_dir)[:-count]:
        # The marker goes first, so that a deletion cut short leaves nothing that looks whole.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
