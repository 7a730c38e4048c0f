"""The rows of a training shared by several processes: each global batch is the one that a single process would see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from spikelm.distributed import rank, world_size

FILLER = "filler"  # a key of a row, and of a batch that does not count

_weight: ContextVar[int | None] = ContextVar("weight", default=None)  # of this process's part of a shared batch


@dataclass(frozen=True)
class Share:
    """This process's part of every global batch of `batch_size` rows a process, taken in the order of ranks.

    A short last batch is taken alike; who would get nothing gets the batch's first row as a filler, that the processes
    stay in step, and the filler counts for nothing.
    """

    batch_size: int
    rank: int
    processes: int

    @classmethod
    def of_this_process(cls, batch_size: int) -> Share:
        """The share of the process that calls."""
        return cls(batch_size, rank(), world_size())

    def take(self, rows: Sequence[Any]) -> tuple[list[Any], bool]:
        """Of a global batch the rows of this process, and whether they are a filler."""
        own = list(rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size])
        return (own, False) if own else ([rows[0]], True)


class SharedBatches(BatchSampler):
    """Batches of row numbers for one process; a filler's number is ~number."""

    def __init__(self, sampler: Sampler[int], share: Share) -> None:
        super().__init__(sampler, share.batch_size * share.processes, drop_last=False)
        self.share = share

    def __iter__(self) -> Iterator[list[int]]:
        for numbers in super().__iter__():
            own, filler = self.share.take(numbers)
            yield [~number for number in own] if filler else own


class SharedRows(Dataset[Any]):
    """A dataset in which ~number is row `number` as a filler."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[number if number >= 0 else ~number]
        return row if number >= 0 else {**row, FILLER: True}


class SharedStream(IterableDataset[Any]):
    """Of a stream of rows those of one process; every process reads the stream and keeps its own rows of it."""

    def __init__(self, rows: Iterable[dict[str, Any]], share: Share) -> None:
        self.rows, self.share = rows, share

    def set_epoch(self, epoch: int) -> None:
        """Has a stream that is shuffled anew for each pass do so."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.rows)
        while batch := list(islice(rows, self.share.batch_size * self.share.processes)):
            own, filler = self.share.take(batch)
            yield from ({**row, FILLER: True} for row in own) if filler else own


@contextmanager
def part_of_batch(filler: bool) -> Iterator[None]:
    """Within the context every process works on its part of one batch."""
    before = _weight.set(0 if filler else 1)
    try:
        yield
    finally:
        _weight.reset(before)


def sum_over_parts(values: Tensor) -> Tensor:
    """The sum over all parts of the batch, without a gradient and without fillers; `values` where none is shared.

    Every process calls it, one that has a filler too.
    """
    weight = _weight.get()
    if weight is None:
        return values.detach()
    total = values.detach() * weight
    torch.distributed.all_reduce(total)
    return total


def loader_of_trainer(trainer: Any) -> Any:
    """This process's training batches for a transformers.Trainer of several."""
    from accelerate.data_loader import prepare_data_loader

    arguments, rows = trainer.args, trainer.train_dataset
    share = Share.of_this_process(arguments.train_batch_size)
    options = {"pin_memory": arguments.dataloader_pin_memory}
    loader = shared_loader(rows, trainer._get_train_sampler(rows), trainer.data_collator, share, **options)
    # It is shared already: accelerate is told of one process.
    return prepare_data_loader(loader, arguments.device, 1, 0, put_on_device=True, dispatch_batches=False)


def shared_loader(
    rows: Any, sampler: Sampler[int] | None, collate: Callable[..., dict[str, Tensor]], share: Share, **options: Any
) -> DataLoader[Any]:
    """Batches of this process. sampler: the order of one process's rows; None for a stream.

    options: further arguments of DataLoader.
    """
    from torch.utils.data import RandomSampler

    def collate_share(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        filler = any(FILLER in row for row in found)
        batch = collate([{name: value for name, value in row.items() if name != FILLER} for row in found])
        return {**batch, FILLER: torch.tensor(True)} if filler else batch

    if sampler is None:
        stream = SharedStream(rows, share)
        return DataLoader(stream, batch_size=share.batch_size, collate_fn=collate_share, **options)
    if isinstance(sampler, RandomSampler):
        from accelerate.data_loader import SeedableRandomSampler

        sampler = SeedableRandomSampler(rows, generator=torch.Generator())  # as accelerate does for one process
    return DataLoader(
        SharedRows(rows), batch_sampler=SharedBatches(sampler, share), collate_fn=collate_share, **options
    )
