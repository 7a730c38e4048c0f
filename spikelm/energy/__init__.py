"""What a model computes and moves, and an estimate of what that costs. Nothing here is measured on hardware."""

from spikelm.energy.binary_operands import BinaryOperands
from spikelm.energy.costs import COSTS, CostTable
from spikelm.energy.counter import OperationCounter
from spikelm.energy.report import Report, report

__all__ = [
    "COSTS",
    "BinaryOperands",
    "CostTable",
    "OperationCounter",
    "Report",
    "report",
]
