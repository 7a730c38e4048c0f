"""Distillation: pure losses, taps, objectives; the trainer needs transformers: `from spikelm.distill.trainer import
train`.
"""

from spikelm.distill.activity import Activity
from spikelm.distill.internal_kd import InternalKD
from spikelm.distill.objectives import SBDS, HiddenAlignment, HiddenMatch, LogitDistillation, MatrixOrientation
from spikelm.distill.spad import SpAD
from spikelm.distill.taps import Taps

__all__ = [
    "SBDS",
    "Activity",
    "HiddenAlignment",
    "HiddenMatch",
    "InternalKD",
    "LogitDistillation",
    "MatrixOrientation",
    "SpAD",
    "Taps",
]
