"""What a teacher says of every token, kept on disk: its k likeliest next tokens, so that training asks no teacher."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from spikelm.errors import SpikelmError
from spikelm.files import PARTIAL, require_free_space, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INDEX = "index.json"
FORMAT = 2


class TeacherStore:
    """Packed contexts with the teacher's k likeliest next tokens and their log probabilities, mapped from the disk.

    Rows {"input_ids" [L], "teacher_ids" [L, k], "teacher_log_probs" [L, k]}: a dataset for
    `spikelm.distill.trainer.train` with `spikelm.distill.stored.StoredDistillation` and `collate_stored`. Opening looks
    at the sizes of the files alone; call `verify` before a training.

    Args:
        directory: written by `store_teacher`.
        teacher: if given, the model that it has to be of.

    Raises:
        SpikelmError: the store is unfinished, damaged, or of another teacher.
    """

    def __init__(self, directory: str | Path, teacher: PreTrainedModel | None = None) -> None:
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        if self.index["done"] < self.index["rows"]:
            raise SpikelmError(
                f"{directory} holds {self.index['done']} of {self.index['rows']} contexts: run its command again"
            )
        if teacher is not None and teacher_fingerprint(teacher) != self.index["teacher"]:
            raise SpikelmError(f"{directory} was made with another teacher than the one given")
        self.arrays = _open(self.directory, self.index, "r")

    def __len__(self) -> int:
        rows: int = self.index["rows"]
        return rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {name: np.array(array[number]) for name, array in self.arrays.items()}

    def verify(self) -> None:
        """Reads everything; SpikelmError where contexts or answers are not what was written.

        About 0.7 s for 1 GB, or 2.5 million tokens at k = 64, where the disk is as fast.
        """
        if rows_fingerprint(self.arrays["input_ids"]) != self.index["data"]:
            raise SpikelmError(f"{self.directory}: the contexts are not those that were stored")
        if _answers_fingerprint(self.arrays) != self.index["answers"]:
            raise SpikelmError(f"{self.directory}: the teacher's answers are not those that were stored")


def store_teacher(
    directory: str | Path,
    teacher: PreTrainedModel,
    contexts: Sequence[Sequence[int]] | np.ndarray,
    *,
    k: int = 64,
    batch_size: int = 8,
) -> TeacherStore:
    """Ask the teacher about every context, [N, L] token ids; interrupted, the same call goes on where it stopped.

    A context takes L (4 + 6 k) bytes: an int32 for each token, and for each of its k likeliest followers an int32 and
    the log probability as float16.

    Raises:
        SpikelmError: the directory holds another store, or the disk has not enough room.
    """
    rows = np.asarray(contexts, dtype=np.int32)
    vocabulary = int(teacher.config.vocab_size)
    if rows.ndim != 2 or not len(rows):
        raise SpikelmError(f"contexts must be [N, L] token ids, given shape {rows.shape}")
    if not 1 <= k <= vocabulary or batch_size < 1:
        raise SpikelmError(f"k must be in 1 .. {vocabulary} and batch_size >= 1, given {k} and {batch_size}")
    directory = Path(directory)
    wanted = {
        "format": FORMAT, "rows": len(rows), "context_length": rows.shape[1], "k": k, "vocab_size": vocabulary,
        "teacher": teacher_fingerprint(teacher), "data": rows_fingerprint(rows),
    }  # fmt: skip
    index = _begin(directory, wanted, rows)
    arrays = _open(directory, index, "r+")
    with tqdm(total=len(rows), initial=index["done"], unit="context", desc="asking the teacher", disable=None) as bar:
        for start in range(index["done"], len(rows), batch_size):
            block = rows[start : start + batch_size]
            ids, log_probs = likeliest(teacher, block, k)
            arrays["teacher_ids"][start : start + len(block)] = ids
            arrays["teacher_log_probs"][start : start + len(block)] = log_probs
            bar.update(len(block))
            if start + len(block) == len(rows) or (start // batch_size) % 32 == 31:
                for array in arrays.values():
                    array.flush()  # first the numbers, then the word that they are there
                index["done"] = start + len(block)
                if index["done"] == len(rows):
                    index["answers"] = _answers_fingerprint(arrays)
                write_json(directory / INDEX, index)
    return TeacherStore(directory)


def likeliest(teacher: PreTrainedModel, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of rows [B, L] the k likeliest followers, by falling probability: ids and log probabilities."""
    import torch

    with torch.no_grad():
        device: Any = teacher.device
        ids = torch.from_numpy(rows.astype(np.int64)).to(device)
        log_probs = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        top = log_probs.topk(k, dim=-1)
    return top.indices.int().cpu().numpy(), top.values.half().cpu().numpy()


def collate_stored(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of a TeacherStore to a batch."""
    import torch

    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return {name: value.long() if name != "teacher_log_probs" else value for name, value in batch.items()}


def read_index(directory: Path) -> dict[str, Any]:
    """What a store says of itself; SpikelmError where there is none, or it is damaged or of another version."""
    try:
        index: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        names = ("rows", "context_length", "k", "vocab_size", "done")
        sound = index["format"] == FORMAT and all(isinstance(index[name], int) and index[name] >= 0 for name in names)
        if not (sound and isinstance(index["teacher"], str) and isinstance(index["data"], str)):
            raise ValueError
        if not (isinstance(index["answers"], str) and isinstance(index["laid_out"], bool)):
            raise ValueError
    except FileNotFoundError as error:
        raise SpikelmError(f"{directory} holds no teacher's store ({INDEX} is missing)") from error
    except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
        raise SpikelmError(f"{directory / INDEX} is damaged, or of another version of spikelm") from error
    return index


def rows_fingerprint(rows: np.ndarray) -> str:
    """Of contexts [N, L]."""
    digest = hashlib.sha256(str(rows.shape).encode())
    for start in range(0, len(rows), 4096):
        digest.update(np.ascontiguousarray(rows[start : start + 4096]).data)
    return digest.hexdigest()


def _answers_fingerprint(arrays: dict[str, Any]) -> str:
    return " ".join(rows_fingerprint(arrays[name]) for name in ("teacher_ids", "teacher_log_probs"))


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """Of a model's weights, by name, type and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(dtype=_bytes()).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def _bytes() -> torch.dtype:
    import torch

    return torch.uint8


def _begin(directory: Path, wanted: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The index to go on from; files of their full size, the contexts in them."""
    if (directory / INDEX).exists():
        index = read_index(directory)
        for name, value in wanted.items():
            if index[name] != value:
                raise SpikelmError(f"{directory} holds another store ({name} {index[name]} there, {value} asked)")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in directory.iterdir() if path.name != INDEX + PARTIAL)
        if others:
            raise SpikelmError(f"{directory} holds files that are no store's ({others[0]}): choose an empty directory")
        index = {**wanted, "done": 0, "laid_out": False, "answers": ""}
        require_free_space(directory, sum(math.prod(shape) * kind.itemsize for shape, kind in _shapes(index).values()))
        write_json(directory / INDEX, index)  # first of all: arrays beside no index are somebody else's
    if not index["laid_out"]:
        _lay_out(directory, index, rows)
        index["laid_out"] = True
        write_json(directory / INDEX, index)
    return index


def _lay_out(directory: Path, index: dict[str, Any], rows: np.ndarray) -> None:
    for name, (shape, kind) in _shapes(index).items():
        array = np.lib.format.open_memmap(directory / f"{name}.npy", "w+", kind, shape)
        if name == "input_ids":
            array[:] = rows
        array.flush()


def _shapes(index: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    tokens = (index["rows"], index["context_length"])
    likeliest_ones = (*tokens, index["k"])
    return {
        "input_ids": (tokens, np.dtype(np.int32)),
        "teacher_ids": (likeliest_ones, np.dtype(np.int32)),
        "teacher_log_probs": (likeliest_ones, np.dtype(np.float16)),
    }


def _open(directory: Path, index: dict[str, Any], mode: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, (shape, kind) in _shapes(index).items():
        path = directory / f"{name}.npy"
        try:
            array = np.lib.format.open_memmap(path, mode)
        except (OSError, ValueError) as error:
            raise SpikelmError(f"{path} is missing or damaged") from error
        if array.shape != shape or array.dtype != kind:
            raise SpikelmError(f"{path} holds {array.dtype} {array.shape}, the index says {kind} {shape}")
        arrays[name] = array
    return arrays
