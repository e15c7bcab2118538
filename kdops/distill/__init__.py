"""The training side: a frozen teacher beside any PyTorch training loop."""

from kdops.distill.checkpoints import StudentCheckpoint, student_checkpoint
from kdops.distill.distiller import Distiller, DistillLoss
from kdops.distill.progressive import ProgressiveDistillation, Stage
from kdops.distill.schedules import (
    ConstantWeight,
    CosineWeight,
    LinearWeight,
    StopDistillation,
    WarmupWeight,
    WeightSchedule,
)
from kdops.distill.taps import Tap
from kdops.distill.teacher_options import TeacherOptions, TeacherReport
from kdops.distill.teacher_order import TeacherOrder, order_teachers
from kdops.distill.wrapper import DistilledOutput, DistilledStudent, exclude_from_ddp

__all__ = [
    "ConstantWeight",
    "CosineWeight",
    "DistillLoss",
    "DistilledOutput",
    "DistilledStudent",
    "Distiller",
    "LinearWeight",
    "ProgressiveDistillation",
    "Stage",
    "StopDistillation",
    "StudentCheckpoint",
    "Tap",
    "TeacherOptions",
    "TeacherOrder",
    "TeacherReport",
    "WarmupWeight",
    "WeightSchedule",
    "exclude_from_ddp",
    "order_teachers",
    "student_checkpoint",
]
