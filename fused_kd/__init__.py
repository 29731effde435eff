"""fused_kd: the knowledge-distillation loss for large vocabularies, without a temporary of the logits' size."""

from fused_kd import presets
from fused_kd.functional import KDLossOutput, fused_kd_loss
from fused_kd.identification import identify
from fused_kd.linear import fused_linear_kd_loss
from fused_kd.loss import FusedKDLoss, FusedLinearKDLoss
from fused_kd.sparse import SparseTeacher

__version__ = "0.1.0"
__all__ = [
    "FusedKDLoss",
    "FusedLinearKDLoss",
    "KDLossOutput",
    "SparseTeacher",
    "fused_kd_loss",
    "fused_linear_kd_loss",
    "identify",
    "presets",
]
