"""Masked generative distillation (MGD), Yang et al. 2022, arXiv:2205.01529.

A generator reconstructs the teacher's map from the student's masked one (see `kdops.masked_generation`); the loss is
its squared error:

    loss = alpha * SUM (generated - teacher)^2 / N

The sum runs over channels and positions and is divided by the batch size alone. Variants that take the mean
instead are another function, smaller by a factor of C*H*W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdops import _checks, _generation, _generation_by_images, _norm, _op
from kdops.masked_generation import MaskedGeneration, check_agreement, mask_source

__all__ = ["MGDLoss", "mgd_loss", "mgd_loss_ref"]

# No statistics: the gradient needs only student and teacher. The schema's last argument, the reduction, is always the
# published one.
_fused = _op.FusedLoss("mgd_loss", "float alpha_mgd", fields=0, units=lambda generated: 0)


def mgd_loss_ref(generated: Tensor, teacher: Tensor, alpha_mgd: float) -> Tensor:
    """The loss in eager PyTorch: the ground truth."""
    difference = _norm.as_accumulated(generated) - _norm.as_accumulated(teacher)
    return (alpha_mgd / generated.shape[0]) * difference.square().sum()


def mgd_loss(generated: Tensor, teacher: Tensor, *, alpha_mgd: float = 2e-5, backend: str = "auto") -> Tensor:
    """The squared error of MGD, its second half (Yang et al. 2022, arXiv:2205.01529).

    ``alpha_mgd * SUM (generated - teacher)^2 / N``.

    Args:
        generated: Tensor[N, C, H, W], the generator's output (see `kdops.masked_generation`). float16, bfloat16,
            float32 or float64; any strides. Gets a gradient, in its own dtype.
        teacher: Tensor[N, C, H, W]; its dtype and layout may differ. Gets no gradient and must not require one.
        alpha_mgd: factor of the loss; the published values suit a sum over the map, not a mean.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        A scalar in fp32 (fp64 where a map is fp64).

    Raises:
        TypeError, ValueError: an argument is not as described above.
        RuntimeError: no kernel for the device, or a second derivative of the fused loss.
    """
    name = "mgd_loss"
    _checks.choice(name, "backend", backend, _checks.BACKENDS)
    _checks.single_map(name, "generated", generated)
    _checks.maps(name, [generated], [teacher], None)
    alpha_mgd = _checks.number(name, "alpha_mgd", alpha_mgd)
    if _op.resolve(name, backend, generated.device) == "reference":
        return mgd_loss_ref(generated, teacher, alpha_mgd)
    return _fused([generated], [teacher], alpha_mgd, 0)


class MGDLoss(MaskedGeneration):
    """Masked generative distillation of one level: align, mask, generator and squared error, with its parameters.

    ``alpha_mgd * SUM (conv3x3(ReLU(conv3x3(mask * align(preds_S)))) - preds_T)^2 / N``. A pyramid needs a module per
    level, as each level has its own generator: ``nn.ModuleList(MGDLoss(256, 256) for _ in range(5))``. The
    parameters (`MaskedGeneration` names them) are trained with the student: pass them to the optimizer.

    Published settings (lambda_mgd, alpha_mgd): one-stage detectors 0.65, 2e-5; two-stage 0.45, 5e-7; segmentation
    0.75, 2e-5; classification, with ``mask_on_channel``, 0.15, 7e-5.

    On a CPU the forward computes the gradients too, a few images at a time, so that no map of the chain is saved.
    Half-precision inputs are computed in fp32 there and rounded once, except under torch.autocast to bf16, where the
    convolutions run in bf16.

    Args:
        student_channels: width of ``preds_S``.
        teacher_channels: width of ``preds_T`` and of the generator; where it differs, a 1x1 convolution aligns.
        alpha_mgd: factor of the loss.
        lambda_mgd: fraction of positions that are zeroed, in [0, 1].
        mask_on_channel: mask whole channels instead of positions.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        alpha_mgd: float = 2e-5,
        lambda_mgd: float = 0.65,
        mask_on_channel: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            student_channels,
            teacher_channels,
            lambda_mgd=lambda_mgd,
            mask_on_channel=mask_on_channel,
            backend=backend,
        )
        self.alpha_mgd = _checks.number("MGDLoss", "alpha_mgd", alpha_mgd)

    def forward(
        self,
        preds_S: Tensor,
        preds_T: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a scalar in fp32 (fp64 where a map is fp64).

        Args:
            preds_S: Tensor[N, student_channels, H, W]. Gets a gradient.
            preds_T: Tensor[N, teacher_channels, H, W]. Gets no gradient and must not require one.
            mask: as in `kdops.masked_generation`.
            generator: as in `kdops.masked_generation`.
        """
        name = "MGDLoss"
        self.check_student(preds_S, "preds_S")
        self._check_teacher(preds_S, preds_T)
        p = self.parameters_of_chain()
        check_agreement(name, preds_S, p)
        source = mask_source(name, preds_S, p, self.lambda_mgd, self.mask_on_channel, mask, None, generator)
        if _op.resolve(name, self.backend, preds_S.device) == "reference":
            generated = _generation.compose(preds_S, p, source.positions_ref())
            return mgd_loss_ref(generated, preds_T, self.alpha_mgd)
        # Inductor fuses around the convolutions itself; an fp64 teacher beside a narrower student needs sums in fp64.
        if torch.compiler.is_compiling() or (preds_T.dtype == torch.float64 != preds_S.dtype):
            return _fused([_generation.generate_unrounded(preds_S, p, source)], [preds_T], self.alpha_mgd, 0)
        half = _generation.compute_dtype(preds_S).itemsize == 2
        kernels = _generation if _op.on_gpu(preds_S) or half else _generation_by_images
        return kernels.generation_loss(preds_S, preds_T, p, source, self.alpha_mgd)

    def _check_teacher(self, preds_S: Tensor, preds_T: Any) -> None:
        _checks.single_map("MGDLoss", "preds_T", preds_T)
        if preds_T.shape[1] != self.teacher_channels:
            raise ValueError(
                f"MGDLoss: preds_T must have teacher_channels={self.teacher_channels} channels, "
                f"got {preds_T.shape[1]} in shape {tuple(preds_T.shape)}"
            )
        n, _, h, w = preds_S.shape
        _checks.maps("MGDLoss", [preds_S.new_empty(1).expand(n, self.teacher_channels, h, w)], [preds_T], None)

    def extra_repr(self) -> str:
        return f"alpha_mgd={self.alpha_mgd}, {super().extra_repr()}"
