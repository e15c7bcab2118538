"""What the adapters for trainers share."""

from __future__ import annotations

from typing import Union

import torch

from kdops.distill import Distiller, ProgressiveDistillation

__all__ = ["AnyDistiller", "DISTILLERS", "place_beside_student"]

DISTILLERS = (Distiller, ProgressiveDistillation)
AnyDistiller = Union[Distiller, ProgressiveDistillation]


def place_beside_student(distiller: AnyDistiller) -> None:
    """Move align layers, losses and teacher to the student's device, and to its dtype where that is not float32."""
    like = next(distiller.student.parameters())
    distiller.to(device=like.device, dtype=None if like.dtype == torch.float32 else like.dtype)
