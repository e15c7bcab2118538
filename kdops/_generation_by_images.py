"""MGD's loss on a CPU: a few images at a time, each with its gradients, so that one chunk's maps are alive.

The gradients are linear in grad_output. The forward therefore computes them while a chunk's maps are at hand, and the
backward multiplies: between the two live the gradients themselves and no map of the chain. The parameters' gradients
are summed over the chunks, and all are kept, in fp32 (fp64); half-precision results are rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdops import _op
from kdops._first_convolution import FIELDS, Parameters, convolve, path
from kdops._generation import chain_backward, compute_dtype, refusing_double_backward
from kdops._mask import Mask

# A chunk has so many positions for every thread at least: with fewer the library's convolutions lose their pace.
_POSITIONS_PER_THREAD = 800


def generation_loss(student: Tensor, teacher: Tensor, parameters: Parameters, mask: Mask, alpha: float) -> Tensor:
    """alpha / N * SUM (generated - teacher)^2 of checked inputs, in one node."""
    inputs = (student, *parameters)
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
        dtype = compute_dtype(student)
        p, keep = Parameters(*parameters).to(dtype), mask.positions()
        sums = _Sums(student)
        with torch.autocast("cpu", enabled=False):
            for images in _chunks(student, p):
                part = mask._replace(keep=keep[images], seed=None, shape=tuple(keep[images].shape))
                sums.add(images, *_chunk(student[images].to(dtype), teacher[images], p, part, wanted))
        ctx.slope, ctx.anchor = 2 * alpha / student.shape[0], anchor
        ctx.dtypes = [None if x is None else x.dtype for x in (student, *parameters)]
        ctx.save_for_backward(*(sums.grads.get(name) for name in FIELDS))
        return student.new_tensor(sums.square * alpha / student.shape[0], dtype=sums.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        saved = ctx.saved_tensors
        scaled = iter(_op.scaled([g for g in saved if g is not None], grad_output.detach() * ctx.slope))
        grads = [None if g is None else next(scaled).to(dtype) for g, dtype in zip(saved, ctx.dtypes)]
        return (None,) * 5 + tuple(refusing_double_backward("MGDLoss", grads, (*ctx.anchor, grad_output)))


def _chunk(
    student: Tensor, teacher: Tensor, p: Parameters, mask: Mask, wanted: dict[str, bool]
) -> tuple[float, list[Tensor | None]]:
    """SUM (generated - teacher)^2 of some images, and the gradients of half of it."""
    hidden = path(student, p, mask).hidden(student, p, mask)
    difference = convolve(hidden, p.weight2, p.bias2)
    square = torch.ops.kdops.mgd_difference_(difference, None, teacher, 1.0).item()
    if not any(wanted.values()):
        return square, [None] * len(FIELDS)
    grads = chain_backward(student, p, mask, hidden, difference, wanted, last=True, give_up_grad=True)
    return square, grads


class _Sums:
    """What the chunks add up to; the student's gradient is put together."""

    def __init__(self, student: Tensor) -> None:
        self.dtype = _op.accumulation_dtype([student], [])
        self.square = 0.0
        self.grads: dict[str, Tensor] = {}
        self._student = student

    def add(self, images: slice, square: float, grads: list[Tensor | None]) -> None:
        self.square += square
        for name, grad in zip(FIELDS, grads):
            if grad is None:
                continue
            if name == "student" and grad.shape != self._student.shape:
                if name not in self.grads:
                    self.grads[name] = torch.empty_like(self._student, dtype=self.dtype)
                self.grads[name][images] = grad
            elif name in self.grads:
                self.grads[name] += grad
            else:
                self.grads[name] = grad.to(self.dtype)


def _chunks(student: Tensor, p: Parameters) -> Iterator[slice]:
    """Slices of the batch, each map of which is no smaller than the weights whose gradients every chunk makes anew."""
    n, _, h, w = student.shape
    weights = p.weight1.numel() + p.weight2.numel()
    positions = max(_POSITIONS_PER_THREAD * torch.get_num_threads(), weights // p.weight1.shape[0])
    images = math.ceil(positions / (h * w))
    return (slice(i, i + images) for i in range(0, n, images))
