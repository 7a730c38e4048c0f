"""Where built kernels are kept: a directory that is the user's alone, and files that are what was built.

A kernel is code that this process runs, so whoever can write one runs code as this user. The directory keeps others
out; the digest beside each kernel finds what is damaged, cut off or replaced by hand. It does not guard against who can
write to the directory: this user's own processes and the administrator's, which could write the digest as well.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from spikelm.errors import SpikelmError, warn_once

_KEY = re.compile(r"[0-9a-f]{32}")
_DIGEST = ".sha256"  # as sha256sum writes it, and checks it with -c
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ELSEWHERE = "set SPIKELM_CACHE to a directory of your own"


def cache_directory() -> Path:
    """Where built kernels are kept: $SPIKELM_CACHE, else ~/.cache/spikelm."""
    return Path(os.environ.get("SPIKELM_CACHE") or Path.home() / ".cache" / "spikelm")


def kernel_path(kind: str, key: str, suffix: str) -> Path:
    """The place of a kernel of a kind, "cpu" or "cuda": keys are 32 hexadecimal digits, so none names another place."""
    if not _KEY.fullmatch(key):
        raise SpikelmError(f"a kernel's key must be 32 hexadecimal digits; got {key!r}")
    return cache_directory() / kind / f"{key}{suffix}"


def private_directory(kind: str) -> Path:
    """The directory of a kind of kernels, made if need be: this user's, no link, mode 0700.

    Raises:
        SpikelmError: it, or the cache that it lies in, is a link, another's, or others can write to it.
        OSError: it cannot be made.
    """
    root = cache_directory()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = _check_owner(root)
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:  # in /tmp nobody moves another's directory
        raise SpikelmError(
            f"others can write to {root}, where kernels would be kept: chmod go-w {root}, or {_ELSEWHERE}"
        )
    folder = root / kind
    folder.mkdir(mode=0o700, exist_ok=True)
    found = _check_owner(folder)
    if found.st_mode & _OTHERS_WRITE:
        raise SpikelmError(f"others can write to {folder}, so its kernels may be theirs: delete it, or {_ELSEWHERE}")
    if stat.S_IMODE(found.st_mode) != 0o700:  # which others could read alone
        folder.chmod(0o700)
    return folder


def _check_owner(directory: Path) -> os.stat_result:
    found, trusted = directory.lstat(), {os.geteuid()}
    if not stat.S_ISDIR(found.st_mode):
        raise SpikelmError(f"{directory}, where kernels would be kept, is a link: {_ELSEWHERE}")
    if found.st_mode & stat.S_ISVTX:  # the administrator's /tmp
        trusted.add(0)
    if found.st_uid not in trusted:
        raise SpikelmError(
            f"{directory}, where kernels would be kept, belongs to user {found.st_uid}, not to {os.geteuid()}: "
            f"{_ELSEWHERE}"
        )
    return found


def read_kernel(path: Path) -> bytes | None:
    """A kernel as it was kept; None where there is none, or one whose digest is missing or another."""
    try:
        content, said = path.read_bytes(), _digest_path(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    return content if said == _line(path, content) else None


def warn_of_damage(path: Path) -> None:
    """A warning where a kernel and its digest are there; to be called where read_kernel finds no whole one."""
    if path.exists() and _digest_path(path).exists():  # older versions kept no digests
        warn_once(f"{path} is not what was built there, by its SHA-256 in {_digest_path(path).name}: it is built anew")


def keep_kernel(path: Path, content: bytes) -> None:
    """Writes a kernel and its digest, each whole or not at all; who reads between the two finds no whole kernel."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for place, data in ((_digest_path(path), _line(path, content).encode()), (path, content)):
            (Path(folder) / place.name).write_bytes(data)
            os.replace(Path(folder) / place.name, place)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + _DIGEST)


def _line(path: Path, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
