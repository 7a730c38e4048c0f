"""An snnTorch multilayer perceptron on scikit-learn's digits, with the neuron of your choice.

    python examples/digits/snntorch_mlp.py neuron=TILIF output_dir=runs/mlp_tilif

neuron is Leaky, snnTorch's own, or ATMN, TILIF, BinaryIF of spikelm.interop.snntorch. Any field may follow as
field=value (--help lists them); --preset smoke takes seconds. output_dir gets metrics.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from digits import PRESETS, Settings, print_result, train_and_record
from snntorch import Leaky
from torch import nn

from spikelm.interop.snntorch import ATMN, TILIF, BinaryIF
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


class Perceptron(nn.Module):
    """One hidden layer, shown the same image T times; the class is the output neuron with the highest spike count."""

    def __init__(self, neuron: Callable[[], nn.Module], T: int) -> None:
        super().__init__()
        self.T = T
        self.fc1 = nn.Linear(64, 256)
        self.lif1 = neuron()
        self.fc2 = nn.Linear(256, 10)
        self.lif2 = neuron()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 64] to spike counts [N, 10]."""
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk2_rec = []
        for _ in range(self.T):
            spk1, mem1 = self.lif1(self.fc1(images), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
        return torch.stack(spk2_rec).sum(0)


def run(config: Config) -> dict[str, Any]:
    """Train, and what metrics.json holds."""
    return train_and_record(config, lambda neuron: Perceptron(neuron, config.T), NEURONS[config.neuron])


def main() -> None:
    """One run."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="full")
    print_result(run(config))


if __name__ == "__main__":
    command_line(main)
