"""The fused path of MGD's generator: one autograd node, convolutions by cuDNN or oneDNN, few maps alive.

`generate` computes the generated map, `generation_loss` its squared error over the whole batch, on a GPU and for bf16
under autocast (for everything else on a CPU see `kdops._generation_by_images`). Saved for backward are the student's
map (kept alive by its producer anyway), the mask's seed, the ReLU's output and, with the loss, the difference to the
teacher, which overwrites the generated map. The backward computes the gradients of the second convolution one by one:
after its weight gradient, the ReLU's output shrinks to one bit per element, and the difference is freed before the next
map is allocated. So about two maps are alive at the peak, where the eager chain holds four.

The gradient is linear in the difference, so its factor, 2 * alpha / N * grad_output, is multiplied into the results;
only fp16 multiplies it into the difference first, as its weight gradients would overflow. In half precision the
mantissa of 2 * alpha / N is already in the stored difference: what remains is a power of two, like a GradScaler's
factor, and multiplying by it does not round again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdops import _op
from kdops._first_convolution import (
    FIELDS,
    Parameters,
    convolve,
    free,
    input_gradient,
    path,
    weight_gradients,
)
from kdops._mask import Mask

_ops = torch.ops.kdops

_op.library.define("mgd_relu_bits(Tensor x) -> Tensor")
_op.library.define("mgd_relu_backward_(Tensor(a!) grad, Tensor bits) -> ()")
_op.library.define("mgd_difference_(Tensor(a!) generated, Tensor? bias, Tensor teacher, float scale) -> Tensor")
for _name in ("mgd_relu_bits", "mgd_relu_backward_", "mgd_difference_"):
    _op.library.impl(_name, _op.triton_kernel("mgd_loss", _name), "CUDA")


def generate(student: Tensor, parameters: Parameters, mask: Mask) -> Tensor:
    """The generated map of checked inputs, in the dtype that the eager chain would return."""
    return generate_unrounded(student, parameters, mask).to(_autocast_dtype(student) or student.dtype)


def generate_unrounded(student: Tensor, parameters: Parameters, mask: Mask) -> Tensor:
    """The same, in the dtype of the convolutions."""
    if torch.compiler.is_compiling():
        return compose(student, parameters, mask.positions())
    _op.refuse_forward_mode("masked_generation", (student, *parameters))
    dtype = compute_dtype(student)
    return _Generate.apply(mask, student.to(dtype), *mask.tensors, *parameters.to(dtype))


def generation_loss(student: Tensor, teacher: Tensor, parameters: Parameters, mask: Mask, alpha: float) -> Tensor:
    """alpha / N * SUM (generated - teacher)^2 of checked inputs, in one node."""
    _op.refuse_forward_mode("MGDLoss", (student, teacher, *parameters))
    dtype = compute_dtype(student)
    return _Loss.apply(mask, alpha, teacher, student.to(dtype), *mask.tensors, *parameters.to(dtype))


def compose(student: Tensor, parameters: Parameters, keep: Tensor) -> Tensor:
    """The chain in eager PyTorch, differentiated by autograd; ``keep`` is a bool mask."""
    p = parameters
    aligned = student if p.align_weight is None else F.conv2d(student, p.align_weight, p.align_bias)
    hidden = F.relu(F.conv2d(aligned.masked_fill(~keep, 0), p.weight1, p.bias1, padding=1))
    return F.conv2d(hidden, p.weight2, p.bias2, padding=1)


def compute_dtype(student: Tensor) -> torch.dtype:
    """The dtype of the convolutions: on a GPU autocast's, else the student's.

    A CPU widens half precision to fp32, so that only inputs and results are rounded; bf16 is used only if autocast asks
    for it.
    """
    autocast = _autocast_dtype(student)
    if _op.on_gpu(student) or student.dtype == torch.float64 or autocast == torch.bfloat16:
        return autocast or student.dtype
    return torch.float32


class _Generate(torch.autograd.Function):
    """generate() as one node."""

    @staticmethod
    def forward(
        ctx: Any, mask: Mask, student: Tensor, keep: Tensor | None, seed: Tensor | None, *parameters: Any
    ) -> Tensor:
        p = Parameters(*parameters)
        ctx.mask = mask.without_tensors()
        with torch.autocast(student.device.type, enabled=False):  # the dtype has been chosen
            hidden = path(student, p, mask).hidden(student, p, mask)
            generated = convolve(hidden, p.weight2, p.bias2)
        ctx.save_for_backward(student, keep, seed, hidden, *parameters)
        return generated

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        student, keep, seed, hidden, *parameters = ctx.saved_tensors
        wanted = _wanted(ctx.needs_input_grad[1], ctx.needs_input_grad[4:])
        mask = ctx.mask.with_tensors(keep, seed)
        last = not _op.keeps_graph()
        grads = chain_backward(student, Parameters(*parameters), mask, hidden, grad_output, wanted, last)
        grads = refusing_double_backward("masked_generation", grads, (student, *parameters, grad_output))
        return (None, grads[0], None, None, *grads[1:])


class _Loss(torch.autograd.Function):
    """generation_loss() as one node, so that the difference can overwrite the generated map."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask,
        alpha: float,
        teacher: Tensor,
        student: Tensor,
        keep: Tensor | None,
        seed: Tensor | None,
        *parameters: Any,
    ) -> Tensor:
        p = Parameters(*parameters)
        hidden = path(student, p, mask).hidden(student, p, mask)
        on_gpu = _op.on_gpu(student)  # where cuDNN would add the bias in a pass of its own
        difference = convolve(hidden, p.weight2, None if on_gpu else p.bias2)
        slope = 2 * alpha / student.shape[0]
        scale = (math.frexp(slope)[0] or 1.0) if difference.dtype.itemsize == 2 else 1.0
        loss = _ops.mgd_difference_(difference, p.bias2 if on_gpu else None, teacher, scale)
        ctx.mask, ctx.slope = mask.without_tensors(), slope / scale
        ctx.save_for_backward(student, keep, seed, hidden, difference, *parameters)
        return loss * (alpha / student.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        student, keep, seed, hidden, difference, *parameters = ctx.saved_tensors
        wanted = _wanted(ctx.needs_input_grad[3], ctx.needs_input_grad[6:])
        mask, factor, last = ctx.mask.with_tensors(keep, seed), grad_output.detach() * ctx.slope, not _op.keeps_graph()
        if difference.dtype == torch.float16:
            (difference,), factor = _op.scaled([difference], factor), None
        grads = chain_backward(
            student, Parameters(*parameters), mask, hidden, difference, wanted, last, free_grad=last
        )
        if factor is not None:
            _ops.scale_gradients_([x for x in grads if x is not None], factor)
        grads = refusing_double_backward("MGDLoss", grads, (student, *parameters, grad_output))
        return (None, None, None, grads[0], None, None, *grads[1:])


def chain_backward(
    student: Tensor,
    p: Parameters,
    mask: Mask,
    hidden: Tensor,
    grad: Tensor,
    wanted: dict[str, bool],
    last: bool,
    free_grad: bool = False,
) -> list[Tensor | None]:
    """The gradients of the `FIELDS`. last: hidden is not needed afterwards and is freed on the way."""
    # No graph of these operations, and no casts where the backward runs under autocast.
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        layout = (
            torch.channels_last if hidden.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        grad = grad.contiguous(memory_format=layout)
        weight2, bias2 = weight_gradients(grad, hidden, p.weight2, wanted["weight2"], wanted["bias2"])
        results: dict[str, Tensor | None] = {"weight2": weight2, "bias2": bias2}
        if any(wanted[name] for name in FIELDS if name not in results):
            bits = _ops.mgd_relu_bits(hidden)
            if last:
                free(hidden)
            inner = input_gradient(grad, p.weight2, like=grad).contiguous(memory_format=layout)  # the order of the bits
            if free_grad:
                free(grad)
            _ops.mgd_relu_backward_(inner, bits)
            results.update(path(student, p, mask).backward(student, p, mask, inner, wanted))
    return [results.get(name) for name in FIELDS]


def _wanted(student: bool, parameters: Sequence[bool]) -> dict[str, bool]:
    return dict(zip(FIELDS, (student, *parameters)))


def refusing_double_backward(
    name: str, grads: list[Tensor | None], anchors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients; with create_graph, differentiating them raises."""
    if not torch.is_grad_enabled():
        return grads
    given = [x for x in grads if x is not None]
    guarded = iter(_op.refuse_double_backward(name, given, [x for x in anchors if x is not None]))
    return [None if x is None else next(guarded) for x in grads]


def _autocast_dtype(student: Tensor) -> torch.dtype | None:
    """The dtype to which torch.autocast casts a convolution's inputs, or None."""
    kind = student.device.type
    if not torch.is_autocast_enabled(kind) or student.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
