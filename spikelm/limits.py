"""What a model directory of unknown origin may ask for: no pickle, no other directory's files, no absurd size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spikelm.errors import SpikelmError

MOST_LAYERS = 4096
MOST_STEPS = 4096  # time steps, and TILIF's levels, of which encode makes a frame each
MOST_SIZE = 2**31 - 1  # of a width, a vocabulary, a context
MOST_JSON_BYTES = 16 << 20
MOST_VALUES = 100_000  # of a preset, which may name a list of lists of lists many times
_STEPS = {"T", "D"}
_LAYERS = re.compile(r"layers?$")
_SIZES = re.compile(r"(size|dim|width|heads|groups|experts|expand|multiple|embeddings|_length|d_\w+|n_embd|n_inner)$")
_HIDDEN, _DEPTH = ("hidden_size", "d_model", "n_embd"), ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What torch.load would have to read.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most MOST_JSON_BYTES; SpikelmError for anything else."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise SpikelmError(f"{path} has {path.stat().st_size} bytes; at most {MOST_JSON_BYTES} are accepted")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpikelmError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, SpikelmError):
            raise
        raise SpikelmError(f"{path} is no JSON: {' '.join(str(error).split())}") from error


def check_bounded(value: Any) -> None:
    """SpikelmError for more than MOST_VALUES values at any depth, or an integer of more than 64 bits."""
    for count, (name, one) in enumerate(_leaves(value)):
        if count >= MOST_VALUES:
            raise SpikelmError(f"more than {MOST_VALUES} values")
        if isinstance(one, int) and one.bit_length() > 64:
            raise SpikelmError(f"{name} is {_shown(one)}; at most 64 are accepted")


def check_sizes(fields: Mapping[str, Any]) -> None:
    """SpikelmError for a layer count, a width or a number of steps that no model has, at any depth of ``fields``.

    Names decide: what ends in "layers" is at most MOST_LAYERS, T and D MOST_STEPS, what ends in "size", "dim", "heads"
    and the like MOST_SIZE.
    """
    for name, value in _leaves(fields):
        most = MOST_STEPS if name in _STEPS else MOST_LAYERS if _LAYERS.search(name) else MOST_SIZE
        named = name in _STEPS or _LAYERS.search(name) or _SIZES.search(name)
        if named and isinstance(value, int | float) and not -most <= value <= most:
            raise SpikelmError(f"{name} must be at most {most}; got {_shown(value)}")


def check_directory(directory: str | Path, role: str = "model") -> None:
    """SpikelmError for a model directory that must not be loaded; nothing of its weights is read.

    Refused are weights in a pickle alone, an index that names files of other directories, sizes that
    :func:`check_sizes` refuses, and more parameters than the files can hold at one bit each. A name of the Hub passes.
    """
    root = Path(directory)
    try:
        if not (root / "config.json").is_file():
            return
        inside = sorted(root.iterdir())
    except OSError as error:  # a name that no file can have, or a directory that cannot be listed
        raise SpikelmError(f"{role} {_shown(str(root))} cannot be read: {error.strerror}") from error
    config = read_json(root / "config.json")
    if not isinstance(config, dict):
        raise SpikelmError(f"{role} {root}: config.json must hold an object; got {type(config).__name__}")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise SpikelmError(f"{role} {root}: architectures must be a list of names; got {_shown(architectures)}")
    try:
        check_sizes(config)
        for index in (path for path in inside if path.name.endswith(".safetensors.index.json")):
            _check_index(read_json(index), index.name)
    except SpikelmError as error:
        raise SpikelmError(f"{role} {root}: {error}") from error
    files = [path for path in inside if path.suffix == ".safetensors" and path.is_file()]
    pickled = [path.name for path in inside if path.suffix in _PICKLED]
    if not files and pickled:
        raise SpikelmError(
            f"{role} {root} has its weights in {pickled[0]}, which is read by unpickling; .safetensors files are "
            "accepted: load it where you trust it and save_pretrained() it"
        )
    least, held = _least_parameters(config), 8 * sum(path.stat().st_size for path in files)
    if files and least > held:
        raise SpikelmError(
            f"{role} {root}: config.json asks for {least:,} parameters or more, and its .safetensors files hold "
            f"{held:,} bits"
        )


def check_weight_files(files: Iterable[str | Path], parameters: int) -> None:
    """SpikelmError unless all are .safetensors whose tensors have at least half as many elements as ``parameters``.

    Half, because tied weights are counted twice before they are tied.
    """
    from safetensors import SafetensorError, safe_open

    stored = 0
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise SpikelmError(f"the checkpoint's weights are in {path.name}; .safetensors files alone are accepted")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    stored += math.prod(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise SpikelmError(f"the checkpoint's file {path.name} is damaged: {error}") from error
    if parameters > 2 * stored + 1024:
        raise SpikelmError(f"the configuration asks for {parameters:,} parameters; the files hold {stored:,}")


def check_file_name(name: Any, parts: bool = False) -> str:
    """A file's name as an index or a manifest may name one: without a directory, or with ``parts`` one further down.

    Raises:
        SpikelmError: a name that leads elsewhere, or that no file can have.
    """
    names = name.split("/") if parts and isinstance(name, str) else [name]
    for one in names:
        right = isinstance(one, str) and 0 < len(one.encode(errors="replace")) <= 255 and one not in (".", "..")
        if not right or re.search(r"[/\\\0]", one):
            raise SpikelmError(f"a file of the same directory must be named; got {_shown(name)}")
    return str(name)


def _check_index(index: Any, name: str) -> None:
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise SpikelmError(f"{name} must hold an object with a weight_map")
    for file in files.values():
        try:
            check_file_name(file)
        except SpikelmError as error:
            raise SpikelmError(f"{name}: {error}") from error


def _leaves(value: Any) -> Iterable[tuple[str, Any]]:
    """Every (key, value that is no container) at any depth, and every container; a list's values have its key."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        name, one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += [(str(key), inner) for key, inner in one.items()]
        elif isinstance(one, list | tuple):
            waiting += [(name, inner) for inner in one]
        yield name, one


def _least_parameters(config: Mapping[str, Any]) -> int:
    """Fewer than any transformer of these sizes has: its embedding, and a square matrix for every layer."""

    def first(names: tuple[str, ...]) -> int:
        return next((_count(config[name]) for name in names if name in config), 0)

    hidden, layers = first(_HIDDEN), first(_DEPTH)
    return hidden * (_count(config.get("vocab_size")) + layers * hidden)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _shown(value: Any) -> str:
    """A few characters of a value of any length."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
