"""The Distiller of a phase: the student's FPN outputs against the teacher's, all levels in one call of a kdops loss."""

from __future__ import annotations

from torch import nn

import kdops
from kdops.distill import CosineWeight, Distiller, StopDistillation, Tap

from .models import FPN_LEVELS
from .plan import Phase
from .settings import Settings

# The weights published for one-stage detectors.
DEFAULT_WEIGHTS = {"cwd": 1.0, "pkd": 10.0}


def make_aligns(settings: Settings) -> list[nn.Module]:
    """A 1x1 convolution per level, from the student's FPN width to the teacher's."""
    # DAMO-YOLO's has a bias, RTMDet's has none.
    bias = settings.recipe == "damo"
    return [nn.Conv2d(settings.student_channels, settings.teacher_channels, 1, bias=bias) for _ in FPN_LEVELS]


def make_distiller(
    student: nn.Module, teacher: nn.Module, aligns: list[nn.Module], settings: Settings, phase: Phase, steps: int
) -> Distiller:
    """``steps``: optimiser steps of the whole phase."""
    return Distiller(
        student,
        teacher,
        [Tap(level, loss=make_loss(settings), align=align) for level, align in zip(FPN_LEVELS, aligns)],
        weight=CosineWeight(start=1.0, end=0.1, steps=steps) if phase.weight == "cosine" else 1.0,
        stop=None if phase.stop_epoch is None else StopDistillation(epoch=phase.stop_epoch),
    )


def make_loss(settings: Settings) -> nn.Module:
    weight = DEFAULT_WEIGHTS[settings.loss] if settings.loss_weight is None else settings.loss_weight
    if settings.loss == "cwd":
        return kdops.CWDLoss(tau=settings.tau, norm="batch", loss_weight=weight, backend=settings.backend)
    return kdops.PKDLoss(loss_weight=weight, backend=settings.backend)
