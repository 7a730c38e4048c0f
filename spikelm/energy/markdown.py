"""A report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TITLES = {
    "model": "the model",
    "dense_student": "dense student",
    "quantised_student": "quantised student",
    "teacher": "teacher",
}


def to_markdown(data: Mapping[str, Any], products: int) -> str:
    """Every phase with its terms, most costly products, totals and bytes."""
    costs = data["costs"]
    lines = [
        f"### {data['model']}, {costs['name']}: {data['estimate']}",
        "",
        f"Every figure is per {data['per']}. {costs['mac']} pJ a MAC, {costs['accumulation']} pJ an accumulation; "
        f"64 bit from a small cache {costs['on_chip'][0]:g} pJ, from DRAM up to {costs['dram'][1]:g} pJ "
        f"({costs['source']}).",
    ]
    for name, phase in data["phases"].items():
        lines += ["", f"#### {name.capitalize()}", "", *_terms(phase), "", *_energies(phase)]
        lines += ["", *_bytes(phase), "", *_products(phase, products)]
        if phase["unknown"]:
            lines += ["", f"Not counted, because unknown: {', '.join(sorted(phase['unknown']))}."]
    lines += ["", *(f"No {name}: {reason}." for name, reason in data["missing"].items())]
    if "latency" in data:
        lines += _latency(data["latency"])
    return "\n".join(lines).rstrip() + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, whose first column is text."""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def number(value: float | None) -> str:
    """Three digits, with a prefix of the thousands; empty where unknown."""
    if value is None:
        return ""
    for limit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {sign}"
    return f"{value:.3g}"


def joules(picojoules: float | None) -> str:
    """Three digits in pJ, nJ, uJ or mJ."""
    if picojoules is None:
        return "not known"
    for limit, unit in ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if abs(picojoules) >= limit:
            return f"{picojoules / limit:.3g} {unit}"
    return f"{picojoules:.3g} pJ"


def _terms(phase: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, term in phase["terms"].items():
        rows.append([name, number(term["mac"]), _replaced(term, "as dense", term["accumulations"] is not None)])
    scan = phase["scan"]
    if scan:
        rows.append(["scan by its recurrence, 3 MAC a state", number(scan["mac_by_recurrence"]), ""])
    if phase["neurons"]:
        spikes = [row["spikes"] for row in phase["neurons"]]
        emitted = None if None in spikes else sum(spikes)
        updates = sum(row["updates"] for row in phase["neurons"])
        rows.append(["neurons: updates, spikes", number(updates), number(emitted)])
    for group in dict.fromkeys(row["group"] for row in phase["elementwise"] if row["group"] != "embedding"):
        counts = [row["executed"] for row in phase["elementwise"] if row["group"] == group]
        kinds = {kind: sum(count.get(kind, 0.0) for count in counts) for kind in ("multiplication", "accumulation")}
        products = kinds["multiplication"] + sum(count.get("function", 0.0) for count in counts)
        title = {"elementwise": "other elementwise"}.get(group, group)
        rows.append([f"{title}: multiplications and functions, sums", number(products), number(kinds["accumulation"])])
    return table(("counted", "MAC of one dense pass", "accumulations"), rows)


def _energies(phase: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, energy in phase["energy"].items():
        total = energy["total_pj"]
        rows.append([TITLES[name], *map(joules, (energy["arithmetic_pj"], *total.values()))])
    columns = (
        "energy, an estimate",
        "arithmetic",
        "+ on chip, reuse over T",
        "+ DRAM, reuse over T",
        "+ DRAM, no reuse",
    )
    lines = table(columns, rows)
    for key, title in (("projections", "spiking projections alone, the papers' accounting"), ("whole", "everything")):
        found = phase[key]
        if found and found["benefit"]:
            lines += ["", f"Dense student over the model, {title}, arithmetic: **{found['benefit']:.2f}**."]
    return lines


def _bytes(phase: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, energy in phase["energy"].items():
        moved = energy["bytes"]
        for key, title in (("reuse_over_T", ""), ("no_reuse", ", no reuse over T")):
            if key == "no_reuse" and moved[key] == moved["reuse_over_T"]:
                continue
            rows.append([f"{TITLES[name]}{title}", *map(number, moved[key].values())])
    return table(("bytes moved", "weights", "activations", "states", "embedding"), rows)


def _products(phase: Mapping[str, Any], most: int) -> list[str]:
    found = sorted(phase["products"], key=lambda row: -row["mac"])[:most]
    rows = [
        [
            f"`{row['scope'] or 'the model'}`",
            row["operator"].split("::")[1],
            row["shape"],
            number(row["mac"]),
            _replaced(row, "dense", row["accumulations"] is not None or row["spiking"]),
            *(_spread(row[rate]) for rate in ("sum_of_rates", "union_rate")),
        ]
        for row in found
    ]
    columns = ("product", "operator", "shape", "MAC", "accumulations", "sum of rates", "share not 0")
    left_out = len(phase["products"]) - len(found)
    note = ["", f"{left_out} more products have fewer MAC each."] if left_out else []
    return table(columns, rows) + note


def _replaced(found: Mapping[str, Any], dense: str, some: bool) -> str:
    """The accumulations, and the MAC that some calls without spikes still take."""
    if not some:
        return dense
    left = found.get("mac_dense")
    return number(found["accumulations"]) + (f" and {number(left)} MAC" if left else "")


def _spread(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['mean']:.3f} ({values['p5']:.3f} to {values['p95']:.3f})"


def _latency(found: Mapping[str, Any]) -> list[str]:
    seconds = ", ".join(f"{phase} {1e3 * value:.3g} ms" for phase, value in found["median_seconds"].items())
    key = next(key for key in found if key.startswith("joules_"))
    joule = f"no NVML energy: {found['no_joules_because']}" if found[key] is None else f"NVML {found[key]:.3g} J a pass"
    return [
        "",
        f"Measured here ({found['device']}, {found['threads']} threads), apart from all this: {seconds}; {joule}.",
    ]
