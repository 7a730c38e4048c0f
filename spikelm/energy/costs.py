"""Energy of one operation, by named tables."""

from __future__ import annotations

from dataclasses import dataclass

from spikelm.errors import SpikelmError

_SOURCE = "Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V; arithmetic alone, without moving data"


@dataclass(frozen=True)
class CostTable:
    """Picojoules of one multiply-accumulate, multiplication and accumulation; None where the source has none."""

    name: str
    mac: float
    multiplication: float | None
    accumulation: float
    source: str


COSTS: dict[str, CostTable] = {
    table.name: table
    for table in (
        CostTable("45nm-fp32", 4.6, 3.7, 0.9, _SOURCE),
        CostTable("45nm-fp16", 1.5, None, 0.4, _SOURCE),
        CostTable("45nm-int8", 0.23, None, 0.03, _SOURCE),
    )
}


def cost_table(costs: str | CostTable) -> CostTable:
    """The table of a name in ``COSTS``; a table is returned as it is."""
    if isinstance(costs, CostTable):
        return costs
    if costs not in COSTS:
        raise SpikelmError(f"costs must be a CostTable or one of {', '.join(COSTS)}; got {costs!r}")
    return COSTS[costs]
