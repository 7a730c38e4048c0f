"""Layers that models are composed of."""

from spikelm.layers.discrete_mamba2 import DiscreteMamba2
from spikelm.layers.spiking_linear import SpikingLinear

__all__ = ["DiscreteMamba2", "SpikingLinear"]
