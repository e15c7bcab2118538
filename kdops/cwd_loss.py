"""Channel-wise distillation (CWD), Shu et al. 2021, arXiv:2011.13256.

A softmax turns every channel of a feature map into a distribution over its positions; the loss is the Kullback-Leibler
divergence between the teacher's and the student's:

    loss = loss_weight * tau^2 / (N*C) * SUM_{n,c} KL( softmax_HW(teacher / tau) || softmax_HW(student / tau) )

RTMDet and DAMO-YOLO normalise every channel of both maps first (``norm="batch"``). The fused kernels never write a
normalised map or a probability: the loss and its gradient follow from a few sums per row (n, c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch.nn.functional as F
from torch import Tensor, nn

from kdops import _checks, _norm, _op

__all__ = ["CWDLoss", "cwd_loss", "cwd_loss_ref"]

Maps = Union[Tensor, Sequence[Tensor]]

_fused = _op.FusedLoss(
    "cwd_loss",
    "float tau, int norm, float eps, float loss_weight",
    fields=10,
    units=lambda student: student.shape[0] * student.shape[1],
)


def cwd_loss_ref(
    student: Tensor, teacher: Tensor, tau: float, norm: str | None, eps: float, loss_weight: float
) -> Tensor:
    """The values per row, Tensor[N, C], of one level in eager PyTorch: the ground truth."""
    s = _norm.normalise(_norm.as_accumulated(student), norm, eps).flatten(2) / tau
    t = _norm.normalise(_norm.as_accumulated(teacher), norm, eps).flatten(2) / tau
    log_p_s, log_p_t = F.log_softmax(s, dim=2), F.log_softmax(t, dim=2)
    return (loss_weight * tau**2) * (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=2)


def cwd_loss(
    student: Maps,
    teacher: Maps,
    *,
    tau: float = 1.0,
    norm: str | None = None,
    eps: float | None = None,
    loss_weight: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Channel-wise distillation loss (Shu et al. 2021, arXiv:2011.13256).

    ``loss_weight * tau^2 / (N*C) * SUM_{n,c} KL(softmax(teacher/tau) || softmax(student/tau))``, the softmax over the
    H*W positions of a channel; levels of a pyramid are summed.

    Args:
        student: Tensor[N, C, H, W], or a list of pyramid levels. float16, bfloat16, float32 or float64; NCHW,
            channels_last or any strides. Gets a gradient, in its own dtype and memory format.
        teacher: like ``student``, each level of the same shape; its dtype and layout may differ. Gets no gradient and
            must not require one.
        tau: temperature of the softmax, > 0.
        norm: normalise each channel of both maps before the softmax: None, ``"batch"`` (biased variance, eps inside
            the root: BatchNorm without parameters, as in RTMDet's and DAMO-YOLO's distillation) or ``"pkd"``
            (unbiased deviation, eps added to it). Statistics are over N, H and W of this process.
        eps: overrides the eps of the normalisation (1e-5 for ``"batch"``, 1e-6 for ``"pkd"``).
        loss_weight: factor of the loss.
        reduction: ``"mean"`` (the published scaling above), ``"sum"`` (without 1/(N*C)) or ``"none"`` (a Tensor[N, C]
            of values per row; a list of them for a list of levels).
        backend: ``"auto"``, ``"fused"`` (raise where there is no kernel) or ``"reference"`` (eager PyTorch).

    Accuracy of the fused kernels: the relative error of the value is at most 5e-6 or, where student and teacher nearly
    agree and it vanishes, the absolute error is at most 1e-9 * tau^2 * loss_weight on a CPU (5e-9 on a GPU; 5e-8 there
    without a normalisation, which is the error of the eager code). The gradient's error is that of the eager code in
    fp32 and does not grow with the mean.

    Returns:
        Tensor: float32 (float64 if an input is float64); a scalar unless ``reduction="none"``.

    Raises:
        TypeError: student, teacher or a number is of the wrong type or dtype.
        ValueError: shapes, devices or lengths differ, a map is empty or not 4-D, the teacher requires grad, a
            normalisation has one value per channel, or an option is out of its range.
        RuntimeError: no kernel for the device and ``backend="fused"``; a second derivative of the fused loss.
    """
    students, teachers, single = _checks.levels("cwd_loss", student, teacher)
    _checks.choice("cwd_loss", "norm", norm, tuple(_norm.CODES))
    _checks.choice("cwd_loss", "reduction", reduction, tuple(_checks.REDUCTIONS))
    _checks.choice("cwd_loss", "backend", backend, _checks.BACKENDS)
    _checks.maps("cwd_loss", students, teachers, norm)
    tau = _checks.positive("cwd_loss", "tau", tau)
    loss_weight = _checks.number("cwd_loss", "loss_weight", loss_weight)
    eps = _checks.eps("cwd_loss", norm, eps)
    if _op.resolve("cwd_loss", backend, students[0].device) == "reference":
        rows = [cwd_loss_ref(s, t, tau, norm, eps, loss_weight) for s, t in zip(students, teachers)]
        return _op.reduce(rows, reduction, single)
    code = _checks.REDUCTIONS[reduction]
    loss = _fused(students, teachers, tau, _norm.CODES[norm], eps, loss_weight, code)
    return loss if reduction != "none" else _op.split(loss, [s.shape[:2] for s in students], single)


class CWDLoss(nn.Module):
    """Channel-wise distillation loss as a module. See `kdops.cwd_loss`."""

    def __init__(
        self,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        *,
        norm: str | None = None,
        eps: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.tau = _checks.positive("CWDLoss", "tau", tau)
        self.loss_weight = _checks.number("CWDLoss", "loss_weight", loss_weight)
        _checks.choice("CWDLoss", "norm", norm, tuple(_norm.CODES))
        _checks.choice("CWDLoss", "reduction", reduction, tuple(_checks.REDUCTIONS))
        _checks.choice("CWDLoss", "backend", backend, _checks.BACKENDS)
        self.norm, self.eps = norm, _checks.eps("CWDLoss", norm, eps)
        self.reduction, self.backend = reduction, backend

    def forward(self, preds_S: Maps, preds_T: Maps) -> Tensor | list[Tensor]:
        """The loss of the student's maps ``preds_S``, which get a gradient, and the teacher's ``preds_T``."""
        return cwd_loss(
            preds_S,
            preds_T,
            tau=self.tau,
            norm=self.norm,
            eps=self.eps,
            loss_weight=self.loss_weight,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, norm={self.norm!r}, loss_weight={self.loss_weight}, reduction={self.reduction!r}"
