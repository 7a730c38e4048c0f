"""What the passes of a phase have counted, as JSON rows per token (or sample)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from spikelm.energy.phases import Pass
from spikelm.energy.products import Product
from spikelm.energy.trace import Population

_MEMBRANE = 8  # bytes of one membrane read and written again, float32
_SUMS = ("mac", "mac_executed", "multiplications", "accumulations", "spikes")


def phase_rows(passes: list[Pass]) -> dict[str, Any]:
    """Products, neurons, elementwise work, states and the scan of one phase, per unit."""
    units = sum(one.units for one in passes)
    unknown: dict[str, int] = {}
    for one in passes:
        for operator, calls in one.trace.unknown.items():
            unknown[operator] = unknown.get(operator, 0) + calls
    return {
        "units": units,
        "batches": len(passes),
        "products": _product_rows(passes, units),
        "neurons": _neuron_rows(passes, units),
        "elementwise": _elementwise_rows(passes, units),
        "cache_bytes": sum(one.state_bytes for one in passes) / units,
        "scan": _scan(passes),
        "unknown": unknown,
    }


def _product_rows(passes: list[Pass], units: int) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in passes:
        repeats = one.trace.repeats()
        for (scope, operator, shape, _), product in one.trace.products.items():
            row = rows.setdefault((scope, operator, shape), _empty_row(product))
            _add(row, _once(product, repeats))
    return [_finished(row, units) for row in rows.values()]


def _empty_row(product: Product) -> dict[str, Any]:
    zeros = dict.fromkeys((*_SUMS, "weights", "weight_reads"), 0.0)
    return {
        "scope": product.scope,
        "operator": product.operator,
        "role": product.role,
        "shape": product.shape,
        "spiking": False,
        **zeros,
        "accumulations": None,
        "spikes": None,
        "frames": 1,
        "levels": 0,
        "weight_bytes": 0,
        "rates": [],
        "unions": [],
        "activations": [0.0, 0.0, 0.0, 0.0],
    }


def _once(product: Product, repeats: int) -> Product:
    """The product of a network that runs step by step, whose calls are the steps of one dense pass."""
    if product.calls % repeats:  # a way back has nothing to bring at the first step
        repeats = product.calls if product.calls < repeats else 1
    if repeats == 1:
        return product
    return replace(
        product,
        rates=[torch.stack(part).sum(0) for part in _groups(product.rates, repeats)],
        unions=[],
        steps=product.steps_called * repeats // product.calls,
        **{name: getattr(product, name) / repeats for name in ("mac", "spike_inputs", "real_inputs", "outputs")},
    )


def _groups(rates: list[torch.Tensor], repeats: int) -> list[list[torch.Tensor]]:
    calls = len(rates) // repeats  # of one step, were the scope called several times in it
    if not calls or len({len(rate) for rate in rates}) != 1:
        return []
    return [rates[place::calls] for place in range(calls)]


def _add(row: dict[str, Any], product: Product) -> None:
    for name in _SUMS:
        value = getattr(product, name)
        if value is not None:
            row[name] = (row[name] or 0.0) + value
    row["spiking"] |= product.spiking
    row["weight_bytes"] = max(row["weight_bytes"], product.weight_bytes)
    if product.spiking:
        row["frames"] = max(row["frames"], product.frames * product.steps)
        row["levels"] = max(row["levels"], product.span * product.steps + 1)
    share = 1.0 if product.active is None else float(product.active.double().mean())
    row["weights"] += product.weight_bytes * share
    row["weight_reads"] += product.weight_reads
    row["rates"] += product.rates
    row["unions"] += product.unions
    for place, size in enumerate(_activation_bytes(product)):
        row["activations"][place] += size


def _activation_bytes(product: Product) -> tuple[float, float, float, float]:
    """With reuse over T, without, of the dense product, of a quantised one."""
    size, bits = product.element_bytes, math.ceil(math.log2(product.span * product.steps + 1))
    spikes = product.spike_inputs * product.frames * product.steps * (2 if product.signed else 1) / 8
    once = size * (product.real_inputs + product.outputs)
    dense = once + size * product.spike_inputs
    return spikes + once, spikes + size * product.executed, dense, once + product.spike_inputs * bits / 8


def _finished(row: dict[str, Any], units: int) -> dict[str, Any]:
    for name in _SUMS:
        row[name] = None if row[name] is None else row[name] / units
    rates, unions = row.pop("rates"), row.pop("unions")
    row["sum_of_rates"], row["union_rate"] = spread_of(rates), spread_of(unions)
    row["bits"] = math.ceil(math.log2(row["levels"])) if row["levels"] > 1 else None
    reused, unreused, dense, quantised = (size / units for size in row.pop("activations"))
    weights, reads = row.pop("weights") / units, row.pop("weight_reads") / units
    row["bytes"] = {
        "weights": {"reuse_over_T": weights, "no_reuse": reads},
        "activations": {"reuse_over_T": reused, "no_reuse": unreused, "dense": dense, "quantised": quantised},
    }
    return row


def spread_of(parts: list[torch.Tensor]) -> dict[str, float] | None:
    """Mean, standard deviation and the 5th and 95th percentile over tokens."""
    if not parts:
        return None
    values = torch.cat(parts).double()
    low, high = torch.quantile(values[:1_000_000], torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "p5": low, "p95": high}


def _neuron_rows(passes: list[Pass], units: int) -> list[dict[str, Any]]:
    found: dict[str, list[Population]] = {}
    for one in passes:
        for scope, population in one.trace.populations.items():
            found.setdefault(scope, []).append(population)
    return [_neurons(scope, populations, units) for scope, populations in found.items()]


def _neurons(scope: str, populations: list[Population], units: int) -> dict[str, Any]:
    known = [population.spikes for population in populations if population.spikes is not None]
    updates = sum(population.updates for population in populations) / units
    return {
        "scope": scope,
        "updates": updates,
        "spikes": sum(known) / units if len(known) == len(populations) else None,
        "multiplications": sum(population.leaks for population in populations) / units,
        "bytes": {
            "reuse_over_T": _MEMBRANE * sum(population.kept for population in populations) / units,
            "no_reuse": _MEMBRANE * updates,
        },
    }


def _elementwise_rows(passes: list[Pass], units: int) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in passes:
        repeats = one.trace.repeats()
        for (scope, group, kind), (once, executed) in one.trace.elementwise.items():
            row = rows.setdefault((scope, group), {"scope": scope, "group": group, "once": {}, "executed": {}})
            row["once"][kind] = row["once"].get(kind, 0.0) + once / repeats / units
            row["executed"][kind] = row["executed"].get(kind, 0.0) + executed / units
    return list(rows.values())


def _scan(passes: list[Pass]) -> dict[str, Any] | None:
    """Of models with a recurrent state: what the recurrence itself takes, 3 MAC per number of the state and token."""
    states = sum(one.scan_state for one in passes)
    sequences = sum(one.sequences for one in passes)
    if not states:
        return None
    return {"state": states / sequences, "mac_by_recurrence": 3 * states / sequences}
