"""kdops: fused feature-distillation losses for PyTorch detectors."""

from kdops._version import __version__
from kdops.cwd_loss import CWDLoss, cwd_loss
from kdops.distill import (
    ConstantWeight,
    CosineWeight,
    DistilledStudent,
    Distiller,
    LinearWeight,
    ProgressiveDistillation,
    Stage,
    StopDistillation,
    Tap,
    TeacherOptions,
    WarmupWeight,
    order_teachers,
    student_checkpoint,
)
from kdops.masked_generation import MaskedGeneration, masked_generation
from kdops.mgd_loss import MGDLoss, mgd_loss
from kdops.pkd_loss import PKDLoss, pkd_loss

__all__ = [
    "CWDLoss",
    "ConstantWeight",
    "CosineWeight",
    "DistilledStudent",
    "Distiller",
    "LinearWeight",
    "MGDLoss",
    "MaskedGeneration",
    "PKDLoss",
    "ProgressiveDistillation",
    "Stage",
    "StopDistillation",
    "Tap",
    "TeacherOptions",
    "WarmupWeight",
    "__version__",
    "cwd_loss",
    "masked_generation",
    "mgd_loss",
    "order_teachers",
    "pkd_loss",
    "student_checkpoint",
]
