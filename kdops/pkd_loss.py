"""Distillation by Pearson correlation (PKD), Cao et al. 2022, arXiv:2207.02039.

Both maps are normalised per channel and compared by their squared difference:

    loss = loss_weight * SUM_levels mean( (norm(student) - norm(teacher))^2 ) / 2

which is (M-1)/M * (1 - mean Pearson correlation) of the channels up to eps, M = N*H*W. The fused kernels never write
a normalised map: five centred sums per channel give the loss and its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch.nn.functional as F
from torch import Tensor, nn

from kdops import _checks, _norm, _op

__all__ = ["PKDLoss", "pkd_loss", "pkd_loss_ref"]

Maps = Union[Tensor, Sequence[Tensor]]
_NORMS = ("pkd", "batch")
_RESIZES = (None, "student", "teacher")

_fused = _op.FusedLoss(
    "pkd_loss",
    "int norm, float eps, float loss_weight",
    fields=8,
    units=lambda student: student.shape[1],
)


def pkd_loss_ref(student: Tensor, teacher: Tensor, norm: str, eps: float, loss_weight: float) -> Tensor:
    """The values per channel, Tensor[C], of one level in eager PyTorch: the ground truth."""
    s = _norm.normalise(_norm.as_accumulated(student), norm, eps)
    t = _norm.normalise(_norm.as_accumulated(teacher), norm, eps)
    return (loss_weight / 2) * (s - t).square().mean(dim=(0, 2, 3))


def pkd_loss(
    student: Maps,
    teacher: Maps,
    *,
    loss_weight: float = 1.0,
    norm: str = "pkd",
    eps: float | None = None,
    resize: str | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Feature imitation by Pearson correlation (Cao et al. 2022, arXiv:2207.02039).

    ``loss_weight * mean((norm(student) - norm(teacher))^2) / 2``, each channel normalised over N, H and W; levels of
    a pyramid are summed.

    Args:
        student: Tensor[N, C, H, W], or a list of pyramid levels. float16, bfloat16, float32 or float64; NCHW,
            channels_last or any strides. Gets a gradient, in its own dtype and memory format.
        teacher: like ``student``, each level of the same shape unless ``resize`` is given; its dtype and layout may
            differ. Gets no gradient and must not require one.
        loss_weight: factor of the loss (published: 6 for two-stage detectors, 10 for one-stage).
        norm: ``"pkd"`` (unbiased deviation, eps added to it: the paper's) or ``"batch"`` (biased variance, eps inside
            the root: BatchNorm without parameters). Statistics are over N, H and W of this process.
        eps: overrides the eps of the normalisation (1e-6 for ``"pkd"``, 1e-5 for ``"batch"``).
        resize: where height or width differ, resize the ``"student"`` to the teacher's size or the ``"teacher"`` to
            the student's, bilinearly with ``align_corners=False``; with None, different sizes raise.
        reduction: ``"mean"`` (the published scaling above), ``"sum"`` (of the values per channel) or ``"none"`` (a
            Tensor[C] of values per channel, whose mean is the loss; a list of them for a list of levels).
        backend: ``"auto"``, ``"fused"`` (raise where there is no kernel) or ``"reference"`` (eager PyTorch).

    Accuracy of the fused kernels: the relative error of the value is at most 5e-6 or, where the maps agree up to their
    scale and it vanishes, the absolute error is at most 1e-7 * loss_weight. The gradient's error is that of the eager
    code in fp32 and does not grow with the mean.

    Returns:
        Tensor: float32 (float64 if an input is float64); a scalar unless ``reduction="none"``.

    Raises:
        TypeError: student, teacher or a number is of the wrong type or dtype.
        ValueError: shapes, devices or lengths differ, a map is empty or not 4-D, the teacher requires grad, there is
            one value per channel, or an option is out of its range.
        RuntimeError: no kernel for the device and ``backend="fused"``; a second derivative of the fused loss.
    """
    students, teachers, single = _checks.levels("pkd_loss", student, teacher)
    _checks.choice("pkd_loss", "norm", norm, _NORMS)
    _checks.choice("pkd_loss", "resize", resize, _RESIZES)
    _checks.choice("pkd_loss", "reduction", reduction, tuple(_checks.REDUCTIONS))
    _checks.choice("pkd_loss", "backend", backend, _checks.BACKENDS)
    _checks.maps("pkd_loss", students, teachers, norm if resize is None else None, same_size=resize is None)
    loss_weight = _checks.number("pkd_loss", "loss_weight", loss_weight)
    eps = _checks.eps("pkd_loss", norm, eps)
    if resize is not None:
        students, teachers = _resized(students, teachers, resize)
        _checks.maps("pkd_loss", students, teachers, norm)
    if _op.resolve("pkd_loss", backend, students[0].device) == "reference":
        channels = [pkd_loss_ref(s, t, norm, eps, loss_weight) for s, t in zip(students, teachers)]
        return _op.reduce(channels, reduction, single)
    code = _checks.REDUCTIONS[reduction]
    loss = _fused(students, teachers, _norm.CODES[norm], eps, loss_weight, code)
    return loss if reduction != "none" else _op.split(loss, [s.shape[1:2] for s in students], single)


def _resized(students: list[Tensor], teachers: list[Tensor], resize: str) -> tuple[list[Tensor], list[Tensor]]:
    sources, targets = (students, teachers) if resize == "student" else (teachers, students)
    sources = [
        x if x.shape[2:] == y.shape[2:] else F.interpolate(x, size=y.shape[2:], mode="bilinear", align_corners=False)
        for x, y in zip(sources, targets)
    ]
    return (sources, teachers) if resize == "student" else (students, sources)


class PKDLoss(nn.Module):
    """Feature imitation by Pearson correlation as a module. See `kdops.pkd_loss`."""

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        norm: str = "pkd",
        eps: float | None = None,
        resize: str | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.loss_weight = _checks.number("PKDLoss", "loss_weight", loss_weight)
        _checks.choice("PKDLoss", "norm", norm, _NORMS)
        _checks.choice("PKDLoss", "resize", resize, _RESIZES)
        _checks.choice("PKDLoss", "reduction", reduction, tuple(_checks.REDUCTIONS))
        _checks.choice("PKDLoss", "backend", backend, _checks.BACKENDS)
        self.norm, self.eps, self.resize = norm, _checks.eps("PKDLoss", norm, eps), resize
        self.reduction, self.backend = reduction, backend

    def forward(self, preds_S: Maps, preds_T: Maps) -> Tensor | list[Tensor]:
        """The loss of the student's maps ``preds_S``, which get a gradient, and the teacher's ``preds_T``."""
        return pkd_loss(
            preds_S,
            preds_T,
            loss_weight=self.loss_weight,
            norm=self.norm,
            eps=self.eps,
            resize=self.resize,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"loss_weight={self.loss_weight}, norm={self.norm!r}, resize={self.resize!r}, reduction={self.reduction!r}"
        )
