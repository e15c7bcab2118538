"""The cases of every loss, the fp64 oracle and the error budgets, for tests and benchmarks.

A new loss is one entry in `LOSSES`; every test and benchmark over the cases then covers it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdops.cwd_loss import cwd_loss
from kdops.mgd_loss import MGDLoss
from kdops.pkd_loss import pkd_loss

#: Every loss with the options of its cases.
LOSSES: dict[str, tuple[Callable[..., Any], tuple[dict[str, Any], ...]]] = {
    "cwd_loss": (
        cwd_loss,
        (
            {"norm": None, "tau": 1.0},
            {"norm": None, "tau": 4.0, "loss_weight": 3.0},
            {"norm": "batch", "tau": 1.0},
            {"norm": "batch", "tau": 4.0, "eps": 1e-3},
            {"norm": "pkd", "tau": 2.0},
        ),
    ),
    "pkd_loss": (pkd_loss, ({"norm": "pkd", "loss_weight": 6.0}, {"norm": "batch", "eps": 1e-3})),
}

#: Largest relative error against the fp64 oracle of the same rounded inputs: value, and gradient (relative L2).
VALUE_BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}
GRADIENT_BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}

#: Small FPN and YOLO-neck levels, and sizes that are no multiple of a vector register.
SHAPES = {
    "even": ((2, 32, 16, 16),),
    "odd": ((3, 21, 13, 19),),
    "line": ((2, 5, 1, 67),),
    "point": ((7, 19, 1, 1),),
    "one_image": ((1, 3, 25, 38),),
    "pyramid": ((2, 24, 20, 20), (2, 24, 10, 10), (2, 24, 5, 5)),
    "fpn": ((2, 8, 25, 38), (2, 16, 13, 19), (2, 4, 7, 10), (2, 8, 4, 5), (2, 8, 2, 3)),
}
LAYOUTS = ("nchw", "channels_last", "crop", "channels_last_crop", "channel_slice", "transposed", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of a loss: its options and its maps."""

    loss: str
    options: dict[str, Any] = field(hash=False)
    shapes: tuple[tuple[int, ...], ...]
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    student_layout: str = "nchw"
    teacher_layout: str = "nchw"
    mean: float = 0.0  # of the channels, in standard deviations
    reduction: str = "mean"

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        shapes = "+".join("x".join(map(str, s)) for s in self.shapes)
        kinds = f"{_short(self.student_dtype)}.{self.student_layout}-{_short(self.teacher_dtype)}.{self.teacher_layout}"
        return f"{self.loss}-{options}-{shapes}-{kinds}-mean{self.mean:g}-{self.reduction}"

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> tuple[Any, Any]:
        """Fresh random student (requires grad) and teacher: tensors for one level, else lists."""
        generator = torch.Generator().manual_seed(seed)
        student = [self._map(s, self.student_dtype, self.student_layout, generator, device) for s in self.shapes]
        teacher = [self._map(s, self.teacher_dtype, self.teacher_layout, generator, device) for s in self.shapes]
        for s in student:
            s.requires_grad_()
        return (student[0], teacher[0]) if len(self.shapes) == 1 else (student, teacher)

    def _map(self, shape: tuple, dtype: torch.dtype, layout: str, generator: torch.Generator, device: Any) -> Tensor:
        x = torch.randn(shape, generator=generator)
        x = x * torch.rand((1, shape[1], 1, 1), generator=generator).add_(0.5) + self.mean
        return laid_out(x.to(device=device, dtype=dtype), layout)

    def call(self, student: Any, teacher: Any, backend: str = "fused") -> Any:
        """The loss of these maps."""
        return LOSSES[self.loss][0](student, teacher, reduction=self.reduction, backend=backend, **self.options)

    def oracle(self, student: Any, teacher: Any, weights: Any = None) -> tuple[list[Tensor], list[Tensor]]:
        """Values and gradients of the eager reference in fp64, with grad_outputs ``weights`` (1 if None)."""
        wide_student = [s.detach().double().requires_grad_() for s in as_list(student)]
        wide_teacher = [t.detach().double() for t in as_list(teacher)]
        many = isinstance(student, list)
        maps = (wide_student, wide_teacher) if many else (wide_student[0], wide_teacher[0])
        value = self.call(*maps, "reference")
        values = as_list(value)
        weights = [torch.ones_like(v) for v in values] if weights is None else [w.double() for w in as_list(weights)]
        return [v.detach() for v in values], list(torch.autograd.grad(values, wide_student, weights))


@dataclass(frozen=True)
class MGDCase:
    """One step of MGDLoss: widths, sizes, mask, dtype and layout; the mask is drawn from a seed or given."""

    student_channels: int
    teacher_channels: int
    size: tuple[int, int, int]  # N, H, W
    lambda_mgd: float = 0.65
    mask_on_channel: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    teacher_layout: str = "nchw"
    explicit: bool = False

    def __str__(self) -> str:
        kind = f"{_short(self.dtype)}.{self.layout}-{self.teacher_layout}"
        mask = f"{'channel' if self.mask_on_channel else 'spatial'}{self.lambda_mgd:g}" + "given" * self.explicit
        size = "x".join(map(str, self.size))
        return f"mgd-{self.student_channels}to{self.teacher_channels}-{size}-{mask}-{kind}"

    def step(self, device: str | torch.device = "cpu", seed: int = 0) -> MGDStep:
        """Fresh maps, parameters and a mask."""
        generator = torch.Generator().manual_seed(seed)
        n, h, w = self.size
        student = torch.randn(n, self.student_channels, h, w, generator=generator).to(self.dtype)
        teacher = torch.randn(n, self.teacher_channels, h, w, generator=generator).to(self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = MGDLoss(
                self.student_channels,
                self.teacher_channels,
                alpha_mgd=2e-3,
                lambda_mgd=self.lambda_mgd,
                mask_on_channel=self.mask_on_channel,
                backend="fused",
            )
        module = module.to(device=device, dtype=self.dtype)
        shape = (n, self.teacher_channels, 1, 1) if self.mask_on_channel else (n, 1, h, w)
        keep = torch.rand(shape, generator=generator) >= self.lambda_mgd
        return MGDStep(
            module,
            laid_out(student.to(device), self.layout).requires_grad_(),
            laid_out(teacher.to(device), self.teacher_layout),
            keep.to(device) if self.explicit else None,
        )


@dataclass
class MGDStep:
    """The inputs of one step; `run` gives its results."""

    module: MGDLoss
    student: Tensor
    teacher: Tensor
    mask: Tensor | None

    def run(self, weight: float = 1.5) -> list[Tensor]:
        """The loss, and the gradients of weight * loss: the student's, then the parameters'."""
        loss = self.module(self.student, self.teacher, self.mask)
        return [loss.detach(), *torch.autograd.grad(weight * loss, [self.student, *self.module.parameters()])]

    def eager(self, dtype: torch.dtype, keep: Tensor) -> MGDStep:
        """The same step by the eager formula in a dtype, with a mask."""
        module = copy.deepcopy(self.module).to(dtype)
        module.backend = "reference"
        return MGDStep(module, self.student.detach().to(dtype).requires_grad_(), self.teacher.to(dtype), keep)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; crops and slices are views into larger tensors full of NaN."""
    n, c, h, w = x.shape
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":  # all images are the first
        return x[:1].contiguous().expand(n, c, h, w)
    if layout == "channel_slice":
        view = x.new_full((n, c + 3, h, w), torch.nan)[:, 1 : 1 + c]
    elif layout == "strided":
        view = x.new_full((n, c, 2 * h, 3 * w), torch.nan)[:, :, ::2, 1::3]
    elif layout in ("crop", "channels_last_crop"):
        memory = torch.channels_last if layout == "channels_last_crop" else torch.contiguous_format
        around = x.new_full((n + 1, c, h + 3, w + 5), torch.nan).contiguous(memory_format=memory)
        view = around[1:, :, 1 : 1 + h, 3 : 3 + w]
    else:
        raise ValueError(f"laid_out: layout must be one of {LAYOUTS}, got {layout!r}")
    return view.copy_(x)


def cases() -> Iterator[Case]:
    """Every loss with every option, then sizes, dtypes, layouts, means and reductions, varied one at a time."""
    for loss, (_, variants) in LOSSES.items():
        for options in variants:
            yield Case(loss, options, SHAPES["odd"])
            yield Case(loss, options, SHAPES["pyramid"], student_layout="channels_last", teacher_layout="channels_last")
            for reduction in ("sum", "none"):
                yield Case(loss, options, SHAPES["fpn"], reduction=reduction)
        options = variants[-1]
        for shapes in SHAPES.values():
            for mean in (0.0, 30.0):
                yield Case(loss, options, shapes, mean=mean)
        for student_dtype in VALUE_BUDGET:
            for teacher_dtype in VALUE_BUDGET:
                yield Case(loss, options, SHAPES["odd"], student_dtype, teacher_dtype)
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                yield Case(loss, options, SHAPES["odd"], dtype, dtype, layout, layout)
            for student_layout, teacher_layout in (("nchw", "channels_last"), ("channels_last", "crop")):
                yield Case(loss, options, SHAPES["odd"], dtype, dtype, student_layout, teacher_layout)


def as_list(x: Any) -> list[Tensor]:
    """A tensor as a list of one; a list unchanged."""
    return [x] if isinstance(x, Tensor) else list(x)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error in fp64; NaN fails every comparison with a budget."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm()
    return float((got - expected).norm() / scale) if scale > 0 else float(got.norm())


def check(case: Case, device: str | torch.device = "cpu", seed: int = 0) -> None:
    """Compare the fused loss of a case with the oracle, value and gradient; raises AssertionError on a miss.

    grad_output is not 1. In fp16 it is 2^16, as under a GradScaler, since smaller gradients underflow.
    """
    student, teacher = case.inputs(device, seed)
    value = case.call(student, teacher)
    generator = torch.Generator().manual_seed(seed + 1)
    half = case.student_dtype == torch.float16
    weights = [
        torch.full(v.shape, 65536.0) if half else torch.rand(v.shape, generator=generator) + 0.5 for v in as_list(value)
    ]
    weights = [w.to(device) for w in weights]
    values, gradients = case.oracle(student, teacher, weights)
    students = as_list(student)
    got = torch.autograd.grad(as_list(value), students, [w.to(v.dtype) for w, v in zip(weights, as_list(value))])
    wide = torch.float64 in (case.student_dtype, case.teacher_dtype)
    for v, expected in zip(as_list(value), values):
        _within("value", case, relative_error(v, expected), VALUE_BUDGET[torch.float64 if wide else case.student_dtype])
        if v.dtype != (torch.float64 if wide else torch.float32):
            raise AssertionError(f"{case}: value has dtype {v.dtype}")
    for s, g, expected in zip(students, got, gradients):
        _within("gradient", case, relative_error(g, expected), GRADIENT_BUDGET[case.student_dtype])
        if g.dtype != s.dtype or g.stride() != torch.empty_like(s).stride():
            raise AssertionError(f"{case}: gradient has dtype {g.dtype} and strides {g.stride()}")


def _within(what: str, case: Case, error: float, budget: float) -> None:
    if not error <= budget:
        raise AssertionError(f"{case}: {what} is off by {error:.2e}, budget {budget:.0e}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f")
