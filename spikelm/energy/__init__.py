"""What a spiking model computes, and an estimate of what that costs. Nothing here is measured on hardware."""

from spikelm.energy.binary_operands import BinaryOperands
from spikelm.energy.costs import COSTS, CostTable
from spikelm.energy.counter import OperationCounter
from spikelm.energy.encoder import estimate_encoder
from spikelm.energy.estimate import estimate

__all__ = ["COSTS", "BinaryOperands", "CostTable", "OperationCounter", "estimate", "estimate_encoder"]
