"""Spikes are followed to the product they enter, through what moves them and no further."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from spikelm.energy import report
from spikelm.neurons import ATMN

X = 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
ORDER = torch.tensor([4, 0, 0])


class Moved(nn.Module):
    """A product of what becomes of the spikes of X, [*, 6] or another width."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
        super().__init__()
        self.move = move
        self.bank = ATMN(T=4)
        self.linear = nn.Linear(width, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.move(self.bank.encode_sum(x)))


# Every one of these may also be applied to the count of the spikes.
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as they are": lambda s: s,
    "reshape": lambda s: s.reshape(10, 6).view(5, 2, 6).flatten(0, 1),
    "permute": lambda s: s.permute(1, 0, 2).contiguous(),
    "transpose": lambda s: s.transpose(1, 2),
    "slice": lambda s: s[:, 1:4, ::2],
    "select": lambda s: s[1],
    "index": lambda s: s[:, ORDER],
    "index_select": lambda s: s.index_select(1, ORDER),
    "gather": lambda s: s.gather(1, ORDER.view(1, 3, 1).expand(2, 3, 6)),
    "chunk": lambda s: torch.cat(s.chunk(2, dim=2)[::-1], dim=1),
    "stack": lambda s: torch.stack([s[0], s[1]], dim=1),
    "pad": lambda s: nn.functional.pad(s, (1, 0, 2, 0)),
    "beside zeros": lambda s: torch.cat([torch.zeros(2, 1, 6), s], dim=1),
    "clone and cast": lambda s: s.clone().to(torch.float64).to(torch.float32),
    "dropout in eval": lambda s: nn.functional.dropout(s, 0.5, training=False),
    "expand": lambda s: s.unsqueeze(0).expand(3, -1, -1, -1),
    "flip": lambda s: s.flip(1).roll(1, 2),
    "masked": lambda s: s * (torch.arange(5) < 3).float().unsqueeze(1),
    "masked_fill": lambda s: s.masked_fill((torch.arange(5) < 3).unsqueeze(1), 0.0),
    "copied": lambda s: torch.empty(2, 5, 6).copy_(s),
}


@pytest.mark.parametrize("name", MOVES)
@torch.no_grad()
def test_moved_spikes_are_the_same_spikes(name: str) -> None:
    move = MOVES[name]
    bank = ATMN(T=4)
    count = move(bank.spike_count(X))
    (row,) = report(Moved(move, count.shape[-1]), X).data["phases"]["forward"]["products"]
    assert row["spiking"] and row["spikes"] * 2 == pytest.approx(float(count.sum()))
    assert row["accumulations"] * 2 == pytest.approx(3 * float(count.sum()))
    assert row["frames"] == 4


SCALED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "times a number": lambda s: 0.5 * s,
    "over a number": lambda s: s / 3,
    "negated": lambda s: -s,
    "times a tensor of one": lambda s: s * torch.tensor(0.7),
}


@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_scaled_spikes_too(name: str) -> None:
    (row,) = report(Moved(SCALED[name], 6), X).data["phases"]["forward"]["products"]
    assert row["spikes"] * 2 == pytest.approx(float(ATMN(T=4).spike_count(X).sum()))


@torch.no_grad()
def test_sums_of_spikes_are_both_ones_spikes() -> None:
    bank = ATMN(T=4)
    (row,) = report(Moved(lambda s: s + s.flip(0), 6), X).data["phases"]["forward"]["products"]
    assert row["spikes"] * 2 == pytest.approx(2 * float(bank.spike_count(X).sum()))
    assert row["levels"] == 17, "-8..8"


NO_SPIKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "times each other's": lambda s: s * torch.linspace(0.1, 0.9, 6),
    "a function": lambda s: s.exp(),
    "plus a number": lambda s: s + 0.5,
    "beside numbers": lambda s: torch.cat([s, torch.full((2, 1, 6), 0.3)], dim=1),
    "changed in place": lambda s: s.add_(0.3),
    "changed in part": lambda s: (s[0].add_(0.3), s)[1],
    "a mean": lambda s: s.mean(1),
}


@pytest.mark.parametrize("name", NO_SPIKES)
@torch.no_grad()
def test_what_is_no_spike_is_multiplied(name: str) -> None:
    (row,) = report(Moved(NO_SPIKES[name], 6), X).data["phases"]["forward"]["products"]
    assert not row["spiking"] and row["accumulations"] is None and row["mac"] > 0


@torch.no_grad()
def test_a_time_axis_that_is_summed_over_ends_there() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank, self.inner, self.outer = ATMN(T=4), nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            current = self.inner(self.bank.encode(x))
            return self.outer(current.mean(0))

    inner, outer = report(Net(), X[0]).data["phases"]["forward"]["products"]
    assert inner["mac_executed"] == 4 * inner["mac"] == 4 * 36
    assert outer["mac_executed"] == outer["mac"] == 12
