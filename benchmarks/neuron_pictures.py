"""Draws the pictures of docs/neurons.md, docs/images/neuron_*.png.

python benchmarks/neuron_pictures.py
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from spikelm.neurons import ATMN, TILIF, BinaryIF
from spikelm.plot import raster, response

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def draw(folder: Path) -> list[Path]:
    """Every picture, into ``folder``."""
    torch.manual_seed(0)
    return [
        response(
            {"tau = 1": ATMN(), "tau = 0.5, frame t weighs 0.5^t": ATMN(tau=0.5, frame_weight=0.5)},
            folder / "neuron_atmn.png",
            title="ATMN, T = 4, V = 1: one encoding",
        ),
        response(
            {
                "no compensation": TILIF(),
                'sgc = "gradient", w = 0.3': TILIF(sgc="gradient"),
                'sgc = "blend", w = 0.3': TILIF(sgc="blend"),
            },
            folder / "neuron_tilif.png",
            low=-6,
            high=6,
            title="TILIF, D = 4, V = 1: one encoding in training mode",
        ),
        response(
            {
                "soft reset": BinaryIF(beta=0.9),
                "delayed soft reset": BinaryIF(beta=0.9, reset_delay=True),
                "hard reset to 0": BinaryIF(beta=0.9, v_reset=0.0),
            },
            folder / "neuron_binary_if.png",
            steps=4,
            low=-0.5,
            high=2.5,
            title="BinaryIF, beta = 0.9, V = 1: four steps of a constant current",
        ),
        raster(
            ATMN(inject="every", step_mode="m")(travelling_wave()),
            folder / "neuron_raster.png",
            x_label="time step",
            title="ATMN on a travelling wave",
        ),
    ]


def travelling_wave(steps: int = 64, neurons: int = 48) -> torch.Tensor:
    """0.6 sin of a phase that runs over the neurons, and a little noise: [steps, neurons]."""
    t, n = torch.arange(steps)[:, None], torch.arange(neurons)
    wave = 0.6 * torch.sin(2 * math.pi * (t / 48 - n / neurons))
    return wave + 0.2 * torch.randn(steps, neurons)


if __name__ == "__main__":
    for path in draw(IMAGES):
        print(path)
