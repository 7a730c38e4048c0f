"""Several processes on one run (torchrun, accelerate launch): what only the first does, and what if one is lost.

One process needs none of this: world_size() is 1, `on_first_rank(work)` is `work()`, and the rest does nothing.
"""

from __future__ import annotations

import atexit
import json
import math
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
_DONE = "spikelm/done/{}"  # keys of the store: a rank is at its end, and how many know that all are
_KNOWN = "spikelm/known"

Value = TypeVar("Value")


def world_size() -> int:
    """How many processes share the run, as the launcher says; SpikelmError where WORLD_SIZE is no number >= 1."""
    return _whole("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """The number of this process, from 0; SpikelmError where the launcher gave none, or one out of range."""
    processes = world_size()
    if processes == 1:
        return 0
    if "RANK" not in os.environ:
        raise SpikelmError(f"WORLD_SIZE is {processes} and RANK is not set: a launcher (torchrun) sets both")
    number = _whole("RANK", 0, least=0)
    if number >= processes:
        raise SpikelmError(f"RANK must be below WORLD_SIZE = {processes}, given {number}")
    return number


def is_first() -> bool:
    """Whether this process is the one that writes; so is one that start() refuses for its variables."""
    try:
        return rank() == 0
    except SpikelmError:  # an error about them is reported by who is first
        return True


def share_of_update(batch_size: int, gradient_accumulation: int) -> tuple[int, int]:
    """(batch_size, gradient_accumulation) of each process: together they make the update of one process.

    An update holds batch_size * gradient_accumulation rows however many processes share it, and a forward pass at most
    batch_size. SpikelmError where the rows cannot be shared evenly.
    """
    batch_size, gradient_accumulation = int(batch_size), int(gradient_accumulation)
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
    that patience ends every other one with a message that names it: it died, was stopped by the system or cut off. One
    that lives and does not come to an exchange of tensors is noticed by the timeout of the exchange alone. A rank whose
    program ends well is not taken for lost.

    Raises:
        SpikelmError: a variable of the launcher, or one of these two, is missing or no such number; the others do not
            join within SPIKELM_COLLECTIVE_TIMEOUT.
    """
    if world_size() == 1 or _Watch.current is not None:
        return
    rank()  # refuses now what would hang or fail less clearly below
    timeout, patience = _seconds(COLLECTIVE_TIMEOUT, 1800), _seconds(PATIENCE, 120)
    gpu = _whole("LOCAL_RANK", 0, least=0)
    # transformers would take it for its own sharding and load weights on the first rank alone.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[LAUNCHED_FSDP] = "true"
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(gpu)
    if not torch.distributed.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise SpikelmError(f"WORLD_SIZE is {world_size()} and {name} is not set: a launcher (torchrun) sets it")
        try:
            torch.distributed.init_process_group(
                # gloo beside nccl carries what lies on the CPU, as the norm of an offloaded gradient does.
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                timeout=timedelta(seconds=timeout),
            )
        except RuntimeError as error:  # of torch: a timeout, a port that is taken, an address that answers nothing
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise SpikelmError(
                f"rank {rank()} cannot join the other processes at {place} ({str(error).splitlines()[0]}): start all "
                f"of them together; {COLLECTIVE_TIMEOUT}={timeout:g} is how many seconds one waits for the others"
            ) from error
    _Watch.current = _Watch(_default_store(), patience)
    _Watch.current.thread.start()
    atexit.register(_at_exit)


def leave(error: str | None = None) -> None:
    """Part from the others: after all are done, or with the `error` that ends this process."""
    watch = _Watch.current
    if watch is None:
        return
    _Watch.current = None
    if error is None:
        watch.part(wait=True)
        watch.stop()
        torch.distributed.destroy_process_group()
        return
    watch.stop()
    with suppress(RuntimeError):
        watch.store.set(f"spikelm/failed/{rank()}", error)


def _at_exit() -> None:
    """The part of leave() for a program that does not call it: a script or notebook of one's own around train()."""
    watch, error = _Watch.current, getattr(sys, "last_value", None)  # set where the program ends with a traceback
    if watch is None:
        return
    if error is not None:
        leave(f"{type(error).__name__}: {error}")
        return
    # Where no agent of a launcher keeps the store, the first process does: the others need it to the end.
    watch.part(wait=is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    watch.stop()


def on_first_rank(work: Callable[[], Value]) -> Value:
    """`work()` of the first process, whose JSON-able result every process gets; the others wait, however long it takes.

    With several processes the result is what JSON makes of it, on the first one too: a tuple comes back as a list.
    Within `work` the first process is alone: what it calls that would wait for the others runs at once. An error of
    `work` is raised on every process, as itself on the first and as a SpikelmError on the others.
    """
    watch = _Watch.current
    if watch is None or watch.alone:
        return work()
    watch.calls += 1
    key = f"spikelm/first/{watch.calls}"
    if not is_first():
        found = json.loads(watch.value_from_first(key))
        if "error" in found:
            raise SpikelmError(f"rank 0 stopped: {found['error']}")
        given: Value = found["value"]
        return given
    watch.alone = True
    try:
        message = json.dumps({"value": work()})
    except BaseException as error:
        watch.store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    finally:
        watch.alone = False
    watch.store.set(key, message)
    value: Value = json.loads(message)["value"]
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
    """The store that all processes share, and a thread that leaves a sign of life there and looks for the others'.

    The sign says that the process runs, not that its main thread gets on.
    """

    current: _Watch | None = None

    def __init__(self, store: Any, patience: float) -> None:
        self.store, self.patience = store, patience
        self.calls = 0
        self.alone = False
        self._parting = False
        self.thread = threading.Thread(target=self._run, name="spikelm ranks", daemon=True)
        self._stopped = threading.Event()
        # A connection of its own: one that waits for a key blocks every other call.
        self._own = store.clone() if hasattr(store, "clone") else store

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join(5)

    def value_from_first(self, key: str) -> str:
        """What the first process says under a key, once it does. The thread ends the wait where a rank is lost."""

        def said() -> bool:
            ended = self.store.check([_DONE.format(0)])  # asked first: it says all that it has to say before it ends
            if self.store.check([key]):
                return True
            if ended:
                raise SpikelmError(f"rank 0 has ended while rank {rank()} waits for a result of it")
            return False

        _until(said)
        return str(self.store.get(key), "utf-8")

    def part(self, wait: bool) -> None:
        """Says that this process is done; with `wait` returns once every process is.

        The first then stays until the others know, for its end may be the end of the store.
        """
        self._parting = True
        processes = world_size()
        with suppress(RuntimeError):  # the store is gone: so are those it was for
            self.store.set(_DONE.format(rank()), "1")
            if wait:
                _until(lambda: self.store.check([_DONE.format(number) for number in range(processes)]))
            self.store.add(_KNOWN, 1)
            if wait and is_first():
                _until(lambda: self.store.add(_KNOWN, 0) >= processes, at_most=self.patience)

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
                    if self._own.check([_DONE.format(other)]):
                        continue
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
            if not self._stopped.is_set() and not self._parting:
                _end(f"rank {me} has lost the store of the launcher ({str(error).splitlines()[0]})")


def _end(message: str) -> None:
    """Leave at once: the main thread may wait in an exchange that nobody answers."""
    print(f"error: {message}: run the same command again to resume", file=sys.stderr, flush=True)
    os._exit(1)


def _until(there: Callable[[], bool], at_most: float = math.inf) -> None:
    """Returns once there() holds, or after at_most seconds."""
    pause, end = 0.01, time.monotonic() + at_most
    while not there() and time.monotonic() < end:
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)


def _whole(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise SpikelmError(f"{name} must be a whole number >= {least}, given {text!r}")
    return value


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e9:  # not NaN or infinite either
        raise SpikelmError(f"{name} must be a number of seconds > 0, given {text!r}")
    return value


def _default_store() -> Any:
    from torch.distributed import PrefixStore, distributed_c10d

    return PrefixStore("spikelm", distributed_c10d._get_default_store())
