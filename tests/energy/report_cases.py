"""Models, text and look-ups that the tests of reports share."""

from typing import Any

import torch

from spikelm import calibrate, spikify
from spikelm.energy import Report
from tests.small_models import llamba, mamba2

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def calibrated(name: str) -> Any:
    """A spiking "mamba2" or "llamba"."""
    model = spikify(mamba2(), "spikingmamba") if name == "mamba2" else spikify(llamba(), "mar")
    calibrate(model, [{"input_ids": IDS}])
    return model


def rows_of(found: Report, phase: str, **wanted: Any) -> list[dict[str, Any]]:
    """The products of a phase that have these values."""
    rows = found.data["phases"][phase]["products"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def total(rows: list[dict[str, Any]], key: str) -> float:
    """The sum of one figure."""
    return sum(row[key] for row in rows)
