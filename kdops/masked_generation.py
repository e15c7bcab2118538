"""The generator of masked generative distillation (MGD), Yang et al. 2022, arXiv:2205.01529.

Two convolutions reconstruct the teacher's map from the student's, of which a random part is zeroed:

    generated = conv3x3( ReLU( conv3x3( mask * align(student) ) ) )

mask: a fraction lambda of the positions (or of the channels) is 0, the rest 1, without rescaling. align: a 1x1
convolution with bias, only where the numbers of channels differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdops import _checks, _generation, _mask, _op
from kdops._first_convolution import Parameters

__all__ = ["MaskedGeneration", "masked_generation"]


def masked_generation(
    student: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    align_weight: Tensor | None = None,
    align_bias: Tensor | None = None,
    lambda_mgd: float = 0.65,
    mask_on_channel: bool = False,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Reconstructs a masked student map, the first half of MGD (Yang et al. 2022, arXiv:2205.01529).

    ``conv3x3(ReLU(conv3x3(mask * align(student))))``, both 3x3 convolutions with padding 1.

    On a CPU half-precision inputs are computed in fp32 and rounded once, except under torch.autocast to bf16, where the
    convolutions run in bf16.

    Args:
        student: Tensor[N, Cs, H, W] in float16, bfloat16, float32 or float64, any strides. Gets a gradient.
        weight1: Tensor[C, C, 3, 3] of the first convolution. All parameters get gradients and have the student's
            dtype, except under torch.autocast, which casts both.
        bias1: Tensor[C].
        weight2: Tensor[C, C, 3, 3] of the second convolution.
        bias2: Tensor[C].
        align_weight: Tensor[C, Cs, 1, 1] of the 1x1 convolution before the mask, or None if Cs = C.
        align_bias: Tensor[C], given with ``align_weight``.
        lambda_mgd: fraction of positions that are zeroed, in [0, 1].
        mask_on_channel: mask whole channels, (N, C, 1, 1), instead of positions, (N, 1, H, W).
        mask: an explicit mask of that shape instead of a random one, bool (True is kept) or 0 and 1 in a floating
            dtype. Gets no gradient.
        seed: an int64 tensor of one value on the student's device that determines the mask (see `kdops._mask`).
        generator: draws the seed, instead of the device's default generator. Activation checkpointing replays only
            default generators, so pass a ``seed`` or a ``mask`` there.
        backend: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        Tensor[N, C, H, W], the generated map.

    Raises:
        TypeError, ValueError: an argument is not as described above.
        RuntimeError: no kernel for the device, or a second derivative of the fused kernels.
    """
    name = "masked_generation"
    parameters = Parameters(weight1, bias1, weight2, bias2, align_weight, align_bias)
    _check_parameters(name, parameters)
    _checks.choice(name, "backend", backend, _checks.BACKENDS)
    lambda_mgd = _mask.check_lambda(name, lambda_mgd)
    _checks.single_map(name, "student", student)
    check_agreement(name, student, parameters)
    source = mask_source(name, student, parameters, lambda_mgd, mask_on_channel, mask, seed, generator)
    if _op.resolve(name, backend, student.device) == "reference":
        return _generation.compose(student, parameters, source.positions_ref())
    return _generation.generate(student, parameters, source)


def mask_source(
    name: str,
    student: Tensor,
    parameters: Parameters,
    lambda_mgd: float,
    on_channel: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    generator: torch.Generator | None,
) -> _mask.Mask:
    """The mask that the arguments describe."""
    shape = _mask.shape_of(student, on_channel, parameters.weight1.shape[1])
    if mask is not None:
        _mask.check_mask(name, mask, shape, student.device)
        keep = mask if mask.dtype == torch.bool else mask != 0
        return _mask.Mask(keep, None, shape, on_channel, lambda_mgd)
    if seed is None:
        seed = _mask.draw_seed(student.device, generator)
    else:
        _mask.check_seed(name, seed, student.device)
    return _mask.Mask(None, seed, shape, on_channel, lambda_mgd)


def check_agreement(name: str, student: Tensor, parameters: Parameters) -> None:
    """Raise if width, dtype or device of the map do not fit the parameters."""
    p = parameters
    width = (p.weight1 if p.align_weight is None else p.align_weight).shape[1]
    if student.shape[1] != width:
        raise ValueError(f"{name}: student must have the parameters' {width} channels, got {student.shape[1]}")
    if p.weight1.device != student.device:
        raise ValueError(
            f"{name}: student and parameters must be on the same device, got {student.device} and {p.weight1.device}"
        )
    autocast = torch.is_autocast_enabled(student.device.type) and student.dtype != torch.float64
    if p.weight1.dtype != student.dtype and not autocast:
        raise TypeError(
            f"{name}: student and parameters must have the same dtype outside torch.autocast, "
            f"got {student.dtype} and {p.weight1.dtype}"
        )


class MaskedGeneration(nn.Module):
    """align, mask and generator as a module: MGD without the loss. See `kdops.masked_generation`.

    Parameters: ``align.weight``, ``align.bias`` (only where the widths differ), ``generation.0.weight``,
    ``generation.0.bias``, ``generation.2.weight``, ``generation.2.bias``, as in the published checkpoints. The
    convolutions hold the parameters; forward hooks on them do not run.
    """

    align: nn.Conv2d | None

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        lambda_mgd: float = 0.65,
        mask_on_channel: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.student_channels = _check_width(name, "student_channels", student_channels)
        self.teacher_channels = _check_width(name, "teacher_channels", teacher_channels)
        self.lambda_mgd = _mask.check_lambda(name, lambda_mgd)
        self.mask_on_channel = bool(mask_on_channel)
        _checks.choice(name, "backend", backend, _checks.BACKENDS)
        self.backend = backend
        self.align = nn.Conv2d(student_channels, teacher_channels, 1) if student_channels != teacher_channels else None
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def parameters_of_chain(self) -> Parameters:
        first, _, second = self.generation
        align = (None, None) if self.align is None else (self.align.weight, self.align.bias)
        return Parameters(first.weight, first.bias, second.weight, second.bias, *align)

    def check_student(self, student: Any, name: str) -> None:
        """Raise if it is not a map of ``student_channels`` channels."""
        _checks.single_map(type(self).__name__, name, student)
        if student.shape[1] != self.student_channels:
            raise ValueError(
                f"{type(self).__name__}: {name} must have student_channels={self.student_channels} channels, "
                f"got {student.shape[1]} in shape {tuple(student.shape)}"
            )

    def forward(
        self, student: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The generated map, Tensor[N, teacher_channels, H, W], of one level. See `kdops.masked_generation`."""
        self.check_student(student, "student")
        p = self.parameters_of_chain()
        return masked_generation(
            student,
            p.weight1,
            p.bias1,
            p.weight2,
            p.bias2,
            align_weight=p.align_weight,
            align_bias=p.align_bias,
            lambda_mgd=self.lambda_mgd,
            mask_on_channel=self.mask_on_channel,
            mask=mask,
            generator=generator,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"lambda_mgd={self.lambda_mgd}, mask_on_channel={self.mask_on_channel}"


def _check_width(name: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
    return value


def _check_parameters(name: str, p: Parameters) -> None:
    for key, x in p._asdict().items():
        if not (isinstance(x, Tensor) or (x is None and key.startswith("align"))):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(x).__name__}")
    if (p.align_weight is None) != (p.align_bias is None):
        raise ValueError(f"{name}: align_weight and align_bias must be given together")
    width = p.weight1.shape[0]
    expected = dict.fromkeys(("weight1", "weight2"), (width, width, 3, 3)) | dict.fromkeys(("bias1", "bias2"), (width,))
    if p.align_weight is not None:
        inputs = p.align_weight.shape[1] if p.align_weight.dim() == 4 else 1
        expected |= {"align_weight": (width, inputs, 1, 1), "align_bias": (width,)}
    for key, shape in expected.items():
        if tuple(getattr(p, key).shape) != shape:
            raise ValueError(f"{name}: {key} must have shape {shape}, got {tuple(getattr(p, key).shape)}")
