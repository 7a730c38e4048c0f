"""Layers that models are composed of."""

from spikelm.layers.bit_linear import BitLinear
from spikelm.layers.discrete_mamba2 import DiscreteMamba2
from spikelm.layers.gather_linear import GatherLinear
from spikelm.layers.spiking_attention import SpikingSelfAttention
from spikelm.layers.spiking_linear import SpikingLinear
from spikelm.layers.ternary_linear import TernaryLinear

__all__ = ["BitLinear", "DiscreteMamba2", "GatherLinear", "SpikingLinear", "SpikingSelfAttention", "TernaryLinear"]
