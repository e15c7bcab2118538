"""The fp64 oracle of a random call, and the only definition of the error that an implementation may have.

Right is the eager reference in fp64 on the same rounded inputs; u is the unit roundoff of the sums, 2^-24, but where a
map is fp64 four of those, 2^-51, as the oracle has its own. A value, or the gradient of a level or of one of its
channels (rows, where they do not touch), may be off, in L2, by the rounding of its dtype plus the largest of

1. kdops.testing's budget, relative to it (a channel gets `CHANNEL` times that);
2. `TIMES_EAGER` times what the eager code is off in the sums' precision, the worst of several orders of the positions
   and images, as one order may be right by luck;
3. what the exact result moves where every element moves by `STABLE` * u of its distance from its channel's mean: the
   error of a backward stable algorithm. Near the teacher, where value and gradient vanish, this is relative to them.
   (Of itself in fp64, which is for checking gradients, and where PyTorch resizes the map in its own dtype.)
4. `STABLE` * u of the natural scale. Of a gradient: the two terms whose difference it is, the student's and the
   teacher's probabilities (CWD; and what the normalisation takes of them) or normalised maps (PKD); but nothing where
   both maps are constant over a row, as the terms are equal then in any arithmetic. Of CWD's value: its exponentials,
   each of which is rounded, and the distances of exponents and of log-sums, from which it remains. Of PKD's value: the
   squares of the normalised maps, whose sums are all that a single pass over the maps leaves of them. Of both in fp64:
   the terms.

CWD and PKD do not depend on a channel's mean, so the oracle gets the distances from one of its elements, and constant
channels are 0 for the eager code: that plain means have trouble with them is no excuse. A channel is judged by itself
so that a wrong small one does not hide behind a large one. What is no number exactly must be none.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from random_calls import Call, Inputs
from torch import Tensor

import kdops
from kdops import _norm
from kdops.pkd_loss import _resized as resized
from kdops.testing import GRADIENT_BUDGET, VALUE_BUDGET, as_list

TIMES_EAGER = 4
# Two sums of up to 32 terms in fp32 are 16 u off each, two exponentials 7 u; exponents and coefficients are rounded.
STABLE = 48
CHANNEL = 4
_UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-51}
_TRIES = 4

Outcome = tuple[list[Tensor], list[Tensor]]  # values, and gradients of the leaves
Orders = list[tuple[Tensor, Tensor]]  # of images and positions, level by level


def apply(call: Call, students: list, teachers: list, module: Any, mask: Tensor | None, backend: str) -> list[Tensor]:
    """The values of a call on these maps."""
    if module is not None:
        module.backend = backend
        return [module(students[0], teachers[0], mask)]
    loss = getattr(kdops, call.loss)
    maps = (students, teachers) if call.as_list else (students[0], teachers[0])
    return as_list(loss(*maps, backend=backend, **call.options))


class Exact:
    """The fp64 oracle of a call and its error bounds, computed on first use."""

    def __init__(self, call: Call, inputs: Inputs) -> None:
        self.call, self.inputs = call, inputs
        self.invariant = call.loss in ("cwd_loss", "pkd_loss")
        self.resized = call.options.get("resize") is not None
        # MGDLoss computes its chain in the student's precision; resized maps are rounded to their dtype by PyTorch.
        wide = inputs.students[0].dtype == torch.float64 if call.loss == "MGDLoss" else call.wide
        self.sums = torch.float64 if wide else torch.float32
        self.joined = call.options.get("norm") is not None  # the rows of a channel
        dtypes = [x.dtype for x in (*inputs.students, *inputs.teachers) if self.resized]
        self.unit = max([_UNITS[self.sums], *(torch.finfo(d).eps / 2 for d in dtypes)])
        self.students, self.teachers = ([self._centred(x) for x in xs] for xs in (inputs.students, inputs.teachers))
        self.weights = self._weights()

    def _centred(self, x: Tensor) -> Tensor:
        """The values in fp64, as distances from one of a channel's where its mean does not matter."""
        x = x.detach().double().contiguous()
        if not self.invariant or self.resized:
            return x
        first = x[:1, :, :1, :1]
        return x - torch.where(first.isfinite(), first, 0.0)

    def _plain(self, x: Tensor, centred: Tensor) -> Tensor:
        """The values in the sums' precision, constant channels 0 where that changes nothing."""
        x = x.detach().to(self.sums).contiguous()
        if not self.invariant or self.resized:
            return x
        return x.masked_fill((centred == 0).flatten(2).all(dim=2).all(dim=0)[:, None, None], 0)

    def _weights(self) -> list[Tensor]:
        """grad_output, in fp64 but exact in fp32."""
        generator = torch.Generator().manual_seed(self.call.seed + 1)
        if self.call.reduction != "none":
            return [torch.tensor(self.call.weight).double()]
        units = slice(1, 2) if self.call.loss == "pkd_loss" else slice(0, 2)
        shapes = [level.shape[units] for level in self.call.levels]
        return [(self.call.weight * (torch.rand(s, generator=generator) + 0.5)).double() for s in shapes]

    def run(self, students: list[Tensor], teachers: list[Tensor], dtype: Any, orders: Orders = ()) -> Outcome:
        """Value and gradients of the eager code in a dtype (None: the maps' own), and in another order."""
        mask, weights = self.inputs.mask, self.weights
        rows = bool(orders) and self.call.loss == "cwd_loss" and self.call.reduction == "none"
        if orders:
            students = [_arranged(x, *order) for x, order in zip(students, orders)]
            teachers = [_arranged(x, *order) for x, order in zip(teachers, orders)]
            mask = None if mask is None else mask[orders[0][0]]
            weights = [w[n] for w, (n, _) in zip(weights, orders)] if rows else weights
        students = [s.detach().to(dtype or s.dtype).requires_grad_() for s in students]
        teachers = [t.to(dtype or t.dtype) for t in teachers]
        module = copy.deepcopy(self.inputs.module)
        leaves = [*students, *(module.to(dtype or torch.float32).parameters() if module else ())]
        values = apply(self.call, students, teachers, module, mask, "reference")
        gradients = list(torch.autograd.grad(values, leaves, [w.to(v.dtype) for w, v in zip(weights, values)]))
        values = [v.detach() for v in values]
        for i, (n, positions) in enumerate(orders):
            gradients[i] = _arranged(gradients[i], n.argsort(), positions.argsort())
            values = [v[n.argsort()] if rows and k == i else v for k, v in enumerate(values)]
        return values, gradients

    @cached_property
    def outcome(self) -> Outcome:
        return self.run(self.students, self.teachers, torch.float64)

    def groups(self, part: int, index: int) -> list[tuple[str, float, tuple[int, ...]]]:
        """Name, relative budget and kept dimensions of what is judged by itself."""
        if part == 0:
            return [("" if self.call.reduction != "none" else " of unit {}", VALUE_BUDGET[self.sums], (0, 1))]
        budget = GRADIENT_BUDGET[self.sums]
        if not self.invariant:
            return [("", budget, ())]
        one = (" of channel {}", (1,)) if self.joined else (" of row {}", (0, 1))
        return [("", budget, ()), (one[0], CHANNEL * budget, one[1])]

    def slack(self, part: int, index: int, kept: tuple[int, ...]) -> Tensor:
        """2 to 4 of the above."""
        want = self.outcome[part][index]
        off = [TIMES_EAGER * norms(x[part][index].double() - want, kept) for x in self.eager]
        off += [norms(x[part][index] - want, kept) for x in self.moved]
        if self.invariant and part == 0:
            off.append(STABLE * self.unit * norms(self.value_terms(index), kept))
        if self.invariant and part == 1:
            terms, ties = self.gradient_terms(index)
            spread = max(1.0, (terms[0, 0].numel() / want[0, 0].numel()) ** 0.5)  # by what a resize's adjoint grows
            for scale in (self.unit * terms.masked_fill(ties, 0), _UNITS[torch.float64] * terms):
                off.append(STABLE * spread * norms(scale, kept))
        return torch.stack(off).amax(dim=0)

    @cached_property
    def eager(self) -> list[Outcome]:
        students, teachers = (
            list(map(self._plain, *pair))
            for pair in ((self.inputs.students, self.students), (self.inputs.teachers, self.teachers))
        )
        outcomes = [self.run(students, teachers, self.sums)]
        if self.resized:
            outcomes.append(self.run(self.inputs.students, self.inputs.teachers, None))
        return outcomes + [self.run(students, teachers, self.sums, self._orders(i)) for i in range(_TRIES)]

    def _orders(self, number: int) -> Orders:
        """A convolution and a resize keep the order of the positions: only the images change places."""
        generator = torch.Generator().manual_seed(self.call.seed + number)
        fixed = not self.invariant or self.resized
        orders = []
        for s in self.students:
            n, _, h, w = s.shape
            positions = torch.arange(h * w) if fixed else torch.randperm(h * w, generator=generator)
            orders.append((torch.randperm(n, generator=generator), positions))
        return orders

    @cached_property
    def moved(self) -> list[Outcome]:
        generator = torch.Generator().manual_seed(self.call.seed + 3)

        over = (0, 2, 3) if self.joined else (2, 3)

        def move(x: Tensor, original: Tensor) -> Tensor:
            size = original.detach().double()
            if self.invariant and self.sums == torch.float32 and not self.resized:
                size = x - x.mean(dim=over, keepdim=True)
            sign = torch.randint(2, x.shape, generator=generator) * 2 - 1
            return x + STABLE * self.unit * sign * size.nan_to_num(0, 0, 0)

        def moved() -> Outcome:
            students = list(map(move, self.students, self.inputs.students))
            return self.run(students, list(map(move, self.teachers, self.inputs.teachers)), torch.float64)

        return [moved() for _ in range(_TRIES)]

    def gradient_terms(self, level: int) -> tuple[Tensor, Tensor]:
        """Elementwise, the sizes of the two terms of a level's gradient, added; and where they are equal."""
        o, s, t, slope, slope_t = self.call.options, *self._normalised(level)
        n, c, h, w = s.shape  # once resized
        weight = self.weights[level if self.call.reduction == "none" else 0].abs() * abs(o["loss_weight"])
        if self.call.loss == "pkd_loss":
            weight = (weight.view(c, 1, 1) if weight.dim() else weight) / (n * h * w)
            if self.sums == torch.float64 and not self.resized:
                s, t = slope * self.inputs.students[level].detach(), slope_t * self.inputs.teachers[level]
            return slope * weight * self._per_unit(c) * (s.abs() + t.abs()), torch.zeros((), dtype=torch.bool)
        ties = (s == s[:, :, :1, :1]) & (t == t[:, :, :1, :1])
        ties = ties.flatten(2).all(dim=2)[:, :, None, None]
        terms = sum(x.flatten(2).softmax(dim=2).view_as(x) for x in (s, t))
        terms = terms * (weight.view(n, c, 1, 1) if weight.dim() else weight)
        if self.joined:  # what the normalisation takes away again
            distance = (s * o["tau"]).abs()
            terms = terms + distance * (terms * distance).mean(dim=(0, 2, 3), keepdim=True)
        return slope * o["tau"] * self._per_unit(n * c) * terms, ties

    def value_terms(self, index: int) -> Tensor:
        """The natural scale of a value: exponentials rounded each by itself, or squares."""
        units = [self._unit_terms(level) * abs(self.call.options["loss_weight"]) for level in range(len(self.students))]
        if self.call.reduction == "none":
            return units[index]
        return sum(x.sum() * self._per_unit(x.numel()) for x in units)

    def _unit_terms(self, level: int) -> Tensor:
        o, s, t, *_ = self.call.options, *self._normalised(level)
        if self.call.loss == "pkd_loss":
            return (s.square() + t.square()).mean(dim=(0, 2, 3)) / 2
        s, t = (x.flatten(2) - x.flatten(2).amax(dim=2, keepdim=True) for x in (s, t))  # the exponents
        p_s, p_t, sum_s, sum_t = s.softmax(dim=2), t.softmax(dim=2), s.logsumexp(dim=2), t.logsumexp(dim=2)
        scale = norms(p_s + p_t, (0, 1)).view_as(sum_s)
        if self.sums == torch.float64:
            scale += (p_t * (s + t).abs()).nan_to_num(0).sum(dim=2) + sum_s + sum_t
        else:
            scale += (p_t * (s - t).abs()).nan_to_num(0).sum(dim=2) + (sum_s - sum_t).abs()
        return o["tau"] ** 2 * scale

    def _per_unit(self, units: int) -> float:
        return 1 / units if self.call.reduction == "mean" else 1.0

    def _normalised(self, level: int) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
        """Both maps normalised, over tau, and the slopes of the normalisations."""
        norm, eps, resize = (self.call.options.get(name) for name in ("norm", "eps", "resize"))
        maps = [self.students[level]], [self.teachers[level]]
        maps = [x for (x,) in (resized(*maps, resize) if resize else maps)]
        eps = _norm.DEFAULT_EPS[norm] if eps is None else eps
        s, t = (_norm.normalise(x, norm, eps) / self.call.options.get("tau", 1.0) for x in maps)
        return (s, t, *(_slope(x, norm, eps) for x in maps))


def _slope(x: Tensor, norm: str | None, eps: float) -> Tensor | float:
    if norm is None:
        return 1.0
    variance = x.var(dim=(0, 2, 3), keepdim=True, unbiased=norm == "pkd")
    return (variance + eps).rsqrt() if norm == "batch" else 1 / (variance.sqrt() + eps)


def norms(x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """L2 norms over all dimensions but the kept ones, in a vector."""
    x = x.double()
    over = [d for d in range(x.dim()) if d not in kept]
    return (torch.linalg.vector_norm(x, dim=over) if over else x.abs()).flatten()


def _arranged(x: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Images and positions in another order; a map of another size keeps its positions."""
    x = x[images]
    return x if len(positions) != x.shape[2] * x.shape[3] else x.flatten(2)[:, :, positions].view_as(x)
