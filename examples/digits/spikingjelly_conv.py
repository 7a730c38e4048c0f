"""A convolutional SpikingJelly network on scikit-learn's digits, with the neuron of your choice.

    python examples/digits/spikingjelly_conv.py neuron=ATMN output_dir=runs/conv_atmn

neuron is LIFNode, SpikingJelly's own, or ATMN, TILIF, BinaryIF of spikelm. Any field may follow as field=value (--help
lists them); --preset smoke takes seconds. output_dir gets metrics.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from digits import PRESETS, Settings, print_result, train_and_record
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from spikelm.neurons import ATMN, TILIF, BinaryIF
from spikelm.presets import config_from_command_line
from spikelm.run import command_line

BASELINE = "LIFNode"
NEURONS = {
    "LIFNode": partial(LIFNode),
    "ATMN": partial(ATMN, inject="every"),  # the image comes at every step
    "TILIF": partial(TILIF),
    "BinaryIF": partial(BinaryIF),
}


@dataclass(frozen=True)
class Config(Settings):
    """One training run."""

    neuron: Literal["LIFNode", "ATMN", "TILIF", "BinaryIF"] = "BinaryIF"
    T: int = 4


class ConvNet(nn.Module):
    """Two convolutions and a classifier, shown the same image T times."""

    def __init__(self, neuron: Callable[[], nn.Module], T: int) -> None:
        super().__init__()
        self.T = T
        self.layers = nn.Sequential(
            layer.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            layer.BatchNorm2d(16),
            neuron(),
            layer.MaxPool2d(2, 2),
            layer.SeqToANNContainer(nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(32)),
            neuron(),
            layer.MaxPool2d(2, 2),
            layer.Flatten(),
            layer.Linear(32 * 2 * 2, 10),
        )
        functional.set_step_mode(self.layers, "m")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 64] to logits [N, 10]."""
        functional.reset_net(self.layers)
        x_seq = images.view(1, -1, 1, 8, 8).repeat(self.T, 1, 1, 1, 1)
        return self.layers(x_seq).mean(0)


def run(config: Config) -> dict[str, Any]:
    """Train, and what metrics.json holds."""
    return train_and_record(config, lambda neuron: ConvNet(neuron, config.T), NEURONS[config.neuron])


def main() -> None:
    """One run."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="full")
    print_result(run(config))


if __name__ == "__main__":
    command_line(main)
