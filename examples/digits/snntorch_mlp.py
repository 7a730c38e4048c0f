"""An snnTorch multilayer perceptron on scikit-learn's digits, with the neuron of your choice.

    python examples/digits/snntorch_mlp.py neuron=TILIF output_dir=runs/mlp_tilif

neuron is Leaky, snnTorch's own, or ATMN, TILIF, BinaryIF of spikelm.interop.snntorch. Any field may follow as
field=value (--help lists them); --preset smoke takes seconds. output_dir gets metrics.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from digits import PRESETS, Settings, print_result, train_and_record
from snntorch import Leaky
from torch import nn

from spikelm.interop.snntorch import ATMN, TILIF, BinaryIF
from spikelm.neurons.base import check_count
from spikelm.presets import config_from_command_line
from spikelm.run import command_line

BASELINE = "Leaky"
NEURONS = {
    "Leaky": partial(Leaky, beta=0.9),
    "ATMN": partial(ATMN, beta=0.9),
    "TILIF": partial(TILIF, beta=0.9),
    "BinaryIF": partial(BinaryIF, beta=0.9),
}


@dataclass(frozen=True)
class Config(Settings):
    """One training run."""

    neuron: Literal["Leaky", "ATMN", "TILIF", "BinaryIF"] = "BinaryIF"
    T: int = 5
    hidden_layers: int = 1


class Perceptron(nn.Module):
    """Linear layers and neurons in turn, shown the same image T times; the class is the one with the most spikes."""

    def __init__(self, neuron: Callable[[], nn.Module], T: int, hidden_layers: int) -> None:
        super().__init__()
        self.T = T
        sizes = [64, *[256] * hidden_layers, 10]
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        self.neurons = nn.ModuleList(neuron() for _ in self.linears)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 64] to spike counts [N, 10]."""
        mem = [neuron.reset_mem() for neuron in self.neurons]
        spk_rec = []
        for _ in range(self.T):
            spk = images
            for i, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                spk, mem[i] = neuron(linear(spk), mem[i])
            spk_rec.append(spk)
        return torch.stack(spk_rec).sum(0)


def run(config: Config) -> dict[str, Any]:
    """Train, and what metrics.json holds."""
    check_count("hidden_layers", config.hidden_layers)
    return train_and_record(
        config, lambda neuron: Perceptron(neuron, config.T, config.hidden_layers), NEURONS[config.neuron]
    )


def main() -> None:
    """One run."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="full")
    print_result(run(config))


if __name__ == "__main__":
    command_line(main)
