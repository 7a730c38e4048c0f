"""Files that are whole or absent, and directories whose manifest tells a damaged file from a good one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from spikelm.errors import SpikelmError
from spikelm.limits import check_file_name

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a neighbour file, flush it and move it over `path`: a reader sees the old content or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content)
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise
    _flush(path.parent)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as JSON to `path`, whole or not at all; SpikelmError for a NaN or an infinite number."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise SpikelmError(f"{path.name} cannot be written: it would hold a NaN or an infinite number") from error
    return write_text(path, text)


def put_in_place(partial: Path, final: Path, **facts: Any) -> None:
    """Give the directory `partial` its manifest and the name `final`, once all of it is on the disk.

    manifest.json holds the facts (JSON-able), "files": of every file its size in "bytes" and its "sha256", and its own
    "sha256". Raises OSError where `final` is there and not empty.
    """
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        _flush(path)
        files[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {**facts, "files": files}
    write_json(partial / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    for directory in (path for path in partial.rglob("*") if path.is_dir()):
        _flush(directory)
    os.replace(partial, final)
    _flush(final.parent)


def read_manifest(directory: Path, contents: bool = True) -> dict[str, Any]:
    """The manifest that put_in_place wrote; SpikelmError says which file is missing, or not what was written.

    contents: False compares sizes alone, True the SHA-256 of all files too (about 1 s per GB).
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if any(isinstance(of, int) for of in manifest["files"].values()):
            raise SpikelmError(f"{MANIFEST} is of a version of spikelm that kept no SHA-256")
        if manifest.pop("sha256") != _digest(manifest):
            raise SpikelmError(f"{MANIFEST} is not what was written (its SHA-256 is another)")
        files = {
            check_file_name(name, parts=True): (of["bytes"], of["sha256"]) for name, of in manifest["files"].items()
        }
    except SpikelmError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SpikelmError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise SpikelmError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SpikelmError(f"{MANIFEST} is not readable") from error
    for name, (size, digest) in files.items():
        try:
            wrong = _difference(directory / name, size, digest if contents else None)
        except OSError as error:  # a bad sector, for one
            raise SpikelmError(f"{name[:200]} cannot be read ({error.strerror})") from error
        if wrong:
            raise SpikelmError(f"{name} {wrong}")
    return manifest


def _difference(path: Path, size: int, digest: str | None) -> str | None:
    """In what a file is not what was written, None where it is."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, {size} were written"
    return "is not what was written (its SHA-256 is another)" if digest and sha256(path) != digest else None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a file or a whole directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_free_space(path: str | Path, needed: int) -> None:
    """SpikelmError naming needed and free when the disk of `path` (existing or not) has less than `needed` bytes."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SpikelmError(f"not enough disk space for {path}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


def _flush(path: Path) -> None:
    """Have the system put a file, or a directory's entries, on the disk before anything is renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
