"""What a model computes and moves, and an estimate of its energy beside baselines. Nothing is measured on hardware."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikelm.energy.costs import CostTable, cost_table
from spikelm.energy.latency import latency
from spikelm.energy.markdown import to_markdown
from spikelm.energy.phases import batches_of, run_phases
from spikelm.energy.price import energy_of, projections, terms_of, whole
from spikelm.energy.rows import phase_rows
from spikelm.errors import SpikelmError
from spikelm.evaluate import evaluation_mode

DISCLAIMER = "estimate, not measured on hardware"


@dataclass(frozen=True)
class Report:
    """The result of :func:`report`.

    Attributes:
        data: JSON types; docs/energy.md has the fields. Every figure is per token (or sample) of its phase.
    """

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The data."""
        return self.data

    def summary(self) -> dict[str, Any]:
        """Without the phases: what was counted, by which costs, and the terms and benefits of the first phase."""
        return {key: value for key, value in self.data.items() if key != "phases"}

    def to_json(self, path: str | Path | None = None) -> str:
        """As text, also written to ``path`` if given."""
        text = json.dumps(self.data, indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """A report that was written; SpikelmError for a file that is missing or is no such report."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SpikelmError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # neither JSON nor text
            raise SpikelmError(f"{path} is no report of spikelm.energy, and no JSON: {error}") from error
        if not isinstance(data, dict) or DISCLAIMER != data.get("estimate"):
            raise SpikelmError(f"{path} is no report of spikelm.energy")
        return cls(data)

    def to_markdown(self, products: int = 12) -> str:
        """Tables of every phase, with the ``products`` that cost most."""
        return to_markdown(self.data, products)

    def plot(self, path: str | Path) -> Path:
        """Bars of the energy by part, phases side by side, model and baselines, to a .png; returns its path."""
        if Path(path).suffix.lower() != ".png":
            raise SpikelmError(f"a report is drawn to a file that ends in .png; got {path}")
        from spikelm.energy.picture import draw

        return draw(self.data, path)


def report(
    model: nn.Module,
    batch_or_dataset: Any,
    costs: str | CostTable = "45nm-fp32",
    *,
    teacher: nn.Module | None = None,
    measure: bool = False,
    max_batches: int = 8,
    time_steps: int | None = None,
) -> Report:
    """Counts what a model runs for a batch, operator by operator, and what that would cost by a table of costs.

    Takes any nn.Module: of transformers, a SpikingJelly or snnTorch network, spiking or not, deployed or not; no class
    of models is known to it. A causal LM is counted for prefill (the batch) and decode (one token more, from the
    cache), everything else for one forward. ``data["phases"]`` has all; what stands beside it ("terms", "projections",
    "whole") is of the phase that ``data["of"]`` names, of a causal LM prefill. Counting is slow, several times a plain
    pass. On the meta device shapes are counted alone: rates and what follows from them are None.

    Args:
        batch_or_dataset: a tensor, a mapping of tensors (keyword arguments; labels are left out), or an iterable of
            such, e.g. rows {"input_ids": [...]}. Padding is computed on, and counted: leave it out.
        costs: a name in ``spikelm.energy.COSTS``, or a table.
        teacher: counted on the same batches, as another baseline.
        measure: also measure the latency here, and NVML's energy where there is a GPU.
        max_batches: of an iterable, so many are taken, 1 or more.
        time_steps: how many steps the neurons run from rest to rest. None: T where modules run in SpikingJelly's step
            mode "m", else how often the neurons are called between resets, if all are called equally often. Give it
            where that is not time: 1 for two inputs that share neurons which nobody resets.

    Neurons of SpikingJelly and snnTorch start every batch, and are left, at rest.

    Raises:
        SpikelmError: no batch, an empty one or another kind of batch, unknown costs, a max_batches below 1, or
            time_steps that the neurons do not run.
    """
    for name, value in (("max_batches", max_batches), ("time_steps", time_steps)):
        if not (name == "time_steps" and value is None) and (type(value) is not int or value < 1):
            raise SpikelmError(f"{name} must be a whole number, 1 or more; got {value!r}")
    table = cost_table(costs)
    if not isinstance(model, nn.Module) or not (teacher is None or isinstance(teacher, nn.Module)):
        raise SpikelmError(f"report takes an nn.Module; got {type(model).__name__}, teacher {type(teacher).__name__}")
    batches = batches_of(model, batch_or_dataset, max_batches)
    data: dict[str, Any] = _counted(model, batches, table, time_steps)
    if teacher is not None:
        other = _counted(teacher, batches_of(teacher, batches, max_batches), table)
        for name, phase in data["phases"].items():
            if name in other["phases"]:
                phase["energy"]["teacher"] = other["phases"][name]["energy"]["model"]
        data["teacher"] = {key: other[key] for key in ("model", "parameters", "terms")}
    if measure:
        with evaluation_mode(model):
            data["latency"] = latency(model, batches[0])
    return Report(data)


def _counted(
    model: nn.Module, batches: list[dict[str, Any]], table: CostTable, time_steps: int | None = None
) -> dict[str, Any]:
    with evaluation_mode(model), torch.no_grad():
        found = run_phases(model, batches, time_steps)
    phases: dict[str, Any] = {}
    for name, passes in found.passes.items():
        phase = phase_rows(passes)
        phase["energy"] = energy_of(phase, table)
        phase["terms"] = terms_of(phase)
        phase["projections"] = projections(phase, table)
        phase["whole"] = whole(phase["energy"])
        phases[name] = phase
    first = next(iter(phases))  # whose tokens are more, and rates surer
    return {
        "estimate": DISCLAIMER,
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "per": f"{found.unit} of its phase",
        "costs": asdict(table) | {"on_chip": list(table.on_chip), "dram": list(table.dram)},
        "of": first,
        **{key: phases[first][key] for key in ("terms", "projections", "whole")},
        "phases": phases,
        "missing": found.missing,
    }
