"""kdops losses, and MGD's connector, under MMRazor's argument names, registered in MMRazor's MODELS registry."""
from __future__ import annotations

from mmrazor.models.architectures.connectors.base_connector import BaseConnector
from mmrazor.registry import MODELS
from torch import Tensor, nn

from kdops import CWDLoss, MaskedGeneration, PKDLoss, masked_generation, mgd_loss


@MODELS.register_module()
class KDOpsChannelWiseDivergence(CWDLoss):
    """MMRazor's `ChannelWiseDivergence` on kdops. See `kdops.cwd_loss` for the formula and the shapes.

    Takes any strides (MMRazor's takes contiguous maps only), accumulates in float32 and returns a float32 scalar.
    Only ``preds_S`` gets a gradient: a teacher map that requires grad raises.

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
    unequal length raise (MMRazor's truncates to the shorter).

    Args:
        loss_weight: factor of the loss (published: 6 for two-stage detectors, 10 for one-stage).
        resize_stu: where sizes differ, resize the student's map to the teacher's (True) or the other way (False).
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True, backend: str = "auto") -> None:
        super().__init__(loss_weight=loss_weight, resize="student" if resize_stu else "teacher", backend=backend)


@MODELS.register_module()
class KDOpsMGDLoss(nn.Module):
    """MMRazor's `MGDLoss` on kdops, the half of MGD after the generator. See `kdops.mgd_loss`.

    Args:
        alpha_mgd: factor of the loss, a sum over the map divided by the batch size.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(self, alpha_mgd: float = 2e-5, backend: str = "auto") -> None:
        super().__init__()
        self.alpha_mgd, self.backend = alpha_mgd, backend

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """The loss of the generated map ``preds_S``, which gets a gradient, and the teacher's ``preds_T``; a scalar."""
        return mgd_loss(preds_S, preds_T, alpha_mgd=self.alpha_mgd, backend=self.backend)


@MODELS.register_module()
class KDOpsMGDConnector(MaskedGeneration, BaseConnector):
    """MMRazor's `MGDConnector` on kdops: align, mask and generator of MGD. See `kdops.masked_generation`.

    The parameters have MMRazor's names, so its checkpoints load. The mask is drawn on the map's device from another
    random stream than MMRazor's, which draws it on the CPU; half-precision maps stay half under autocast.

    Args:
        student_channels: width of the student's map.
        teacher_channels: width of the teacher's map and of the generator; where it differs, a 1x1 convolution aligns.
        lambda_mgd: fraction of positions that are zeroed, in [0, 1].
        mask_on_channel: mask whole channels instead of positions.
        init_cfg: mmengine's initialisation config.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        lambda_mgd: float = 0.65,
        mask_on_channel: bool = False,
        init_cfg: dict | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            student_channels, teacher_channels,
            lambda_mgd=lambda_mgd, mask_on_channel=mask_on_channel, backend=backend)
        self.init_cfg = init_cfg

    def forward_train(self, feature: Tensor) -> Tensor:
        """The generated map, Tensor[N, teacher_channels, H, W], from the student's ``feature`` (gets a gradient)."""
        self.check_student(feature, "feature")
        parameters = self.parameters_of_chain()
        return masked_generation(
            feature, parameters.weight1, parameters.bias1, parameters.weight2, parameters.bias2,
            align_weight=parameters.align_weight, align_bias=parameters.align_bias,
            lambda_mgd=self.lambda_mgd, mask_on_channel=self.mask_on_channel, backend=self.backend)
