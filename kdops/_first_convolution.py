"""align, mask and first convolution of MGD's generator, with their gradients, on the whole map or the kept positions.

A masked position contributes nothing to the first convolution and gets no gradient. On a CPU, in fp32, with a spatial
mask that drops at least `COMPACT_FROM` of the positions, align and the first convolution therefore run on the kept
positions only (`Compact`, csrc/cpu/masked_conv.cpp). Otherwise cuDNN or oneDNN convolves the whole map (`Dense`), in
channels_last on a CPU and for half precision.
"""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from torch import Tensor

from kdops import _op
from kdops._mask import Mask

COMPACT_FROM = 0.3
_TILE = 32  # masked_conv.cpp has tiles for widths that are multiples of it

_ops = torch.ops.kdops

_op.library.define("mgd_compact(Tensor map, Tensor keep) -> Tensor")
_op.library.define("mgd_expand_(Tensor(a!) map, Tensor rows, Tensor keep) -> ()")
_op.library.define("mgd_masked_conv(Tensor rows, Tensor keep, Tensor weight, Tensor bias) -> Tensor")
_op.library.define(
    "mgd_masked_conv_backward(Tensor grad, Tensor rows, Tensor keep, Tensor weight, bool want_rows, bool want_weight)"
    " -> (Tensor, Tensor)"
)
_op.library.define("mgd_bias_relu_(Tensor(a!) x, Tensor bias) -> ()")
_op.library.impl("mgd_bias_relu_", _op.triton_kernel("mgd_loss", "mgd_bias_relu_"), "CUDA")


class Parameters(NamedTuple):
    """Weights and biases of the three convolutions; those of align may both be None."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    align_weight: Tensor | None = None
    align_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Parameters:
        return Parameters(*(None if x is None else x.to(dtype) for x in self))


#: The inputs that get gradients, in the order of the autograd functions' arguments.
FIELDS = ("student", *Parameters._fields)

Gradients = dict[str, Union[Tensor, None]]


class Dense:
    """Over the whole map."""

    @staticmethod
    def hidden(student: Tensor, p: Parameters, mask: Mask) -> Tensor:
        """ReLU(conv3x3(mask * align(student)))."""
        masked = Dense.masked(student, p, mask)
        if not _op.on_gpu(student):
            return convolve(masked, p.weight1, p.bias1).relu_()
        out = convolve(masked, p.weight1, None)
        _ops.mgd_bias_relu_(out, p.bias1)
        return out

    @staticmethod
    def masked(student: Tensor, p: Parameters, mask: Mask) -> Tensor:
        if p.align_weight is None:
            return mask.apply(student, torch.empty_like(student, memory_format=_layout(student)))
        on_gpu = _op.on_gpu(student)
        aligned = convolve(_laid_out(student), p.align_weight, None if on_gpu else p.align_bias)
        return mask.apply(aligned, aligned, p.align_bias if on_gpu else None)

    @staticmethod
    def backward(student: Tensor, p: Parameters, mask: Mask, grad: Tensor, wanted: dict[str, bool]) -> Gradients:
        """grad: of the convolution's output, before the ReLU; its memory is freed here."""
        out: Gradients = {}
        masked = Dense.masked(student, p, mask) if wanted["weight1"] else grad
        out["weight1"], out["bias1"] = weight_gradients(grad, masked, p.weight1, wanted["weight1"], wanted["bias1"])
        if masked is not grad:
            free(masked)
        if not (wanted["student"] or wanted["align_weight"] or wanted["align_bias"]):
            return out
        inner = input_gradient(grad, p.weight1, like=grad)
        free(grad)
        if p.align_weight is None:
            fits = inner.stride() == student.stride()
            out["student"] = mask.apply(inner, inner if fits else torch.empty_like(student))
            return out
        mask.apply(inner, inner)
        return out | _align_gradients(inner, student, p, wanted)


class Compact:
    """On the kept positions, as rows: Tensor[K, channels]."""

    @staticmethod
    def hidden(student: Tensor, p: Parameters, mask: Mask) -> Tensor:
        keep = mask.positions()
        rows = Compact.aligned(_ops.mgd_compact(student, keep), p)
        return _ops.mgd_masked_conv(rows, keep, p.weight1, p.bias1)

    @staticmethod
    def aligned(rows: Tensor, p: Parameters) -> Tensor:
        if p.align_weight is None:
            return rows
        return torch.addmm(p.align_bias, rows, p.align_weight.flatten(1).t())

    @staticmethod
    def backward(student: Tensor, p: Parameters, mask: Mask, grad: Tensor, wanted: dict[str, bool]) -> Gradients:
        keep = mask.positions()
        rows = _ops.mgd_compact(student, keep)
        to_rows = wanted["student"] or wanted["align_weight"] or wanted["align_bias"]
        inner, weight1 = _ops.mgd_masked_conv_backward(
            grad, Compact.aligned(rows, p), keep, p.weight1, to_rows, wanted["weight1"]
        )
        out: Gradients = {"weight1": weight1, "bias1": _bias_gradient(grad) if wanted["bias1"] else None}
        free(grad)
        if p.align_weight is not None and to_rows:
            out["align_weight"] = (inner.t() @ rows).view_as(p.align_weight) if wanted["align_weight"] else None
            out["align_bias"] = inner.sum(0) if wanted["align_bias"] else None
            inner = inner @ p.align_weight.flatten(1) if wanted["student"] else None
        if wanted["student"]:
            out["student"] = torch.empty_like(student)
            _ops.mgd_expand_(out["student"], inner, keep)
        return out


def path(student: Tensor, p: Parameters, mask: Mask) -> type[Dense] | type[Compact]:
    """Chosen by device, dtype, widths and lambda alone."""
    suits = not _op.on_gpu(student) and student.dtype == torch.float32 and p.weight1.shape[0] % _TILE == 0
    return Compact if suits and not mask.on_channel and mask.masked_fraction >= COMPACT_FROM else Dense


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's convolution, padded so that height and width stay."""
    return torch.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def free(x: Tensor) -> None:
    """Frees the memory of a tensor that is still referenced: autograd keeps saved tensors until its node has run."""
    x.untyped_storage().resize_(0)


def input_gradient(grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``like`` has the input's shape and layout; its values are not read."""
    return _convolution_backward(grad, like, weight, (True, False, False))[0]


def weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a convolution's weight and bias; ``x`` is read for the weight only."""
    bias = _bias_gradient(grad) if want_bias else None
    return (_convolution_backward(grad, x, weight, (False, True, False))[1] if want_weight else None), bias


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum((0, 2, 3))


def _align_gradients(grad: Tensor, student: Tensor, p: Parameters, wanted: dict[str, bool]) -> Gradients:
    """grad: of align's output; its memory is freed here."""
    x = _laid_out(student)
    weight, bias = weight_gradients(grad, x, p.align_weight, wanted["align_weight"], wanted["align_bias"])
    out: Gradients = {"align_weight": weight, "align_bias": bias}
    if wanted["student"]:
        back = input_gradient(grad, p.align_weight, like=x)
        del x
        free(grad)
        out["student"] = back if back.stride() == student.stride() else torch.empty_like(student).copy_(back)
    return out


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple:
    padding = [weight.shape[-1] // 2] * 2
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted)


def _layout(student: Tensor) -> torch.memory_format:
    """The memory format of the generator's maps."""
    if _op.on_gpu(student) and student.dtype.itemsize >= 4:
        return torch.preserve_format
    return torch.channels_last


def _laid_out(student: Tensor) -> Tensor:
    """The student's map in that format, copied if it has another."""
    layout = _layout(student)
    return student if layout == torch.preserve_format else student.contiguous(memory_format=layout)
