"""A report as a picture: energy by part, of the model and its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikelm.energy.markdown import TITLES, joules
from spikelm.errors import SpikelmError
from spikelm.plot import _new_figure, _save

_COLOURS = {
    "accumulated products": "C0",
    "dense products": "C3",
    "neurons": "C2",
    "softmax": "C5",
    "norm": "C4",
    "elementwise": "C7",
    "bias": "C8",
}


def draw(data: Mapping[str, Any], path: str | Path) -> Path:
    """One panel a phase: stacked arithmetic, and the range of the total with moving data as a line beside the bar."""
    phases = data["phases"]
    if any(energy["arithmetic_pj"] is None for phase in phases.values() for energy in phase["energy"].values()):
        raise SpikelmError("a report of shapes alone (meta device) has no energies to draw")
    figure = _new_figure(5.2 * len(phases), 4.8)
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for axes, (name, phase) in zip(panels, phases.items(), strict=True):
        for place, energy in enumerate(phase["energy"].values()):
            bottom = 0.0
            for part, spent in energy["parts_pj"].items():
                axes.bar(place - 0.15, spent, 0.5, bottom=bottom, color=_COLOURS.get(part, "C9"), label=part)
                bottom += spent
            ends = energy["total_pj"]
            axes.plot(
                [place + 0.25] * 2, [ends["low"], ends["high"]], color="0.3", marker="_", label="with moving data"
            )
            axes.annotate(joules(bottom), (place - 0.15, bottom), ha="center", va="bottom", fontsize=8)
        largest = max(energy["arithmetic_pj"] for energy in phase["energy"].values())
        axes.set_yscale("symlog", linthresh=max(largest, 1e-12))  # bars are linear, what DRAM adds logarithmic
        axes.set_xticks(range(len(phase["energy"])), [TITLES[key] for key in phase["energy"]], rotation=15, fontsize=9)
        axes.set_ylabel(f"pJ per {data['per'].split()[0]}")
        axes.set_title(name)
        axes.grid(True, axis="y", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(f"{data['model']}, {data['costs']['name']}: {data['estimate']}", fontsize=10)
    return _save(figure, path)
