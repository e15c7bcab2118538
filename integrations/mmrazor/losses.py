"""kdops losses under MMRazor's argument names, registered in MMRazor's MODELS registry."""
from __future__ import annotations

from kdops import CWDLoss, PKDLoss
from mmrazor.registry import MODELS


@MODELS.register_module()
class KDOpsChannelWiseDivergence(CWDLoss):
    """MMRazor's `ChannelWiseDivergence` on kdops. See `kdops.cwd_loss` for the formula and the shapes.

    Takes any strides (MMRazor's takes contiguous maps only), accumulates in float32 and returns a float32 scalar.
    The gradient goes to ``preds_S`` alone: a teacher map that requires one is refused.

    Args:
        tau: temperature of the softmax, > 0.
        loss_weight: factor of the loss.
        norm: None, ``"batch"`` or ``"pkd"``: normalise both maps per channel first. ``"batch"`` is what a
            ``BN(affine=False, track_running_stats=False)`` on either side computes.
        eps: overrides the eps of the normalisation.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(
        self,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        norm: str | None = None,
        eps: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(tau=tau, loss_weight=loss_weight, norm=norm, eps=eps, backend=backend)


@MODELS.register_module()
class KDOpsPKDLoss(PKDLoss):
    """MMRazor's `PKDLoss` on kdops. See `kdops.pkd_loss` for the formula and the shapes.

    Height and width are both compared before a map is resized (MMRazor's compares heights), and lists of levels of
    unequal length are refused (MMRazor's takes the shorter).

    Args:
        loss_weight: factor of the loss (published: 6 for two-stage detectors, 10 for one-stage).
        resize_stu: where sizes differ, resize the student's map to the teacher's (True) or the other way (False).
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True, backend: str = "auto") -> None:
        super().__init__(loss_weight=loss_weight, resize="student" if resize_stu else "teacher", backend=backend)
