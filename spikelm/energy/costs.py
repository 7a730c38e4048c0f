"""Energy of one operation, by named tables."""

from __future__ import annotations

from dataclasses import dataclass

from spikelm.errors import SpikelmError

_SOURCE = "Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"


@dataclass(frozen=True)
class CostTable:
    """Picojoules of one multiply-accumulate, multiplication and accumulation, and of moving 64 bit.

    Attributes:
        multiplication: None where the source has none: a multiply-accumulate is taken.
        on_chip: of one access to a cache of 8 KB, 32 KB and 1 MB.
        dram: the least and the most of one access.
    """

    name: str
    mac: float
    multiplication: float | None
    accumulation: float
    source: str
    on_chip: tuple[float, float, float] = (10.0, 20.0, 100.0)
    dram: tuple[float, float] = (1300.0, 2600.0)

    @property
    def product(self) -> float:
        """Of one multiplication."""
        return self.mac if self.multiplication is None else self.multiplication


COSTS: dict[str, CostTable] = {
    table.name: table
    for table in (
        CostTable("45nm-fp32", 4.6, 3.7, 0.9, _SOURCE),
        CostTable("45nm-fp16", 1.5, 1.1, 0.4, _SOURCE),
        CostTable("45nm-int8", 0.23, 0.2, 0.03, _SOURCE),
    )
}


def cost_table(costs: str | CostTable) -> CostTable:
    """The table of a name in ``COSTS``; a table is returned as it is."""
    if isinstance(costs, CostTable):
        return costs
    if costs not in COSTS:
        raise SpikelmError(f"costs must be a CostTable or one of {', '.join(COSTS)}; got {costs!r}")
    return COSTS[costs]
