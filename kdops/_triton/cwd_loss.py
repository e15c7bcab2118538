"""Launches the kernels of channel-wise distillation. Shapes, dtypes and values have been checked by the caller.

Launches per call: the table, cwd_moments, cwd_merge and cwd_sums with a normalisation, or the table and cwd_online
without, then cwd_finish only where rows are split, and one sum; backward the table and cwd_gradient. All levels with
the same dtype and memory format share them. No host synchronization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdops._triton.cwd_backward import cwd_gradient
from kdops._triton.cwd_forward import cwd_finish, cwd_merge, cwd_moments, cwd_online, cwd_sums
from kdops._triton.plan import DTYPES, MERGE, REGISTERS, Group, double_bits, groups, on_device

STATS_FIELDS = 10
_PART_FIELDS = 8  # of cwd_moments; cwd_online and cwd_sums need two less
_MEAN, _NONE = 0, 2
_FINISH_ROWS = 256
ONLINE = {"maxnreg": REGISTERS}


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tau: float,
    norm: int,
    eps: float,
    loss_weight: float,
    reduction: int,
    save: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss and the statistics of kdops::cwd_loss; save 0 or 1."""
    if save not in (0, 1):
        raise ValueError(f"cwd_loss: the Triton kernels save nothing (0) or statistics (1), got save={save}")
    with on_device(student[0]):
        launches = groups(student, teacher)
        acc = launches[0].acc
        rows = sum(s.shape[0] * s.shape[1] for s in student)
        stats = student[0].new_empty((STATS_FIELDS, rows), dtype=acc)
        losses = student[0].new_empty(rows, dtype=acc)
        for group in launches:
            _forward_group(group, student, teacher, stats, losses, tau, norm, eps, loss_weight, reduction)
        loss = losses if reduction == _NONE else losses.sum()
        return loss, stats if save else stats.new_empty(0), []


def backward(
    grad_output: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    stats: Tensor,
    tau: float,
    norm: int,
    eps: float,
    loss_weight: float,
    reduction: int,
) -> list[Tensor]:
    """The student's gradient of kdops::cwd_loss_backward."""
    with on_device(student[0]):
        grads = [torch.empty_like(s) for s in student]
        for group in groups(student, teacher, grads):
            cwd_gradient[group.grid](
                group.table(student, teacher, grads),
                stats,
                grad_output,
                grad_output.stride(0) if grad_output.dim() else 0,
                stats.shape[1],
                group.tiling.chunk,
                double_bits(loss_weight),
                double_bits(tau),
                **group.constants,
                **group.units,
                NORMALISED=norm != 0,
                MEAN=reduction == _MEAN,
            )
        return grads


def _forward_group(
    group: Group,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    stats: Tensor,
    losses: Tensor,
    tau: float,
    norm: int,
    eps: float,
    loss_weight: float,
    reduction: int,
) -> None:
    table = group.table(student, teacher)
    parts = stats.new_empty(_PART_FIELDS * group.parts)
    rows, chunk, levels = stats.shape[1], group.tiling.chunk, len(group.levels)
    if norm:
        cwd_moments[group.grid](table, parts, group.parts, chunk, **group.constants)
        grid = (-(-group.max_channels // MERGE["CHANNELS"]), levels)
        acc = DTYPES[group.acc]
        cwd_merge[grid](table, parts, stats, group.parts, rows, chunk, double_bits(eps), ACC=acc, NORM=norm, **MERGE)
    arguments = (table, stats, losses, parts, rows, group.parts, chunk, double_bits(loss_weight), double_bits(tau))
    mean = reduction == _MEAN
    if norm:
        cwd_sums[group.grid](*arguments, **group.constants, **group.units, SPLIT=group.split, MEAN=mean)
    else:
        cwd_online[group.grid](*arguments, **{**group.constants, **ONLINE}, SPLIT=group.split, MEAN=mean)
    if group.split:
        grid = (-(-group.max_rows // _FINISH_ROWS), levels)
        cwd_finish[grid](
            *arguments, ACC=DTYPES[group.acc], NORMALISED=norm != 0, MEAN=mean, ROWS=_FINISH_ROWS, num_warps=4
        )
