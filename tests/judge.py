"""Runs a random call on a backend and reports what is wrong with its results, by the bounds of `exact`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from exact import Exact, Outcome, apply, norms
from random_calls import Call, Inputs
from torch import Tensor
from triton_interpreter import parameters

from kdops._op import Save

Backend = Callable[[Call, Inputs, list[Tensor]], Outcome]


@dataclass(frozen=True)
class Miss:
    """A miss: what is off, its error, the bound, and the magnitude of the expected value."""

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
        # bfloat16's first is the forward's times a power of two, which what has underflowed there cannot follow.
        for a, b in zip(gradients, again):
            least = torch.finfo(a.dtype).smallest_normal * max(1, abs(call.weight))
            if not torch.allclose(a, b, rtol=0, atol=least, equal_nan=True):
                raise AssertionError("a second backward gave other gradients")
    return [v.detach() for v in values], list(gradients)


def operators(find: Callable[[str], Any], save: Save = Save.STATS) -> Backend:
    """Forward and backward of a loss's operators, which ``find`` gives by its name: kernels without autograd.

    With `Save.GRADS` the gradients are the forward's, times grad_output. For losses that are operators, without resize.
    """

    def run(call: Call, inputs: Inputs, weights: list[Tensor]) -> Outcome:
        students, teachers = [s.detach() for s in inputs.students], inputs.teachers
        is_mgd = call.loss == "mgd_loss"
        options = (call.options["alpha_mgd"], 0) if is_mgd else parameters(call.loss, call.options, call.reduction)
        loss = find(call.loss)
        value, stats, grads = loss.forward(students, teachers, *options, save)
        shapes = [w.shape for w in weights]
        values = (
            [v.view(s) for v, s in zip(value.split([s.numel() for s in shapes]), shapes)] if value.dim() else [value]
        )
        if save == Save.GRADS:
            return values, torch.ops.kdops.scale_gradients(grads, weights[0].to(value))
        grad_output = torch.cat([w.flatten() for w in weights]) if value.dim() else weights[0]
        return values, list(loss.backward(grad_output.to(value), students, teachers, stats, *options))

    return run


def judge(call: Call, backend: Backend = public, cuts: bool = False) -> list[Miss]:
    """Run a call and report what is wrong with its results. cuts: bfloat16 is cut, as by Triton's interpreter."""
    inputs = call.inputs()
    before = [b.clone() for b in inputs.buffers]
    exact = Exact(call, inputs)
    try:
        values, gradients = backend(call, inputs, exact.weights)
    except Exception as error:  # any error or crash of a valid call is a miss
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
            misses += _judge_one(f"{name} {i}", got, exact, part, i, cuts)
    return misses


def _judge_one(what: str, got: Tensor, exact: Exact, part: int, index: int, cuts: bool) -> list[Miss]:
    want, top = exact.outcome[part][index], torch.finfo(got.dtype).max
    overflows = want.isfinite() & (want.abs() > 0.9 * top)
    if overflows.any():
        if not (got[overflows].abs() > 0.8 * top).all():
            return [Miss(f"{what}: small where the exact one overflows")]
        got, want = got.masked_fill(overflows, 0), want.masked_fill(overflows, 0)
    if not torch.isfinite(want).all() or not torch.isfinite(got).all():
        return _judge_numbers(what, got, want)
    misses, ulp = [], torch.finfo(got.dtype)
    # In fp32 and fp64 a gradient is rounded in the forward, and once more when it is multiplied by grad_output. PyTorch
    # rounds fp64 to half precision by way of fp32.
    half_ulps = 2 if got.dtype.itemsize > 2 or (cuts and got.dtype == torch.bfloat16) else 1 + 2**-10
    roundings = want.abs().clamp(min=ulp.smallest_normal) * (ulp.eps / 2) * half_ulps
    for name, budget, kept in exact.groups(part, index):
        error, size, rounding = norms(got.double() - want, kept), norms(want, kept), norms(roundings, kept)
        if (error <= budget * size + rounding).all():
            continue
        slack = exact.slack(part, index, kept)
        # Where rounding decides whether MGDLoss's ReLU passes a value, its jump comes on top of all other rounding.
        jumps = exact.call.loss == "MGDLoss"
        allowed = (budget * size + slack if jumps else torch.maximum(budget * size, slack)) + rounding
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
