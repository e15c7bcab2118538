"""The Distiller of a phase: the student's FPN outputs against the teacher's."""

from __future__ import annotations

import torch
from torch import nn

import kdops
from kdops import CosineWeight, Distiller, StopDistillation, Tap, TeacherOptions

from .models import FPN_LEVELS
from .plan import Phase
from .settings import AMP_DTYPES, Settings

# Published for one-stage detectors; MGD's is its alpha.
DEFAULT_WEIGHTS = {"cwd": 1.0, "pkd": 10.0, "mgd": 2e-5}


def make_taps(settings: Settings) -> list[Tap]:
    """A tap per FPN level. CWD and PKD take all levels in one call; MGD has a generator per level."""
    weight = DEFAULT_WEIGHTS[settings.loss] if settings.loss_weight is None else settings.loss_weight
    widths, backend = (settings.student_channels, settings.teacher_channels), settings.backend
    if settings.loss == "mgd":  # aligns by itself
        return [Tap(level, loss=kdops.MGDLoss(*widths, alpha_mgd=weight, backend=backend)) for level in FPN_LEVELS]
    if settings.loss == "cwd":
        loss = kdops.CWDLoss(tau=settings.tau, norm="batch", loss_weight=weight, backend=backend)
    else:
        loss = kdops.PKDLoss(loss_weight=weight, backend=backend)
    # DAMO-YOLO's 1x1 convolution has a bias, RTMDet's has none.
    bias = settings.recipe == "damo"
    return [Tap(level, loss=loss, align=nn.Conv2d(*widths, 1, bias=bias)) for level in FPN_LEVELS]


def align_layers(taps: list[Tap]) -> list[nn.Module]:
    """The layers that bring the student's maps to the teacher's width, as they are after training."""
    layers = [tap.loss.align if tap.align is None else tap.align for tap in taps]
    return [nn.Identity() if layer is None else layer for layer in layers]


def teacher_options(settings: Settings) -> TeacherOptions | None:
    """How the teacher is prepared, None where it runs as it is."""
    precision = settings.prepare_teacher
    if precision == "off":
        return None
    if precision == "auto":
        precision = "bf16" if _computes_in_bfloat16(settings.torch_device()) else "fp32"
    return TeacherOptions(dtype=AMP_DTYPES.get(precision), compile=settings.compile_teacher)


def make_distiller(
    student: nn.Module,
    teacher: nn.Module,
    taps: list[Tap],
    phase: Phase,
    steps: int,
    options: TeacherOptions | None = None,
) -> Distiller:
    """``steps``: optimizer steps of the whole phase."""
    return Distiller(
        student,
        teacher,
        taps,
        weight=CosineWeight(start=1.0, end=0.1, steps=steps) if phase.weight == "cosine" else 1.0,
        stop=None if phase.stop_epoch is None else StopDistillation(epoch=phase.stop_epoch),
        teacher_options=options,
    )


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster there than float32: not on a processor that only emulates it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # PyTorch 2.4 does not know, and tells nothing.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
