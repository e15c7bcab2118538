"""The accuracy required of a loss at the limits of float32: large means, and maps that are nearly equal.

The eager code that detectors are distilled with today (benchmarks/providers.py) is the measure: in fp32, each error
against the fp64 oracle may be four times its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import providers
from kdops.testing import GRADIENT_BUDGET, LOSSES, VALUE_BUDGET, Case, laid_out, relative_error

EAGER_FACTOR = 4
#: Of a channel, in standard deviations.
MEANS = (0.0, 1.0, 30.0, 100.0, 300.0, 1000.0)
#: Distance of student and teacher, in standard deviations.
DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4)

#: Error of CWD's value, in units of tau^2 loss_weight, that is allowed where the value itself vanishes: on a CPU, of
#: the GPU's kernels that normalise, and of the one that sums up a row in one pass, against a running maximum.
FLOOR, GPU_FLOOR, ONLINE_FLOOR = 1e-9, 5e-9, 5e-8
#: The same for PKD's value, in units of loss_weight, where the maps agree up to their scale.
SCALED_FLOOR = 1e-7

#: Losses with options: those that normalise, and all.
NORMALISED = [(name, o) for name, (_, variants) in LOSSES.items() for o in variants if o.get("norm")]
ALL = [(name, o) for name, (_, variants) in LOSSES.items() for o in variants]

#: A map's losses and student's gradients of a case, by the kernels under test.
Run = Callable[[Case, list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


def check_a_mean(case: Case, mean: float, run: Run, device: str = "cpu") -> None:
    """Value and gradient of maps whose channels have a mean of this many deviations.

    The measure is what the eager code is off without a mean: with one it is often off by far more.
    """
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(case.shapes[0], generator=generator) for _ in range(2)]
    _, unmoved = _errors(case, *(x.to(device) for x in maps), run)
    student, teacher = (laid_out((x + mean).to(device), case.student_layout) for x in maps)
    value, gradient = _errors(case, student, teacher, run)
    assert value.ours <= VALUE_BUDGET[torch.float32], (mean, value)
    assert gradient.ours <= EAGER_FACTOR * unmoved.eager, (mean, gradient, unmoved)


def check_a_distance(
    case: Case, distance: float, floor: float, run: Run, device: str = "cpu", scale: float = 1.0
) -> None:
    """Value and gradient of maps that are nearly equal up to a scale. floor: one of those above."""
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(case.shapes[0], generator=generator)
    student = scale * (teacher + distance * torch.randn(case.shapes[0], generator=generator))
    student, teacher = (laid_out(x.to(device), case.student_layout) for x in (student, teacher))
    value, gradient = _errors(case, student, teacher, run)
    allowed = floor * case.options.get("tau", 1.0) ** 2 * case.options.get("loss_weight", 1.0)
    assert value.ours * value.size <= max(VALUE_BUDGET[torch.float32] * value.size, allowed), (distance, value)
    limit = max(GRADIENT_BUDGET[torch.float32], EAGER_FACTOR * gradient.eager)
    assert gradient.ours <= limit, (distance, gradient)


def check_equal_maps(case: Case, run: Run, device: str = "cpu") -> None:
    """Value and gradient of equal maps are exactly 0."""
    x = torch.randn(case.shapes[0], generator=torch.Generator().manual_seed(5))
    x = laid_out(x.to(device), case.student_layout)
    value, gradients = run(case, [x.clone()], [x.clone()])
    assert not value.any() and not gradients[0].any(), (value, gradients[0].abs().max())


class _Error:
    def __init__(self, ours: float, eager: float, size: float) -> None:
        self.ours, self.eager, self.size = ours, eager, size

    def __repr__(self) -> str:
        return f"ours {self.ours:.1e}, eager {self.eager:.1e}, of {self.size:.1e}"


def _errors(case: Case, student: Tensor, teacher: Tensor, run: Run) -> tuple[_Error, _Error]:
    (expected,), (slope,) = case.oracle(student, teacher)
    value, gradients = run(case, [student], [teacher])
    eager_value, eager_gradient = _eager(case, student, teacher)
    return (
        _Error(relative_error(value, expected), relative_error(eager_value, expected), float(expected)),
        _Error(relative_error(gradients[0], slope), relative_error(eager_gradient, slope), float(slope.norm())),
    )


def _eager(case: Case, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """In NCHW, where PyTorch's BatchNorm is most exact."""
    student = student.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    value = providers.build(providers.EAGER, case)(student, teacher.contiguous())
    return value.detach(), torch.autograd.grad(value, student)[0]

