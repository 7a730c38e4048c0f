"""Picojoules of what was counted: arithmetic by part, moving data as a range, and baselines under the same table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spikelm.energy.costs import CostTable

Row = Mapping[str, Any]
ENDS = ("low", "middle", "high")


def energy_of(phase: Row, table: CostTable) -> dict[str, Any]:
    """Per unit, of the model as it ran and, where it spikes, of dense and quantised students with the same products."""
    found = {"model": _total(_model_parts(phase, table), _model_bytes(phase), table)}
    if any(row["spiking"] for row in phase["products"]):
        found["dense_student"] = _total(_dense_parts(phase, table), _other_bytes(phase, "dense"), table)
        quantised = _quantised_parts(phase, table)
        found["quantised_student"] = _total(quantised, _other_bytes(phase, "quantised"), table)
    return found


def projections(phase: Row, table: CostTable) -> dict[str, Any] | None:
    """The products with a weight that spikes enter, alone, as the papers count; None where nothing spikes.

    "sum_of_rates" is accumulations per MAC, that is weighted by the weights behind a bank, of calls with spikes.
    """
    rows = [row for row in phase["products"] if row["spiking"] and row["role"] == "projection"]
    if not rows:
        return None
    mac = sum(row["mac"] for row in rows)
    entered = sum(row["mac"] * (1 - _share_dense(row)) for row in rows)
    accumulations = _sum_or_none(row["accumulations"] for row in rows)
    multiplications = sum(row["multiplications"] for row in rows)
    dense, spiking = table.mac * mac, None
    if accumulations is not None:
        left = table.mac * sum(row["mac_dense"] for row in rows)
        spiking = table.accumulation * accumulations + table.product * multiplications + left
    return {
        "mac": mac,
        "accumulations": accumulations,
        "multiplications": multiplications,
        "sum_of_rates": None if accumulations is None or not entered else accumulations / entered,
        "dense_pj": dense,
        "spiking_pj": spiking,
        "benefit": benefit(dense, spiking),
    }


def whole(energy: Row) -> dict[str, Any] | None:
    """Arithmetic of everything that was counted, dense over spiking; and the same with moving data, by ENDS.

    None where nothing spikes.
    """
    if "dense_student" not in energy:
        return None
    model, dense = energy["model"], energy["dense_student"]
    ends = [benefit(dense["total_pj"][end], model["total_pj"][end]) for end in ENDS]
    return {
        "dense_pj": dense["arithmetic_pj"],
        "spiking_pj": model["arithmetic_pj"],
        "benefit": benefit(dense["arithmetic_pj"], model["arithmetic_pj"]),
        "benefit_with_data": dict(zip(ENDS, ends, strict=True)),
    }


def benefit(dense: float, spiking: float | None) -> float | None:
    """Dense over spiking; None where nothing was spent, or it is not known."""
    return dense / spiking if spiking else None


def terms_of(phase: Row) -> dict[str, dict[str, Any]]:
    """MAC of one dense pass by role, what replaces them (None where a term stays dense), and those left as they are."""
    names = {
        "projection": "dense projections",
        "head": "head",
        "convolution": "convolutions",
        "mixing": "mixing of tokens",
    }
    found: dict[str, dict[str, Any]] = {}
    for row in phase["products"]:
        name = names[row["role"]]
        if row["spiking"]:
            name = {"dense projections": "spiking projections"}.get(name, f"spiking {name}")
        term = found.setdefault(name, {"mac": 0.0, "accumulations": None, "multiplications": None, "mac_dense": 0.0})
        term["mac"] += row["mac"]
        term["mac_dense"] += row["mac_dense"]
        for key in ("accumulations", "multiplications"):
            if row["accumulations"] is not None:
                term[key] = (term[key] or 0.0) + row[key]
    return found


def _model_parts(phase: Row, table: CostTable) -> dict[str, float | None]:
    replaced = [row for row in phase["products"] if row["accumulations"] is not None or row["spiking"]]
    dense = sum(row["mac_dense"] for row in phase["products"])
    added = _sum_or_none(row["accumulations"] for row in replaced)
    scaled = table.product * sum(row["multiplications"] for row in phase["products"])
    parts: dict[str, float | None] = {}
    if replaced:
        parts["accumulated products"] = None if added is None else table.accumulation * added + scaled
    if dense:
        parts["dense products"] = table.mac * dense
    if phase["neurons"]:
        parts["neurons"] = _neuron_pj(phase["neurons"], table)
    return parts | _elementwise_pj(phase["elementwise"], "executed", table)


def _neuron_pj(rows: Iterable[Row], table: CostTable) -> float | None:
    """An update adds once, and once more where it fires; a leak is a multiplication."""
    rows = list(rows)
    spikes = _sum_or_none(row["spikes"] for row in rows)
    if spikes is None:
        return None
    updates, leaks = (sum(row[key] for row in rows) for key in ("updates", "multiplications"))
    return table.accumulation * (updates + spikes) + table.product * leaks


def _elementwise_pj(rows: Iterable[Row], key: str, table: CostTable) -> dict[str, float | None]:
    """By group; a function costs one multiplication, which is too little."""
    prices = {"multiplication": table.product, "function": table.product, "accumulation": table.accumulation}
    found: dict[str, float | None] = {}
    for row in rows:
        if row["group"] == "embedding":
            continue  # which moves, and computes nothing
        spent = sum(prices.get(kind, 0.0) * number for kind, number in row[key].items())
        found[row["group"]] = (found.get(row["group"]) or 0.0) + spent
    return found


def _dense_parts(phase: Row, table: CostTable) -> dict[str, float | None]:
    mac = sum(row["mac"] for row in phase["products"])
    return {"dense products": table.mac * mac} | _elementwise_pj(phase["elementwise"], "once", table)


def _quantised_parts(phase: Row, table: CostTable) -> dict[str, float | None]:
    """A product of b-bit activations is b shift-and-add accumulations a MAC, and none is skipped [ours]."""
    added = dense = 0.0
    for row in phase["products"]:
        share = _share_dense(row) if row["spiking"] else 1.0
        added += row["mac"] * (1 - share) * (row["bits"] or 0)
        dense += row["mac"] * share
    parts: dict[str, float | None] = {
        "accumulated products": table.accumulation * added,
        "dense products": table.mac * dense,
    }
    return parts | _elementwise_pj(phase["elementwise"], "once", table)


def _share_dense(row: Row) -> float:
    """Of a product, what runs in calls that neither spikes nor weights of one magnitude replace."""
    return float(row["mac_dense"] / row["mac_executed"]) if row["mac_executed"] else 0.0


def _model_bytes(phase: Row) -> dict[str, dict[str, float]]:
    found = {}
    for key in ("reuse_over_T", "no_reuse"):
        sums = {part: sum(row["bytes"][part][key] for row in phase["products"]) for part in ("weights", "activations")}
        state = phase["cache_bytes"] + sum(row["bytes"][key] for row in phase["neurons"])
        found[key] = sums | {"states": state, "embedding": _embedding_bytes(phase)}
    return found


def _other_bytes(phase: Row, kind: str) -> dict[str, dict[str, float]]:
    """Of a baseline, in which every weight is read once a pass and nothing runs T times."""
    sums = {
        "weights": sum(row["weight_bytes"] for row in phase["products"]) * phase["batches"] / phase["units"],
        "activations": sum(row["bytes"]["activations"][kind] for row in phase["products"]),
        "states": phase["cache_bytes"],
        "embedding": _embedding_bytes(phase),
    }
    return {"reuse_over_T": sums, "no_reuse": sums}


def _embedding_bytes(phase: Row) -> float:
    return float(sum(row["once"].get("bytes", 0.0) for row in phase["elementwise"]))


def _total(parts: dict[str, float | None], moved: dict[str, dict[str, float]], table: CostTable) -> dict[str, Any]:
    """Low: all in small caches beside the arithmetic, fetched once; middle: DRAM, once; high: DRAM, T times."""
    arithmetic = _sum_or_none(parts.values())
    once, anew = (sum(moved[key].values()) / 8 for key in ("reuse_over_T", "no_reuse"))
    moving = dict(zip(ENDS, (once * table.on_chip[0], once * table.dram[0], anew * table.dram[1]), strict=True))
    return {
        "parts_pj": parts,
        "arithmetic_pj": arithmetic,
        "bytes": moved,
        "moving_pj": moving,
        "total_pj": {end: None if arithmetic is None else arithmetic + pj for end, pj in moving.items()},
    }


def _sum_or_none(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return (
        None if any(value is None for value in values) else float(sum(value for value in values if value is not None))
    )
