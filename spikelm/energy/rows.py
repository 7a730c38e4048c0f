"""What the passes of a phase have counted, as JSON rows per token (or sample)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from spikelm.energy.phases import Pass
from spikelm.energy.populations import Population
from spikelm.energy.products import Product
from spikelm.energy.trace import Trace

_MEMBRANE = 8  # bytes of one membrane read and written again, float32
_SUMS = ("mac", "mac_executed", "mac_dense", "multiplications", "accumulations", "spikes")


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
        together: dict[tuple[str, str, str], list[Product]] = {}  # spikes may enter some calls and numbers others
        for (scope, operator, shape, _), product in one.trace.products.items():
            together.setdefault((scope, operator, shape), []).append(product)
        for key, parts in together.items():
            row = rows.setdefault(key, _empty_row(parts[0]))
            calls = sum(part.calls for part in parts)
            for part in parts:
                _add(row, _once(part, one.trace, calls))
            row["weights"] += max(_weights_read(part) for part in parts)  # once a pass, whoever wants them
    return [_finished(row, units) for row in rows.values()]


def _weights_read(product: Product) -> float:
    """Bytes of the weights that some token needs."""
    return product.weight_bytes * (1.0 if product.active is None else float(product.active.double().mean()))


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


class Passes(NamedTuple):
    """How many dense passes some calls are, and how many calls the longest of them takes."""

    number: int
    longest: int


def _passes(calls: int, trace: Trace) -> Passes:
    """Of a network that runs step by step, the calls in its loop are time steps of a pass, those beside it are passes.

    A way back brings nothing at the first step, and is called once less.
    """
    repeats, restarts = trace.repeats(), trace.restarts()
    if repeats > 1 and calls == restarts * (repeats - 1):
        return Passes(restarts, repeats - 1)
    looped, left = divmod(calls, repeats)
    if left and left == repeats - 1:
        return Passes(looped + 1, repeats if looped else left)
    return Passes(looped + left, repeats if looped else 1)


def _once(product: Product, trace: Trace, calls: int) -> Product:
    """One pass after another of a product that has ``calls`` in all, some perhaps without spikes."""
    passes, longest = _passes(calls, trace)
    if passes == calls:
        return product
    whole = calls == passes * longest
    return replace(
        product,
        rates=[torch.stack(part).sum(0) for part in _groups(product.rates, longest, trace.restarts()) if whole],
        unions=[],
        steps=product.steps_called * longest // product.calls,
        **{name: getattr(product, name) * passes / calls for name in ("mac", "spike_inputs", "real_inputs", "outputs")},
    )


def _groups(rates: list[torch.Tensor], repeats: int, restarts: int) -> list[list[torch.Tensor]]:
    """The rates of the steps of every pass."""
    if len({len(rate) for rate in rates}) != 1:
        return []
    if len(rates) < repeats:  # at the other steps no spikes have entered
        return [rates]
    runs = restarts if len(rates) % (restarts * repeats) == 0 else 1
    length = len(rates) // runs
    calls = length // repeats  # of one step, were the scope called several times in it
    starts = (run * length + place for run in range(runs) for place in range(calls))
    return [rates[start : start // length * length + length : calls] for start in starts]


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
    kept: Counter[str] = Counter()
    for one in passes:
        for scope, population in one.trace.populations.items():
            found.setdefault(scope, []).append(population)
            number = _passes(population.calls, one.trace).number
            kept[scope] += population.kept * number // max(population.calls, 1)
    return [_neurons(scope, populations, kept[scope], units) for scope, populations in found.items()]


def _neurons(scope: str, populations: list[Population], kept: int, units: int) -> dict[str, Any]:
    known = [population.spikes for population in populations if population.spikes is not None]
    updates = sum(population.updates for population in populations) / units
    return {
        "scope": scope,
        "updates": updates,
        "spikes": sum(known) / units if len(known) == len(populations) else None,
        "multiplications": sum(population.leaks for population in populations) / units,
        "bytes": {
            "reuse_over_T": _MEMBRANE * kept / units,
            "no_reuse": _MEMBRANE * updates,
        },
    }


def _elementwise_rows(passes: list[Pass], units: int) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in passes:
        for (scope, group, kind, *_), work in one.trace.elementwise.items():
            once = work.once * _passes(work.calls, one.trace).number / work.calls
            row = rows.setdefault((scope, group), {"scope": scope, "group": group, "once": {}, "executed": {}})
            row["once"][kind] = row["once"].get(kind, 0.0) + once / units
            row["executed"][kind] = row["executed"].get(kind, 0.0) + work.executed / units
    return list(rows.values())


def _scan(passes: list[Pass]) -> dict[str, Any] | None:
    """Of models with a recurrent state: what the recurrence itself takes, 3 MAC per number of the state and token."""
    states = sum(one.scan_state for one in passes)
    sequences = sum(one.sequences for one in passes)
    if not states:
        return None
    return {"state": states / sequences, "mac_by_recurrence": 3 * states / sequences}
