"""Distillation: pure losses, taps, objectives; the trainer needs transformers: `from spikelm.distill.trainer import
train`.
"""

from spikelm.distill.objectives import SBDS, HiddenAlignment, LogitDistillation, MatrixOrientation
from spikelm.distill.taps import Taps

__all__ = ["SBDS", "HiddenAlignment", "LogitDistillation", "MatrixOrientation", "Taps"]
