"""The operators: schema, fake kernel, autograd and choice of backend, once for every loss.

A loss is two operators, ``kdops::NAME`` and ``kdops::NAME_backward``. Kernels implement them for a dispatch key: C++
for CPU (``kdops._C``), Triton for CUDA. Eager calls go through one `torch.autograd.Function` directly to the kernel,
which takes less host time than autograd in the dispatcher; torch.compile traces the registered operators.

Where the gradient is computed. `Save.STATS`: the forward keeps a few statistics per row and the backward computes the
gradient from them, student and teacher. `Save.GRADS`: the forward computes the gradient while a channel is still in
the cache, and the backward only multiplies it by grad_output. On a CPU the second reads the maps from memory once, so
it is used wherever it gives the same numbers: not for reduction "none" (grad_output differs per row), not for fp16
(gradients underflow before a GradScaler's factor reaches them), and not in a compiled graph (which cannot scale the
saved gradient in place, so that two maps would be alive). bf16 would round twice, unless grad_output is a power of two
such as 1: `Save.BOTH` returns the forward's gradient then, and recomputes it otherwise. On a GPU the streaming kernels
move the same bytes either way, so the first is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdops import _cuda, _extension

library = torch.library.Library("kdops", "DEF")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Whether the running backward was called with retain_graph. PyTorch 2.4 cannot tell, so there it counts as retained.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class Save(IntEnum):
    """What the forward keeps for the backward."""

    NOTHING = 0
    STATS = 1
    GRADS = 2
    BOTH = STATS | GRADS


class FusedLoss:
    """One fused loss as the dispatcher sees it.

    Args:
        name: of the operator and the Triton module, and in error messages.
        parameters: the schema of its scalar parameters, up to the reduction, which comes last.
        fields: number of statistics per unit that `Save.STATS` keeps.
        units: the number of values of reduction "none" for a student level: its rows or channels.
    """

    def __init__(self, name: str, parameters: str, fields: int, units: Callable[[Tensor], int]) -> None:
        self.name, self.fields, self.units = name, fields, units
        maps = "Tensor[] student, Tensor[] teacher"
        library.define(
            f"{name}({maps}, {parameters}, int reduction, int save) -> (Tensor loss, Tensor stats, Tensor[] grads)"
        )
        library.define(
            f"{name}_backward(Tensor grad_output, {maps}, Tensor stats, {parameters}, int reduction) -> Tensor[]"
        )
        for op, function in ((name, "forward"), (f"{name}_backward", "backward")):
            library.impl(op, _cuda.routed(name, function, triton_kernel(name, function)), "CUDA")
        torch.library.register_fake(f"kdops::{name}", self._fake_forward, lib=library)
        torch.library.register_fake(f"kdops::{name}_backward", _fake_backward, lib=library)
        torch.library.register_autograd(
            f"kdops::{name}", self._compiled_backward, setup_context=self._setup_context, lib=library
        )
        self.forward = getattr(torch.ops.kdops, name).default
        self.backward = getattr(torch.ops.kdops, f"{name}_backward").default

    def __call__(self, student: list[Tensor], teacher: list[Tensor], *parameters: Any) -> Tensor:
        """The loss of checked inputs: a scalar, or for reduction "none" one vector with the values of all levels."""
        refuse_forward_mode(self.name, (*student, *teacher))
        save = _what_to_save(student, reduction=parameters[-1])
        if torch.compiler.is_compiling():
            return self.forward(student, teacher, *parameters, save)[0]
        if save == Save.NOTHING:
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(student, teacher, *parameters, save)[0]
        anchor = (anchor_of(*student),) if save == Save.GRADS else ()
        return _Eager.apply(self, parameters, save, anchor, *student, *teacher)

    def _fake_forward(
        self, student: list[Tensor], teacher: list[Tensor], *args: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        *_, reduction, save = args
        units = sum(self.units(s) for s in student)
        like = student[0]
        dtype = accumulation_dtype(student, teacher)
        loss = like.new_empty((units,) if reduction == 2 else (), dtype=dtype)
        stats = like.new_empty((self.fields, units) if save & Save.STATS else (0,), dtype=dtype)
        return loss, stats, [torch.empty_like(s) for s in student] if save & Save.GRADS else []

    @staticmethod
    def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, *ctx.parameters, ctx.save = inputs
        _, stats, grads = output
        ctx.levels = len(student)
        ctx.save_for_backward(*(grads if ctx.save == Save.GRADS else (stats, *student, *teacher)))

    def _compiled_backward(self, ctx: Any, grad_output: Tensor, _stats: Any, _grads: Any) -> tuple:
        if ctx.save == Save.GRADS:
            grads = torch.ops.kdops.scale_gradients(list(ctx.saved_tensors), grad_output)
        else:
            stats, *maps = ctx.saved_tensors
            student, teacher = maps[: ctx.levels], maps[ctx.levels :]
            grads = self.backward(grad_output, student, teacher, stats, *ctx.parameters)
        return (list(grads), [None] * ctx.levels, *(None for _ in ctx.parameters), None)


class _Eager(torch.autograd.Function):
    """The fast path of eager calls: kernels below autograd, one node for all levels."""

    @staticmethod
    def forward(
        ctx: Any, op: FusedLoss, parameters: tuple, save: Save, anchor: tuple[Tensor, ...], *maps: Tensor
    ) -> Tensor:
        levels = len(maps) // 2
        with torch._C._AutoDispatchBelowAutograd():
            loss, stats, grads = op.forward(list(maps[:levels]), list(maps[levels:]), *parameters, save)
        ctx.op, ctx.parameters, ctx.save, ctx.anchor, ctx.levels = op, parameters, save, anchor, levels
        ctx.save_for_backward(*(grads if save == Save.GRADS else (stats, *maps)))
        ctx.ready = grads if save == Save.BOTH else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        levels, saved = ctx.levels, ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            if ctx.save == Save.GRADS:
                anchors, grads = ctx.anchor, scaled(list(saved), grad_output)
            else:
                student, teacher = list(saved[1 : 1 + levels]), list(saved[1 + levels :])
                anchors, grads = student, _handed_over(ctx, grad_output)
                if grads is None:
                    grads = ctx.op.backward(grad_output, student, teacher, saved[0], *ctx.parameters)
        if torch.is_grad_enabled():  # create_graph: a second derivative may be asked for later
            grads = refuse_double_backward(ctx.op.name, grads, (*anchors, grad_output))
        needed = ctx.needs_input_grad[4 : 4 + levels]
        return (None,) * 4 + tuple(g if need else None for g, need in zip(grads, needed)) + (None,) * levels


class _Anchor(torch.autograd.Function):
    """An empty tensor that is attached to the inputs in the graph without keeping their data."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (None,) * len(ctx.needs_input_grad)


def anchor_of(*inputs: Tensor | None) -> Tensor:
    """A stand-in for a node's inputs in `refuse_double_backward`, for a node that saves none of them."""
    return _Anchor.apply(*inputs)


class _RefuseDoubleBackward(torch.autograd.Function):
    """Returns gradients attached to the inputs they depend on, so that differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, name: str, levels: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:levels])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.name}: double backward is not supported by the fused kernels: the gradient is not differentiable. "
            'Use backend="reference" where a second derivative is needed.'
        )


def refuse_double_backward(name: str, grads: Sequence[Tensor], anchors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same gradients, but differentiating them with respect to one of the anchors raises."""
    return _RefuseDoubleBackward.apply(name, len(grads), *grads, *anchors)


def refuse_forward_mode(name: str, inputs: Sequence[Tensor | None]) -> None:
    """Raise if an input has a tangent: kernels below autograd drop it, which would look like a derivative of 0."""
    if forward_ad._current_level < 0:  # no dual numbers anywhere
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            f"{name}: forward-mode differentiation (jvp) is not supported by the fused kernels, got an input with a "
            'tangent. Use backend="reference" where one is needed.'
        )


def resolve(loss: str, backend: str, device: torch.device) -> str:
    """Which implementation runs: "fused" or "reference". "auto" on a CPU without the extension warns, once."""
    if backend == "reference":
        return backend
    reason = unavailable(device)
    if reason is None:
        return "fused"
    if backend == "fused":
        raise RuntimeError(f'{loss}: backend="fused" has no kernel for device {device}: {reason}')
    if device.type == "cuda":
        raise RuntimeError(
            f'{loss}: no kernel for device {device}: {reason}. Ask for backend="reference" to run without it'
        )
    _warn_once(f"kdops: running the eager reference on {device.type}, as {reason}")
    return "reference"


def unavailable(device: torch.device) -> str | None:
    """Why there is no kernel for a device, or None if there is one."""
    if device.type == "cpu":
        if _extension.extension is None:
            return "the extension kdops._C was not built (no C++ compiler at installation?)"
        return None
    if device.type == "cuda":
        return None if _HAS_TRITON else "triton is not installed"
    return f"kdops has kernels for cpu and cuda only, not for {device.type}"


def reduce(values: list[Tensor], reduction: str, single: bool) -> Tensor | list[Tensor]:
    """The reduction of the reference, from the values of each level."""
    if reduction == "none":
        return values[0] if single else values
    per_level = [v.mean() if reduction == "mean" else v.sum() for v in values]
    return per_level[0] if single else torch.stack(per_level).sum()


def split(values: Tensor, shapes: Sequence[Sequence[int]], single: bool) -> Tensor | list[Tensor]:
    """Split the vector of a fused loss into the values of each level."""
    if single:
        return values.view(*shapes[0])
    sizes = [math.prod(shape) for shape in shapes]
    return [v.view(*shape) for v, shape in zip(values.split(sizes), shapes)]


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels apply to a tensor."""
    return x.is_cuda


def accumulation_dtype(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> torch.dtype:
    """fp64 where any map is fp64, else fp32."""
    wide = any(x.dtype == torch.float64 for x in (*student, *teacher))
    return torch.float64 if wide else torch.float32


def _what_to_save(student: Sequence[Tensor], reduction: int) -> Save:
    if not (torch.is_grad_enabled() and any(s.requires_grad for s in student)):
        return Save.NOTHING
    if _cuda.gradient_in_forward() and reduction != 2:
        return Save.STATS if any(s.dtype == torch.float16 for s in student) else Save.GRADS
    dtypes = {s.dtype for s in student}
    if student[0].device.type != "cpu" or reduction == 2 or torch.compiler.is_compiling() or torch.float16 in dtypes:
        return Save.STATS
    return Save.BOTH if torch.bfloat16 in dtypes else Save.GRADS


def scaled(grads: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The saved gradients times grad_output, in place unless another backward may need them."""
    if keeps_graph():
        return torch.ops.kdops.scale_gradients.default(grads, grad_output)
    torch.ops.kdops.scale_gradients_.default(grads, grad_output)
    return grads


def _handed_over(ctx: Any, grad_output: Tensor) -> list[Tensor] | None:
    """The forward's gradients, once, if multiplying by grad_output is exact; otherwise they are freed."""
    grads, ctx.ready = ctx.ready, None
    if grads is None or not is_power_of_two(grad_output):
        return None
    torch.ops.kdops.scale_gradients_.default(grads, grad_output)
    return grads


def is_power_of_two(factor: Tensor) -> bool:
    """Whether multiplying by the scalar is exact."""
    return abs(math.frexp(factor.item())[0]) == 0.5


def _fake_backward(grad_output: Tensor, student: list[Tensor], *args: Any) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


def triton_kernel(module: str, function: str) -> Callable:
    """A launcher that is imported at the first call, so that a CPU-only user never imports triton."""
    launcher: list[Callable] = []

    def call(*args: Any) -> Any:
        if not launcher:
            launcher.append(getattr(importlib.import_module(f"kdops._triton.{module}"), function))
        return launcher[0](*args)

    return call


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)


library.define("scale_gradients(Tensor[] grads, Tensor grad_output) -> Tensor[]")
library.define("scale_gradients_(Tensor(a!)[] grads, Tensor grad_output) -> ()")
for _name in ("scale_gradients", "scale_gradients_"):
    library.impl(_name, triton_kernel("scale", _name), "CUDA")
torch.library.register_fake(
    "kdops::scale_gradients", lambda grads, grad_output: [torch.empty_like(g) for g in grads], lib=library
)
torch.library.register_fake("kdops::scale_gradients_", lambda grads, grad_output: None, lib=library)
