"""The tables of docs/energy.md from benchmarks/results/energy.json, which benchmarks/energy.py writes."""

from __future__ import annotations

from collections.abc import Callable

from student_tables import machine, markdown, read

from spikelm.energy import COSTS, Report
from spikelm.energy.markdown import TITLES, joules, number

PAPERS = {  # /token, as arXiv 2601.21503 and 2510.04595 give or imply them
    ("Llamba-1B", "spiking projections"): 1.142e9,
    ("Llamba-1B", "head"): 262.7e6,
    ("mamba2-1.3b", "spiking projections"): 1.239e9,
    ("mamba2-1.3b", "convolutions"): 0.0008e9,
    ("mamba2-1.3b", "scan by its recurrence"): 0.075e9,
    ("mamba2-1.3b", "head"): 0.103e9,
}


def energy_report() -> str:
    """The report of the first student as it is."""
    result = read("energy.json")
    batch, length = result["contexts"]
    return (
        f"{Report(result['students'][0]).to_markdown(4)}\n{batch} held-out contexts of {length} tokens, one at a time. "
        f"{machine(result)}."
    )


def energy_benefits() -> str:
    """What is left of the papers' factor, for every student and phase."""
    lines = []
    for place, student in enumerate(read("energy.json")["students"], 1):
        for name, phase in student["phases"].items():
            whole, data = phase["whole"], phase["whole"]["benefit_with_data"]
            factors = (phase["projections"]["benefit"], whole["benefit"], *data.values())
            energies = phase["energy"]
            quantised = energies["quantised_student"]["arithmetic_pj"] / energies["model"]["arithmetic_pj"]
            rate = f"{phase['projections']['sum_of_rates']:.2f}"
            lines.append([f"{place}, {name}", rate, *(f"{value:.2f}" for value in (*factors, quantised))])
    columns = (
        *("student", "accumulations per MAC", "projections alone", "everything"),
        *(
            "+ on chip, reuse over T",
            "+ DRAM, reuse over T",
            "+ DRAM, no reuse",
            "quantised student over it, arithmetic",
        ),
    )
    return markdown(columns, lines)


def energy_shapes() -> str:
    """MAC per token of the papers' models, counted, beside the papers' figures."""
    lines = []
    for model, phases in read("energy.json")["shapes"].items():
        names = dict.fromkeys(name for phase in phases.values() for name in phase["terms"])
        for name in (*names, "scan by its recurrence"):
            cells = []
            for phase in phases.values():
                scan = name == "scan by its recurrence"
                term = phase["scan"]["mac_by_recurrence"] if scan else phase["terms"].get(name, {}).get("mac")
                cells.append(number(term))
            lines.append([f"{model}, {name}", *cells, number(PAPERS.get((model, name)))])
    return markdown(("MAC per token", "prefill", "decode", "paper"), lines)


def energy_costs() -> str:
    """The tables of costs, and what fetching a weight costs in MACs."""
    lines = []
    for table in COSTS.values():
        bits = int("".join(filter(str.isdecimal, table.name.split("-")[1])))
        per_weight = [bits / 64 * access / table.mac for access in (*table.on_chip, *table.dram)]
        prices = [f"{price:g}" for price in (table.mac, table.product, table.accumulation)]
        cells = [f"{mac:.2g}" if mac < 10 else f"{mac:.0f}" for mac in per_weight]
        lines.append([table.name, *prices, *cells[:3], f"{cells[3]} to {cells[4]}"])
    columns = ("table", "MAC, pJ", "multiplication", "accumulation", "8 KB", "32 KB", "1 MB", "DRAM")
    accesses = COSTS["45nm-fp32"]
    return markdown(columns, lines) + (
        "\n\nThe last four columns: fetching one number of the table's width, in MACs of the same row. An access of "
        f"64 bit costs {accesses.on_chip[0]:g}, {accesses.on_chip[1]:g} and {accesses.on_chip[2]:g} pJ in a cache of "
        f"8 KB, 32 KB and 1 MB, {accesses.dram[0] / 1e3:g} to {accesses.dram[1] / 1e3:g} nJ in DRAM. {accesses.source}."
    )


def energy_parts() -> str:
    """Where the first student's energy goes in decode, and a baseline's."""
    energies = read("energy.json")["students"][0]["phases"]["decode"]["energy"]
    parts = dict.fromkeys(part for energy in energies.values() for part in energy["parts_pj"])
    lines = [
        [
            part,
            *(joules(energy["parts_pj"][part]) if part in energy["parts_pj"] else "" for energy in energies.values()),
        ]
        for part in parts
    ]
    return markdown(("a token in decode", *(TITLES[name] for name in energies)), lines)


TABLES: dict[str, Callable[[], str]] = {
    "energy_report": energy_report,
    "energy_benefits": energy_benefits,
    "energy_shapes": energy_shapes,
    "energy_costs": energy_costs,
    "energy_parts": energy_parts,
}
