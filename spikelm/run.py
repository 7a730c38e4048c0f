"""One output directory, one run: stages that are whole or absent, and the errors a user sees."""

import ctypes
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

import torch

from spikelm import __version__, distributed
from spikelm.errors import SpikelmError
from spikelm.files import PARTIAL, put_in_place, read_manifest, remove, write_json

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
BAD_DOCUMENTS = "bad_documents.json"  # what reading the data left out, where there was any
# Fields of a configuration that say how a run is carried out: they may be others when it is resumed.
CARRYING_OUT = ("parallel", "keep_checkpoints", "max_skipped_updates", "max_bad_documents")


class RunDirectory:
    """The directory of one run, locked while this object lives; the same configuration resumes it.

    run.json holds the configuration. A finished stage is a directory with a manifest.json that names its files, their
    sizes and digests; it appears under its own name only when it is whole. Raises SpikelmError when the directory holds
    a run of another configuration (its place, the field `output_dir`, and the fields of CARRYING_OUT are not compared),
    files that are no run's, or is in use by another process.

    With several_processes, under torchrun, the first process alone locks, reads and writes; the others wait for it and
    get what it read. All of them call the same methods in the same order, or the first alone within
    `distributed.on_first_rank`.
    """

    def __init__(self, output_dir: str | Path, config: Mapping[str, Any], several_processes: bool = False) -> None:
        if distributed.world_size() > 1 and not several_processes:
            raise SpikelmError(f"WORLD_SIZE={distributed.world_size()}: this program runs in a single process")
        distributed.start()
        self.root = Path(output_dir)
        self._lock: IO[str] | None = None
        self._verified: set[str] = set()  # stages whose contents were compared; later calls look at sizes alone
        plain: dict[str, Any] = json.loads(json.dumps(config))
        self.resumed: bool = distributed.on_first_rank(lambda: self._open(plain))

    def _open(self, config: dict[str, Any]) -> bool:
        """Lock the directory; whether it holds this run already."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_unrelated_files()
            # Held by the open file, so the operating system frees it however the process ends: no stale locks.
            self._lock = open(self.root / LOCK_FILE, "a")
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise SpikelmError(f"output_dir {self.root} cannot be used: {error.strerror}") from error
        try:
            return self._open_locked(self._lock, config)
        except BaseException:
            self._lock.close()
            raise

    def _open_locked(self, lock: IO[str], config: dict[str, Any]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpikelmError(f"{self.root} is in use by another process that runs there now") from error
        resumed = (self.root / RUN_FILE).exists()
        if resumed:
            self._refuse_other_config(config)
        else:
            write_json(self.root / RUN_FILE, {"config": config})
        for leftover in self.root.glob(f"*{PARTIAL}"):
            remove(leftover)
        return resumed

    def _refuse_unrelated_files(self) -> None:
        if (self.root / RUN_FILE).exists():
            return
        others = self._others()
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise SpikelmError(f"{self.root} holds files that are no run's ({shown}): choose an empty output_dir")

    def _others(self) -> list[str]:
        """What the directory holds beside the files of this class."""
        # A process that died between taking the lock and writing run.json leaves the partial one.
        own = {LOCK_FILE, RUN_FILE, RUN_FILE + PARTIAL, BAD_DOCUMENTS}
        return sorted(entry.name for entry in self.root.iterdir() if entry.name not in own)

    def _refuse_other_config(self, config: dict[str, Any]) -> None:
        try:
            before = json.loads((self.root / RUN_FILE).read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SpikelmError(f"{self.root / RUN_FILE} is damaged: delete {self.root} or choose another") from error
        difference = first_difference(_without_place(before), _without_place(config))
        if difference is not None:
            raise SpikelmError(
                f"{self.root} already holds another run ({difference}): choose another output_dir or delete this one"
            )

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if distributed.is_first() and error is not None and not self.resumed and not self._others():
            # What failed before it made anything is no run: the corrected command may use the same place.
            remove(self.root / RUN_FILE)
        self.close()

    def close(self) -> None:
        """Free the lock; the object is not to be used afterwards."""
        if self._lock is not None:
            self._lock.close()

    def path(self, name: str) -> Path:
        """Where a stage or file of this name lies, existing or not."""
        return self.root / name

    def is_done(self, stage: str) -> bool:
        """True when the stage is finished and whole, False when it is absent; SpikelmError when it is damaged.

        The first look reads all of it (about 1 s per GB), later ones its files' sizes.
        """

        def look() -> bool:
            if not self.path(stage).exists():
                return False
            self._manifest(stage)
            return True

        return distributed.on_first_rank(look)

    def stage_record(self, stage: str) -> dict[str, Any]:
        """The record that finish_stage was given; SpikelmError when the stage is absent or damaged."""
        record: dict[str, Any] = distributed.on_first_rank(lambda: self._manifest(stage)["record"])
        return record

    def finish_stage(self, stage: str, write: Callable[[Path], Any], record: Mapping[str, Any]) -> Path:
        """Let write(directory) fill a partial directory, then put it in place under the stage's name; return that.

        `record` (JSON-able) is kept in the manifest. Nothing is left behind when writing fails.
        """
        distributed.on_first_rank(lambda: self._finish_stage(stage, write, record))
        return self.path(stage)

    def _finish_stage(self, stage: str, write: Callable[[Path], Any], record: Mapping[str, Any]) -> None:
        final = self.path(stage)
        if final.exists():
            raise SpikelmError(f"{final} is there already: a finished stage is not overwritten")
        partial = self.path(stage + PARTIAL)
        remove(partial)
        partial.mkdir()
        try:
            write(partial)
            put_in_place(partial, final, stage=stage, record=dict(record))
        except BaseException:
            remove(partial)
            raise
        self._verified.add(stage)

    def _manifest(self, stage: str) -> dict[str, Any]:
        manifest = stage_manifest(self.path(stage), contents=stage not in self._verified)
        self._verified.add(stage)
        return manifest

    def write_json(self, name: str, value: Any) -> Path:
        """Write the file `name` of this run as JSON, whole or not at all."""
        return Path(distributed.on_first_rank(lambda: str(write_json(self.path(name), value))))

    def read_json(self, name: str) -> Any:
        """The value written by write_json; SpikelmError when the file is absent or damaged."""

        def read() -> Any:
            try:
                return json.loads(self.path(name).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError, RecursionError) as error:
                raise SpikelmError(f"{self.path(name)} is missing or damaged") from error

        return distributed.on_first_rank(read)


def stage_manifest(directory: Path, contents: bool = True) -> dict[str, Any]:
    """The manifest of a finished stage; SpikelmError naming the file when one is missing or not what was written.

    contents: False compares the files' sizes alone.
    """
    try:
        manifest = read_manifest(directory, contents)
        if not isinstance(manifest.get("record"), dict):
            raise SpikelmError("manifest.json is not readable")
    except SpikelmError as error:
        raise SpikelmError(
            f"stage {directory.name!r} is damaged: {error}; delete {directory} to run it again"
        ) from error
    return manifest


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """ "field=a there, field=b asked" for the first field that differs between two configurations, None when equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        # A field that the older run did not know, and that is null, changes nothing.
        for key in [*before, *(key for key in now if key not in before and now[key] is not None)]:
            place = f"{name}.{key}" if name else key
            if key not in before or key not in now:
                return f"{place} is {'new' if key in now else 'not known any more'}"
            difference = first_difference(before[key], now[key], place)
            if difference is not None:
                return difference
        return None
    return None if before == now else f"{name}={_shown(before)} there, {name}={_shown(now)} asked"


def command_line(main: Callable[[], Any]) -> NoReturn:
    """Run an example's main and leave with its exit status: expected failures become one line on stderr.

    0 done, 2 a SpikelmError, 1 no disk space or another process of the run lost, 130 interrupted; other exceptions keep
    their traceback. Several processes end together.
    """
    try:
        main()
        distributed.leave()
    except SpikelmError as error:
        _leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        _leave("interrupted: run the same command again to resume", 130)
    except Exception as error:
        lost = distributed.lost_rank(error)
        if lost is not None:
            _leave(f"error: {lost}: run the same command again to resume", 1)
        if not _is_full_disk(error):
            distributed.leave(f"{type(error).__name__}: {error}")
            raise
        _leave(f"error: no space left on the disk ({error}): free some and run the same command again to resume", 1)
    sys.exit(0)


def keep_freed_memory() -> None:
    """Lets glibc reuse the memory of freed tensors instead of handing it back and faulting it in again at every step.

    Speeds up training of small models on a CPU; does nothing where the C library is another. [ours]
    """
    keep_below, never_trim = 32 * 2**20, 2**30  # glibc accepts no larger threshold for the first
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, keep_below)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, never_trim)  # M_TRIM_THRESHOLD


def versions() -> dict[str, Any]:
    """Versions of what a result depends on, and the machine; None for a package that is not installed."""
    packages = ("torch", "transformers", "spikingjelly", "datasets", "tokenizers", "accelerate", "numpy")
    found: dict[str, Any] = {"spikelm": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["machine"] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return found


def _cpu_name() -> str:
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        for line in cpu_information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _leave(message: str, status: int) -> NoReturn:
    line = " ".join(message.split())
    print(line if distributed.is_first() else f"rank {distributed.rank()}: {line}", file=sys.stderr)
    distributed.leave(line)
    sys.exit(status)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that the disk is full, in whichever library's words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors quotes the system's words; torch.save names only its zip writer, which fails for want of space.
        if "No space left on device" in str(error) or "enforce fail at inline_container" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_place(config: Any) -> Any:
    """A configuration without where it lies and how it is carried out, that of a run it starts from included."""
    if not isinstance(config, dict):
        return config
    return _without_carrying_out({key: value for key, value in config.items() if key != "output_dir"})


def _without_carrying_out(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_carrying_out(each) for key, each in value.items() if key not in CARRYING_OUT}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
