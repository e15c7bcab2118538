"""Launches the kernels of PKD. Shapes, dtypes and values have been checked by the caller.

Launches per call: the table, pkd_moments, pkd_merge and one sum; backward the table and pkd_gradient. All levels with
the same dtype and memory format share them. No host synchronization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdops._triton.pkd_kernels import pkd_gradient, pkd_merge, pkd_moments
from kdops._triton.plan import DTYPES, MERGE, double_bits, groups, on_device

STATS_FIELDS = 8
_PART_FIELDS = 8
_MEAN, _NONE = 0, 2


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    norm: int,
    eps: float,
    loss_weight: float,
    reduction: int,
    save: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss and the statistics of kdops::pkd_loss; save 0 or 1."""
    if save not in (0, 1):
        raise ValueError(f"pkd_loss: the Triton kernels save nothing (0) or statistics (1), got save={save}")
    with on_device(student[0]):
        launches = groups(student, teacher)
        acc = launches[0].acc
        channels = sum(s.shape[1] for s in student)
        stats = student[0].new_empty((STATS_FIELDS, channels), dtype=acc)
        losses = student[0].new_empty(channels, dtype=acc)
        for group in launches:
            table, chunk = group.table(student, teacher), group.tiling.chunk
            parts = stats.new_empty(_PART_FIELDS * group.parts)
            pkd_moments[group.grid](table, parts, group.parts, chunk, **group.constants)
            pkd_merge[(-(-group.max_channels // MERGE["CHANNELS"]), len(group.levels))](
                table,
                parts,
                stats,
                losses,
                group.parts,
                channels,
                chunk,
                double_bits(eps),
                double_bits(loss_weight),
                ACC=DTYPES[acc],
                NORM=norm,
                MEAN=reduction == _MEAN,
                **MERGE,
            )
        loss = losses if reduction == _NONE else losses.sum()
        return loss, stats if save else stats.new_empty(0), []


def backward(
    grad_output: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    stats: Tensor,
    norm: int,
    eps: float,
    loss_weight: float,
    reduction: int,
) -> list[Tensor]:
    """The student's gradient of kdops::pkd_loss_backward."""
    with on_device(student[0]):
        grads = [torch.empty_like(s) for s in student]
        for group in groups(student, teacher, grads):
            pkd_gradient[group.grid](
                group.table(student, teacher, grads),
                stats,
                grad_output,
                grad_output.stride(0) if grad_output.dim() else 0,
                stats.shape[1],
                group.tiling.chunk,
                double_bits(loss_weight),
                **group.constants,
                **group.units,
                MEAN=reduction == _MEAN,
            )
        return grads
