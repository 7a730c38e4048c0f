"""What a product, its spikes and its neurons cost, against counts by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from spikelm.energy import CostTable, Report, report
from spikelm.layers import BitLinear
from spikelm.neurons import ATMN, TILIF, BinaryIF
from tests.small_models import bispikclm

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def rows_of(found: Report, phase: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = found.data["phases"][phase]["products"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


class Projection(nn.Module):
    """One linear layer behind an encoding of its input."""

    def __init__(self, bank: Any, features: int = 6) -> None:
        super().__init__()
        self.bank = bank
        self.linear = nn.Linear(4, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.bank.encode_sum(x) * 2.0)


def test_spikes_that_cancel_were_still_emitted() -> None:
    """tau = 0.5 weighs 1/2 and 1/4: 1 - 1/2 leaves 1/2, of two spikes."""
    x = torch.tensor([[1.25, 0.0, 0.75, -0.3]])  # V = 1, T = 3, tau = 0.5
    bank = ATMN(tau=0.5, T=3, frame_weight=0.5)
    spikes = int(bank.encode(x).abs().sum())
    value = float(bank.encode_sum(x).detach().abs().sum())
    assert spikes != value
    (row,) = report(Projection(bank), x).data["phases"]["forward"]["products"]
    assert row["spikes"] == spikes and row["accumulations"] == 6 * spikes
    assert row["multiplications"] == 2 * 6, "two of three frames are scaled"
    assert row["frames"] == 3 and row["levels"] == 15 and row["bits"] == 4
    assert row["union_rate"]["mean"] == float((bank.encode(x) != 0).any(0).float().mean())


def test_the_numbers_of_one_projection() -> None:
    x = torch.tensor([[3.0, 0.0, -1.2, 9.0], [0.2, 0.0, 0.9, 0.1]])  # TILIF rounds: 3 0 -1 4, and 0 0 1 0
    own = CostTable("own", 10.0, 7.0, 1.0, "none", (8.0, 8.0, 8.0), (80.0, 160.0))
    phase = report(Projection(TILIF(D=4)), x, own).data["phases"]["forward"]
    (row,), (bank,) = phase["products"], phase["neurons"]
    assert (row["mac"], row["accumulations"], row["spikes"]) == (24.0, 6 * 9 / 2, 9 / 2)
    assert row["sum_of_rates"] == pytest.approx({"mean": 9 / 8, "std": 7 / 8, "p5": 0.25 + 0.05 * 1.75, "p95": 1.9125})
    assert row["union_rate"]["mean"] == pytest.approx((3 + 1) / 8)
    assert (bank["updates"], bank["spikes"], bank["multiplications"]) == (16.0, 4.5, 0.0)
    model, dense, quantised = (phase["energy"][name] for name in ("model", "dense_student", "quantised_student"))
    scaling = 7.0 * 4  # times two
    assert model["arithmetic_pj"] == pytest.approx(27 + (16 + 4.5) + scaling)
    assert dense["arithmetic_pj"] == pytest.approx(240 + scaling)
    assert row["levels"] == 9 and row["bits"] == 4
    assert quantised["arithmetic_pj"] == pytest.approx(4 * 24 + scaling)
    # weights: 3 of 4 channels fire in some token; without reuse 4 + 3 + 2 fetches of channels at most 4 frames
    assert row["bytes"]["weights"] == {"reuse_over_T": 0.75 * 96 / 2, "no_reuse": (3 + 2 + 4) / 4 * 96 / 2}
    once, out = 4 * 4 * 2 / 8, 6 * 4
    assert row["bytes"]["activations"] == {
        "reuse_over_T": once + out,
        "no_reuse": once + 4 * out,
        "dense": 16 + out,
        "quantised": 4 * 4 / 8 + out,
    }
    assert model["bytes"]["no_reuse"]["states"] == 8 * 16 and model["bytes"]["reuse_over_T"]["states"] == 0
    low = sum(model["bytes"]["reuse_over_T"].values()) / 8 * 8
    assert model["total_pj"]["low"] == pytest.approx(model["arithmetic_pj"] + low)
    high = sum(model["bytes"]["no_reuse"].values()) / 8 * 160
    assert model["total_pj"]["high"] == pytest.approx(model["arithmetic_pj"] + high)


def test_frames_on_a_time_axis() -> None:
    """Explicit frames cost what their sum costs, and weights are fetched T times without reuse."""

    class Framewise(Projection):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.bank.encode(x)).sum(0)

    x = torch.tensor([[3.3, 0.0, -1.2, 9.0]])
    bank = ATMN(T=4)
    (row,), (summed,) = (
        report(kind(bank), x).data["phases"]["forward"]["products"] for kind in (Framewise, Projection)
    )
    for key in ("mac", "accumulations", "spikes", "frames", "levels", "sum_of_rates", "union_rate"):
        assert row[key] == summed[key], key
    assert row["mac_executed"] == 4 * row["mac"] and row["mac"] == 24.0
    assert row["bytes"]["weights"] == summed["bytes"]["weights"]


def test_binary_attention_is_an_and() -> None:
    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = BinaryIF(), BinaryIF()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) @ self.right(1.5 * x).transpose(-1, -2)

    x = torch.rand(2, 5, 8) * 1.6
    (row,) = report(Overlap(), x).data["phases"]["forward"]["products"]
    both = torch.einsum("bik,bjk->", (x >= 1).double(), (1.5 * x >= 1).double())
    assert row["role"] == "mixing" and row["accumulations"] * 2 == float(both) > 0
    found = report(bispikclm(), IDS)
    mixing = rows_of(found, "decode", role="mixing")
    assert len(mixing) == 4 and all(row["spiking"] and row["accumulations"] < row["mac_executed"] for row in mixing)
    assert not found.data["phases"]["prefill"]["unknown"]


def test_zeros_and_ones_of_anybody_are_spikes_and_a_state_of_zeros_is_none() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(-1, -2)

    binary = (torch.arange(24.0).view(4, 6) % 5 == 0).float()
    for x, spiking in ((binary, True), (torch.zeros(4, 6), False), (torch.ones(4, 6), False), (-binary, False)):
        (row,) = report(Product(), x).data["phases"]["forward"]["products"]
        assert row["spiking"] is spiking


@pytest.mark.parametrize("order", [1, -1])
def test_spikes_in_one_batch_and_numbers_in_another(order: int) -> None:
    """A row with both costs what the batches cost alone."""
    binary, real = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]), torch.linspace(0.1, 0.8, 8)[None]
    linear = nn.Linear(8, 4, bias=False)
    found = report(linear, [binary, real][::order])
    phase = found.data["phases"]["forward"]
    (row,) = phase["products"]
    assert row["spiking"] and (row["mac"], row["mac_executed"], row["mac_dense"]) == (32.0, 32.0, 16.0)
    assert phase["energy"]["model"]["arithmetic_pj"] == pytest.approx((12 * 0.9 + 32 * 4.6) / 2)
    assert phase["energy"]["dense_student"]["arithmetic_pj"] == pytest.approx(32 * 4.6)
    assert phase["energy"]["quantised_student"]["arithmetic_pj"] == pytest.approx((32 * 0.9 + 32 * 4.6) / 2)
    assert phase["projections"]["spiking_pj"] == pytest.approx(79.0)
    assert phase["projections"]["sum_of_rates"] == 3 / 8, "of the call that spikes entered"
    assert row["bytes"]["weights"]["reuse_over_T"] == (3 / 8 + 1) / 2 * 128
    assert phase["terms"]["spiking projections"]["mac_dense"] == 16.0
    assert found.to_markdown().count("6 and 16 MAC") == 2


def test_pooled_spikes_that_are_numbers_in_some_batches() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank, self.pool, self.conv = ATMN(T=4), nn.MaxPool2d(2), nn.Conv2d(1, 4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.pool(self.bank.encode_sum(x)))

    net = Pooled()
    few = torch.zeros(1, 1, 8, 8)
    few[..., ::4, ::4] = 1.2
    many = 3 * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other, both = (report(net, batches).data["phases"]["forward"] for batches in ([few], [many], [few, many]))
    assert one["products"][0]["spiking"] and not other["products"][0]["spiking"]
    alone = [phase["energy"]["model"]["arithmetic_pj"] for phase in (one, other)]
    assert both["energy"]["model"]["arithmetic_pj"] == pytest.approx(sum(alone) / 2)


def test_frames_of_events_of_which_some_are_numbers() -> None:
    """Counts of 2 and more are multiplied, and the layer is still one dense pass over all steps."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.neuron = nn.Linear(8, 4, bias=False), BinaryIF()

        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return sum(self.neuron(self.linear(x)) for x in x_seq)

    x_seq = torch.zeros(4, 2, 8)
    x_seq[0, 0, :3], x_seq[1, 1, :4], x_seq[2, 0, 5], x_seq[3, 1, 2] = 1, 1, 2, 3
    (row,) = report(Steps(), x_seq).data["phases"]["forward"]["products"]
    assert (row["mac"], row["mac_executed"], row["mac_dense"]) == (32.0, 128.0, 64.0)
    assert row["accumulations"] * 2 == 4 * 7 and row["frames"] == 4
    assert row["sum_of_rates"]["mean"] == pytest.approx(7 / 16), "of the two frames that are spikes"


def test_binary_and_ternary_weights_are_added() -> None:
    linear = BitLinear(16, 8, bias=False)
    x = torch.randn(5, 16)
    (row,) = report(linear, x).data["phases"]["forward"]["products"]
    nonzero = int(linear.effective_weight().count_nonzero())
    assert not row["spiking"] and row["accumulations"] == nonzero and row["multiplications"] == 8
    (dense,) = report(nn.Linear(16, 8), x).data["phases"]["forward"]["products"]
    assert dense["accumulations"] is None and dense["mac"] == 128


def test_weights_are_prepared_once() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a @ self.b.exp())

    phase = report(Prepared(), torch.randn(3, 4)).data["phases"]["forward"]
    assert len(phase["products"]) == 1 and phase["products"][0]["role"] == "projection"
    assert phase["elementwise"] == []
