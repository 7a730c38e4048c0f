"""Several processes on one run (torchrun, accelerate launch): what only the first does, and what if one is lost.

One process needs none of this: world_size() is 1, `on_first_rank(work)` is `work()`, and the rest does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from spikelm.errors import SpikelmError

PATIENCE = "SPIKELM_RANK_PATIENCE"  # environment: seconds without a sign of life after which a rank counts as lost
COLLECTIVE_TIMEOUT = "SPIKELM_COLLECTIVE_TIMEOUT"  # environment: seconds that one exchange of tensors may take
LAUNCHED_FSDP = "SPIKELM_LAUNCHED_FSDP"  # environment: set by start() where accelerate launch asked for FSDP
SIGN_OF_LIFE_S = 1.0

Value = TypeVar("Value")


def world_size() -> int:
    """How many processes share the run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def share_of_update(batch_size: int, gradient_accumulation: int) -> tuple[int, int]:
    """(batch_size, gradient_accumulation) of each process: together they make the update of one process.

    An update holds batch_size * gradient_accumulation rows however many processes share it, and a forward pass at most
    batch_size. SpikelmError where the rows cannot be shared evenly.
    """
    update, processes = batch_size * gradient_accumulation, world_size()
    if update % processes:
        raise SpikelmError(
            f"an update of batch_size {batch_size} x gradient_accumulation {gradient_accumulation} = {update} rows "
            f"cannot be shared evenly by {processes} processes"
        )
    own = update // processes
    batch = max(size for size in range(1, min(batch_size, own) + 1) if own % size == 0)
    return batch, own // batch


def start() -> None:
    """Join the other processes, once; on CUDA the process takes the GPU of its LOCAL_RANK. Nothing for one process.

    SPIKELM_COLLECTIVE_TIMEOUT (1800) and SPIKELM_RANK_PATIENCE (120) are seconds. A rank that shows no sign of life for
    that patience ends every other one with a message that names it.
    """
    if world_size() == 1 or _Watch.current is not None:
        return
    # transformers would take it for its own sharding and load weights on the first rank alone.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[LAUNCHED_FSDP] = "true"
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            # gloo beside nccl carries what lies on the CPU, as the norm of an offloaded gradient does.
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(seconds=_seconds(COLLECTIVE_TIMEOUT, 1800)),
        )
    _Watch.current = _Watch(_default_store(), _seconds(PATIENCE, 120))
    _Watch.current.thread.start()


def leave(error: str | None = None) -> None:
    """Part from the others: after all are done, or with the `error` that ends this process."""
    watch = _Watch.current
    if watch is None:
        return
    _Watch.current = None
    if error is None:
        watch.meet("end")
        watch.stop()
        torch.distributed.destroy_process_group()
        return
    watch.stop()
    with suppress(RuntimeError):
        watch.store.set(f"spikelm/failed/{rank()}", error)


def on_first_rank(work: Callable[[], Value]) -> Value:
    """`work()` of the first process, whose JSON-able result every process gets; the others wait, however long it takes.

    Within `work` the first process is alone: what it calls that would wait for the others runs at once. An error of
    `work` is raised on every process, as itself on the first and as a SpikelmError on the others.
    """
    watch = _Watch.current
    if watch is None or watch.alone:
        return work()
    watch.calls += 1
    key = f"spikelm/first/{watch.calls}"
    if not is_first():
        found = json.loads(watch.wait(key))
        if "error" in found:
            raise SpikelmError(f"rank 0 stopped: {found['error']}")
        result: Value = found["value"]
        return result
    watch.alone = True
    try:
        value = work()
        message = json.dumps({"value": value})
    except BaseException as error:
        watch.store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    finally:
        watch.alone = False
    watch.store.set(key, message)
    return value


def lost_rank(error: BaseException) -> str | None:
    """A sentence about the rank that is gone, where an exchange of tensors failed for want of it; None otherwise."""
    watch, text = _Watch.current, str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out", "NCCL", "Broken pipe", "[c10d]")
    if watch is None or not isinstance(error, RuntimeError) or not any(sign in text for sign in signs):
        return None
    silent = watch.silent_within(5 * SIGN_OF_LIFE_S)
    which = "another rank" if not silent else "rank " + ", ".join(map(str, silent))
    return f"{which} is gone, and rank {rank()} cannot go on without it"


class _Watch:
    """The store that all processes share, and a thread that leaves a sign of life there and looks for the others'."""

    current: _Watch | None = None

    def __init__(self, store: Any, patience: float) -> None:
        self.store, self.patience = store, patience
        self.calls = 0
        self.alone = False
        self.thread = threading.Thread(target=self._run, name="spikelm ranks", daemon=True)
        self._stopped = threading.Event()
        # A connection of its own: one that waits for a key blocks every other call.
        self._own = store.clone() if hasattr(store, "clone") else store

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join(5)

    def wait(self, key: str) -> str:
        """The value of a key, as soon as there is one. The thread sees to it that this ends."""
        pause = 0.01
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)
        return str(self.store.get(key), "utf-8")

    def meet(self, name: str) -> None:
        """Returns once every process has come here."""
        if self.store.add(f"spikelm/{name}", 1) == world_size():
            self.store.set(f"spikelm/{name}/all", "1")
        self.wait(f"spikelm/{name}/all")

    def silent_within(self, seconds: float) -> list[int]:
        """The other ranks that failed, or leave no sign of life for that long."""
        first = {other: self._signs(other) for other in range(world_size()) if other != rank()}
        time.sleep(seconds)
        return [other for other, sign in first.items() if sign is None or self._signs(other) in (sign, None)]

    def _signs(self, other: int) -> int | None:
        """How often a rank has been heard of; None where it failed."""
        with suppress(RuntimeError):
            if not self.store.check([f"spikelm/failed/{other}"]):
                return int(self.store.add(f"spikelm/alive/{other}", 0))
        return None

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        me, processes = rank(), world_size()
        try:
            while not self._stopped.wait(SIGN_OF_LIFE_S):
                self._own.add(f"spikelm/alive/{me}", 1)
                now = time.monotonic()
                for other in range(processes):
                    if self._own.check([f"spikelm/failed/{other}"]):
                        # Those that fail of the same cause say so themselves, and are gone by then.
                        self._stopped.wait(5 * SIGN_OF_LIFE_S)
                        if not self._stopped.is_set():
                            _end(f"rank {other} stopped: {str(self._own.get(f'spikelm/failed/{other}'), 'utf-8')}")
                    count = self._own.add(f"spikelm/alive/{other}", 0)
                    if other not in seen or seen[other][0] != count:
                        seen[other] = (count, now)
                    elif other != me and now - seen[other][1] > self.patience:
                        _end(f"rank {other} has not been heard of for {self.patience:g} s")
        except RuntimeError as error:
            if not self._stopped.is_set():
                _end(f"rank {me} has lost the store of the launcher ({str(error).splitlines()[0]})")


def _end(message: str) -> None:
    """Leave at once: the main thread hangs in an exchange that nobody answers."""
    print(f"error: {message}: run the same command again to resume", file=sys.stderr, flush=True)
    os._exit(1)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise SpikelmError(f"{name} must be a number of seconds > 0, given {text!r}")
    return value


def _default_store() -> Any:
    from torch.distributed import PrefixStore, distributed_c10d

    return PrefixStore("spikelm", distributed_c10d._get_default_store())
