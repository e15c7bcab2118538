"""Whether a call gave the right numbers: the one definition of how far off an implementation may be.

Right is the eager reference in fp64 on the same rounded inputs; u is the unit roundoff of the sums (2^-24, or 2^-53
where a map is fp64). A value, or the gradient of a level or of one of its channels (rows, where they do not touch), may
be off, in L2, by the rounding of its dtype plus the largest of

1. kdops.testing's budget, relative to it (a channel gets `CHANNEL` times that);
2. `TIMES_EAGER` times what the eager code is off in the sums' precision, the worst of several orders of the positions
   and images, as one order may be right by luck (where the sums are in fp64, this is the oracle's own noise);
3. what the exact result moves where every element moves by `STABLE` * u of its distance from its channel's mean: the
   error of a backward stable algorithm. Near the teacher, where value and gradient vanish, this is relative to them;
4. for a gradient, `STABLE` * u of the two terms whose difference it is, the student's and the teacher's probabilities
   (CWD) or normalised maps (PKD): its natural scale, where the maps agree in nothing.

CWD and PKD do not depend on a channel's mean, so constant channels are 0 in 1 to 4: centred on one of its elements such
a channel is exact in any order, and the trouble that plain means have with it is no excuse. A channel is judged by
itself so that a wrong small one does not hide behind a large one. What is no number exactly must be none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from random_calls import Call, Inputs
from torch import Tensor

import kdops
from kdops import _norm
from kdops.testing import GRADIENT_BUDGET, VALUE_BUDGET, as_list

TIMES_EAGER = 4
STABLE = 4
CHANNEL = 4
_TRIES = 4

Outcome = tuple[list[Tensor], list[Tensor]]  # values, and gradients of the leaves
Backend = Callable[[Call, Inputs, list[Tensor]], Outcome]
Orders = list[tuple[Tensor, Tensor]]  # of images and positions, level by level


@dataclass(frozen=True)
class Miss:
    """What is off, by how much, how much it may be, and the size of what is right."""

    what: str
    error: float = 0.0
    allowed: float = 0.0
    size: float = 0.0

    def __str__(self) -> str:
        return f"{self.what}: off by {self.error:.2e} of {self.size:.2e}, allowed {self.allowed:.2e}"


def public(call: Call, inputs: Inputs, weights: list[Tensor]) -> Outcome:
    """The kernels through the public function and autograd, with two backwards where the call asks for them."""
    values = apply(call, inputs.students, inputs.teachers, inputs.module, inputs.mask, "fused")
    weights = [w.to(v.dtype) for w, v in zip(weights, values)]
    gradients = torch.autograd.grad(values, inputs.leaves, weights, retain_graph=call.twice)
    if call.twice:
        again = torch.autograd.grad(values, inputs.leaves, weights)
        if not all(map(same_bits, gradients, again)):
            raise AssertionError("a second backward gave other gradients")
    return [v.detach() for v in values], list(gradients)


def apply(call: Call, students: list, teachers: list, module: Any, mask: Tensor | None, backend: str) -> list[Tensor]:
    """The values of a call on these maps."""
    if module is not None:
        module.backend = backend
        return [module(students[0], teachers[0], mask)]
    loss = getattr(kdops, call.loss)
    maps = (students, teachers) if call.as_list else (students[0], teachers[0])
    return as_list(loss(*maps, backend=backend, **call.options))


def judge(call: Call, backend: Backend = public) -> list[Miss]:
    """Run a call, and say what is wrong with what comes out."""
    inputs = call.inputs()
    before = [b.clone() for b in inputs.buffers]
    exact = _Exact(call, inputs)
    try:
        values, gradients = backend(call, inputs, exact.weights)
    except Exception as error:  # any refusal or crash of a valid call is a miss
        return [Miss(f"raised {type(error).__name__}: {error}")]
    misses = [Miss("an input was changed") for b, was in zip(inputs.buffers, before) if not same_bits(b, was)]
    dtype = torch.float64 if call.wide else torch.float32
    misses += [Miss(f"value {i} has dtype {v.dtype}") for i, v in enumerate(values) if v.dtype != dtype]
    for i, (leaf, g) in enumerate(zip(inputs.leaves, gradients)):
        # The layout of a parameter's gradient, and of a resized student's, is PyTorch's.
        ours = i < len(inputs.students) and call.options.get("resize") != "student"
        if g.dtype != leaf.dtype or g.shape != leaf.shape or ours and g.stride() != torch.empty_like(leaf).stride():
            misses.append(Miss(f"gradient {i} has dtype {g.dtype}, shape {tuple(g.shape)}, strides {g.stride()}"))
    for part, (name, results) in enumerate((("value", values), ("gradient", gradients))):
        for i, got in enumerate(results):
            misses += _judge_one(f"{name} {i}", got, exact, part, i)
    return misses


def _judge_one(what: str, got: Tensor, exact: _Exact, part: int, index: int) -> list[Miss]:
    want, top = exact.outcome[part][index], torch.finfo(got.dtype).max
    overflows = want.abs() > 0.99 * top
    if overflows.any():
        if not exact.resized and not (got[overflows].abs() > 0.98 * top).all():
            return [Miss(f"{what}: finite where the exact one overflows")]
        got, want = got.masked_fill(overflows, 0), want.masked_fill(overflows, 0)
    if not torch.isfinite(want).all() or not torch.isfinite(got).all():
        return _judge_numbers(what, got, want)
    misses, ulp = [], torch.finfo(got.dtype)
    half_ulp = want.abs().clamp(min=ulp.smallest_normal) * (ulp.eps / 2)
    for name, budget, kept in exact.groups(part, index):
        error, size, rounding = norms(got.double() - want, kept), norms(want, kept), norms(half_ulp, kept)
        if (error <= budget * size + rounding).all():
            continue
        allowed = torch.maximum(budget * size, exact.slack(part, index, kept)) + rounding
        k = int((error - allowed).argmax())
        if not error[k] <= allowed[k]:
            misses.append(Miss(what + name.format(k), float(error[k]), float(allowed[k]), float(size[k])))
    return misses


def _judge_numbers(what: str, got: Tensor, want: Tensor) -> list[Miss]:
    """Where one of the two is no number: the other must not be one either, and NaN stays NaN."""
    differ = int((torch.isfinite(got) != torch.isfinite(want)).sum())
    if differ:
        numbers = int(torch.isfinite(want).sum())
        return [Miss(f"{what}: {differ} of {got.numel()} are numbers or not where they should not, {numbers} should")]
    return [] if got[torch.isnan(want)].isnan().all() else [Miss(f"{what}: infinite where the exact one is NaN")]


class _Exact:
    """The fp64 oracle of a call, and how far a good implementation may be from it, computed once it is asked for."""

    def __init__(self, call: Call, inputs: Inputs) -> None:
        self.call, self.inputs = call, inputs
        self.invariant = call.loss in ("cwd_loss", "pkd_loss")
        self.resized = call.options.get("resize") is not None
        # MGDLoss computes its chain in the student's precision; resized maps are rounded to their dtype by PyTorch.
        wide = inputs.students[0].dtype == torch.float64 if call.loss == "MGDLoss" else call.wide
        self.sums = torch.float64 if wide else torch.float32
        dtypes = [self.sums, *(x.dtype for x in (*inputs.students, *inputs.teachers) if self.resized)]
        self.unit = max(torch.finfo(d).eps for d in dtypes) / 2
        self.students = [self._plain(s) for s in inputs.students]
        self.teachers = [self._plain(t) for t in inputs.teachers]
        self.weights = self._weights()

    def _plain(self, x: Tensor) -> Tensor:
        """The values in fp64, constant channels 0 where that changes nothing."""
        x = x.detach().double().contiguous()
        if not self.invariant or self.resized:
            return x
        first = x[:1, :, :1, :1]
        constant = ((x == first) & first.isfinite()).flatten(2).all(dim=2).all(dim=0)
        return torch.where(constant[:, None, None], 0.0, x)

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
        joined = self.call.loss == "pkd_loss" or self.call.options["norm"] is not None
        one = (" of channel {}", (1,)) if joined else (" of row {}", (0, 1))
        return [("", budget, ()), (one[0], CHANNEL * budget, one[1])]

    def slack(self, part: int, index: int, kept: tuple[int, ...]) -> Tensor:
        """2 to 4 of the above."""
        want = self.outcome[part][index]
        off = [TIMES_EAGER * norms(x[part][index].double() - want, kept) for x in self.eager]
        off += [norms(x[part][index] - want, kept) for x in self.moved]
        if part == 1 and self.invariant and not self.resized:
            off.append(STABLE * self.unit * norms(self.terms(index), kept))
        return torch.stack(off).amax(dim=0)

    @cached_property
    def eager(self) -> list[Outcome]:
        plain = [] if self.sums == torch.float64 else [self.run(self.students, self.teachers, self.sums)]
        if self.resized:
            plain.append(self.run(self.inputs.students, self.inputs.teachers, None))
        return plain + [self.run(self.students, self.teachers, self.sums, self._orders(i)) for i in range(_TRIES)]

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

        def move(x: Tensor) -> Tensor:
            distance = x - x.mean(dim=(0, 2, 3), keepdim=True) if self.invariant else x
            sign = torch.randint(2, x.shape, generator=generator) * 2 - 1
            return x + STABLE * self.unit * sign * distance

        return [
            self.run([move(s) for s in self.students], [move(t) for t in self.teachers], torch.float64)
            for _ in range(_TRIES)
        ]

    def terms(self, level: int) -> Tensor:
        """Elementwise, the sizes of the two terms of a level's gradient, added."""
        o, s, t = self.call.options, self.students[level], self.teachers[level]
        n, c, h, w = s.shape
        norm, tau = o["norm"], o.get("tau", 1.0)
        eps = _norm.DEFAULT_EPS[norm] if o["eps"] is None else o["eps"]
        slope = self._slope(s, norm, eps) * abs(o["loss_weight"])
        s, t = _norm.normalise(s, norm, eps) / tau, _norm.normalise(t, norm, eps) / tau
        weight = self.weights[level if self.call.reduction == "none" else 0].abs()
        if self.call.loss == "cwd_loss":
            s, t = s.flatten(2).softmax(dim=2).view_as(s), t.flatten(2).softmax(dim=2).view_as(t)
            units, weight = n * c, weight.view(n, c, 1, 1) if weight.dim() else weight
        else:
            units, weight = c, (weight.view(c, 1, 1) if weight.dim() else weight) / (n * h * w)
        weight = weight / units if self.call.reduction == "mean" else weight
        return slope * tau * weight * (s.abs() + t.abs())

    def _slope(self, x: Tensor, norm: str | None, eps: float) -> Tensor | float:
        """Of the normalisation."""
        if norm is None:
            return 1.0
        variance = x.var(dim=(0, 2, 3), keepdim=True, unbiased=norm == "pkd")
        return (variance + eps).rsqrt() if norm == "batch" else 1 / (variance.sqrt() + eps)


def norms(x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """L2 norms over all dimensions but the kept ones, in a vector."""
    x = x.double()
    over = [d for d in range(x.dim()) if d not in kept]
    return (torch.linalg.vector_norm(x, dim=over) if over else x.abs()).flatten()


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def _arranged(x: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Images and positions in another order; a map of another size keeps its positions."""
    x = x[images]
    return x if len(positions) != x.shape[2] * x.shape[3] else x.flatten(2)[:, :, positions].view_as(x)
