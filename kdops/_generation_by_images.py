"""MGD's loss on a CPU: a few images at a time with their gradients, so that only one chunk's maps are alive.

The forward computes the gradients for grad_output 1 while a chunk's maps are in memory, and the backward multiplies
them: the gradients are saved, and no map of the chain. Everything is computed and summed in fp32 (fp64) and rounded
once at the end. Only a bf16 student's gradient is saved rounded: if grad_output is not a power of two, so that
multiplying would round it again, the backward recomputes everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdops import _op
from kdops._first_convolution import FIELDS, Parameters, convolve, path
from kdops._generation import chain_backward, refusing_double_backward
from kdops._mask import Mask

# A chunk has at least this many positions per thread: with fewer, oneDNN's convolutions slow down.
_POSITIONS_PER_THREAD = 800


def generation_loss(student: Tensor, teacher: Tensor, parameters: Parameters, mask: Mask, alpha: float) -> Tensor:
    """alpha / N * SUM (generated - teacher)^2 of checked inputs, in one node."""
    inputs = (student, *parameters)
    _op.refuse_forward_mode("MGDLoss", (*inputs, teacher))
    wanted = {name: torch.is_grad_enabled() and x is not None and x.requires_grad for name, x in zip(FIELDS, inputs)}
    anchor = (_op.anchor_of(*inputs),) if any(wanted.values()) else ()
    return _Loss.apply(mask, alpha, wanted, anchor, teacher, *inputs)


class _Loss(torch.autograd.Function):
    """generation_loss() as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask,
        alpha: float,
        wanted: dict[str, bool],
        anchor: tuple[Tensor, ...],
        teacher: Tensor,
        student: Tensor,
        *parameters: Any,
    ) -> Tensor:
        keep = mask.positions()
        ctx.mask, ctx.wanted, ctx.anchor = mask.without_tensors(), wanted, anchor
        ctx.slope = 2 * alpha / student.shape[0]
        ctx.dtypes = [None if x is None else x.dtype for x in (student, *parameters)]
        sums = _step(student, teacher, Parameters(*parameters), mask, keep, wanted, ctx.slope)
        inputs = (teacher, keep, student, *parameters) if student.dtype == torch.bfloat16 else ()
        ctx.save_for_backward(*sums.in_order(), *inputs)
        return student.new_tensor(sums.square * alpha / student.shape[0], dtype=sums.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        saved = ctx.saved_tensors
        grads, inputs = saved[: len(FIELDS)], saved[len(FIELDS) :]
        if inputs and not _op.is_power_of_two(grad_output):
            teacher, keep, student, *parameters = inputs
            slope = ctx.slope * grad_output.item()
            with torch.no_grad():
                sums = _step(student, teacher, Parameters(*parameters), ctx.mask, keep, ctx.wanted, slope)
            grads = sums.in_order()
        else:
            scaled = iter(_op.scaled([g for g in grads if g is not None], grad_output.detach()))
            grads = [None if g is None else next(scaled) for g in grads]
        grads = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return (None,) * 5 + tuple(refusing_double_backward("MGDLoss", grads, (*ctx.anchor, grad_output)))


def _step(
    student: Tensor, teacher: Tensor, p: Parameters, mask: Mask, keep: Tensor, wanted: dict[str, bool], slope: float
) -> _Sums:
    """SUM (generated - teacher)^2, and the gradients of slope / 2 times that."""
    sums = _Sums(student)
    p = p.to(sums.dtype)
    with torch.autocast("cpu", enabled=False):
        for images in _chunks(student, p):
            part = mask._replace(keep=keep[images], seed=None, shape=tuple(keep[images].shape))
            sums.add(images, *_chunk(student[images].to(sums.dtype), teacher[images], p, part, wanted, slope))
    return sums


def _chunk(
    student: Tensor, teacher: Tensor, p: Parameters, mask: Mask, wanted: dict[str, bool], slope: float
) -> tuple[float, list[Tensor | None]]:
    """The same for the images of one chunk."""
    hidden = path(student, p, mask).hidden(student, p, mask)
    difference = convolve(hidden, p.weight2, p.bias2)
    square = torch.ops.kdops.mgd_difference_(difference, None, teacher, slope).item()
    if not any(wanted.values()):
        return square, [None] * len(FIELDS)
    grads = chain_backward(student, p, mask, hidden, difference, wanted, last=True, free_grad=True)
    return square, grads


class _Sums:
    """The sums over the chunks; the student's gradient is concatenated."""

    def __init__(self, student: Tensor) -> None:
        self.dtype = _op.accumulation_dtype([student], [])
        self.square = 0.0
        self._student = student
        self._grads: dict[str, Tensor] = {}

    def add(self, images: slice, square: float, grads: list[Tensor | None]) -> None:
        self.square += square
        for name, grad in zip(FIELDS, grads):
            if grad is None:
                continue
            if name == "student":
                self._put(images, grad)
            elif name in self._grads:
                self._grads[name] += grad
            else:
                self._grads[name] = grad

    def in_order(self) -> list[Tensor | None]:
        return [self._grads.get(name) for name in FIELDS]

    def _put(self, images: slice, grad: Tensor) -> None:
        stored = torch.bfloat16 if self._student.dtype == torch.bfloat16 else self.dtype
        if grad.shape == self._student.shape:
            self._grads["student"] = grad.to(stored)
            return
        if "student" not in self._grads:
            self._grads["student"] = torch.empty_like(self._student, dtype=stored)
        self._grads["student"][images] = grad


def _chunks(student: Tensor, p: Parameters) -> Iterator[slice]:
    """Slices of the batch; a chunk's map is at least as large as the weights, whose gradients every chunk allocates."""
    n, _, h, w = student.shape
    weights = p.weight1.numel() + p.weight2.numel()
    positions = max(_POSITIONS_PER_THREAD * torch.get_num_threads(), weights // p.weight1.shape[0])
    images = math.ceil(positions / (h * w))
    return (slice(i, i + images) for i in range(0, n, images))
