"""Distillation: pure losses, taps, objectives; the trainer needs transformers: `from spikelm.distill.trainer import
train`.
"""

from spikelm.distill.objectives import SBDS, HiddenAlignment, HiddenMatch, LogitDistillation, MatrixOrientation
from spikelm.distill.spad import SpAD
from spikelm.distill.taps import Taps

__all__ = ["SBDS", "HiddenAlignment", "HiddenMatch", "LogitDistillation", "MatrixOrientation", "SpAD", "Taps"]
