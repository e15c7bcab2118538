"""Runs the Triton kernels against the oracle: in Triton's interpreter or as PTX on a CPU, and natively on a GPU.

TRITON_INTERPRET has to be set before triton is imported, so the interpreter gets a pytest process of its own: without
the variable, a test module's tests need a GPU, and its `test_in_the_interpreter` runs the module again with it. With
--ptx the kernels are compiled for a GPU and run as PTX (see ptx/README.md), in a process of their own too.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from ptx import mode
from torch import Tensor

from kdops.testing import GRADIENT_BUDGET, VALUE_BUDGET, Case, as_list, relative_error

AS_PTX = mode.architecture is not None
#: On CPU tensors, in either way.
INTERPRETED = AS_PTX or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: Triton's interpreter truncates to bfloat16, a device rounds to nearest: this doubles a stored gradient's error.
BFLOAT16_BUDGET = (2 if INTERPRETED and not AS_PTX else 1) * GRADIENT_BUDGET[torch.bfloat16]
NORMS = {None: 0, "batch": 1, "pkd": 2}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
_EPS = {None: 0.0, "batch": 1e-5, "pkd": 1e-6}


def in_this_process(function: Callable) -> Callable:
    """Marks a test of the kernels: fresh memory is NaN, and outside the interpreters it needs a GPU."""
    function = pytest.mark.kernels(pytest.mark.usefixtures("poisoned")(function))
    return function if INTERPRETED else pytest.mark.gpu(function)


def run_in_the_interpreter(path: str) -> None:
    """Run a test module in the interpreter."""
    pytest.importorskip("triton")
    run_pytest("-x", path, TRITON_INTERPRET="1")


def run_pytest(*arguments: str, **environment: str) -> None:
    """Run pytest in a process of its own; its tests must all pass, and there must be some."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0 and " passed" in last, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in last, last


def launcher(loss: str) -> Any:
    """The module of kdops._triton that holds a loss's forward and backward."""
    return importlib.import_module(f"kdops._triton.{loss}")


def parameters(loss: str, options: dict[str, Any], reduction: str) -> tuple:
    """A loss's options as the operator takes them, reduction last."""
    norm = options.get("norm")
    eps = options.get("eps")
    eps = _EPS[norm] if eps is None else eps
    tail = (NORMS[norm], eps, options.get("loss_weight", 1.0), REDUCTIONS[reduction])
    return (options.get("tau", 1.0), *tail) if loss == "cwd_loss" else tail


def value_and_gradient(
    case: Case, student: list[Tensor], teacher: list[Tensor], grad_output: Tensor | float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward of the kernels; grad_output may be a number. The value alone must be the same."""
    module, options = launcher(case.loss), parameters(case.loss, case.options, case.reduction)
    student = [s.detach() for s in student]
    value, stats, grads = module.forward(student, teacher, *options, 1)
    assert grads == []
    alone, nothing, _ = module.forward(student, teacher, *options, 0)
    assert nothing.shape == (0,) and torch.equal(alone.nan_to_num(), value.nan_to_num())
    if not isinstance(grad_output, Tensor):
        grad_output = torch.full_like(value, grad_output)
    return value, module.backward(grad_output.to(value), student, teacher, stats, *options)


def check(case: Case, seed: int = 0) -> None:
    """Value and gradient of a case against the fp64 oracle of the same rounded inputs; grad_output is random."""
    student, teacher = (as_list(x) for x in case.inputs(DEVICE, seed))
    wide = torch.float64 in (case.student_dtype, case.teacher_dtype)
    shapes = [s.shape[1:2] if case.loss == "pkd_loss" else s.shape[:2] for s in student]
    generator = torch.Generator().manual_seed(seed + 1)
    scale = 65536.0 if case.student_dtype == torch.float16 else 1.0
    size = sum(x.numel() for x in map(torch.empty, shapes)) if case.reduction == "none" else 1
    weights = scale * (torch.rand(size, generator=generator, dtype=torch.float64).float() + 0.5).to(DEVICE)
    grad_output = weights if case.reduction == "none" else weights.squeeze()
    value, gradient = value_and_gradient(case, student, teacher, grad_output)
    assert value.dtype == (torch.float64 if wide else torch.float32)
    values, gradients = oracle(case, student, teacher, grad_output, shapes)
    value_budget = VALUE_BUDGET[torch.float64 if wide else torch.float32]
    budget = BFLOAT16_BUDGET if case.student_dtype == torch.bfloat16 else GRADIENT_BUDGET[case.student_dtype]
    error = relative_error(value, values)
    assert error <= value_budget, f"{case}: value is off by {error:.2e}, budget {value_budget:.0e}"
    for s, got, expected in zip(student, gradient, gradients):
        assert got.dtype == s.dtype and got.stride() == torch.empty_like(s).stride()
        error = relative_error(got, expected)
        assert error <= budget, f"{case}: gradient is off by {error:.2e}, budget {budget:.0e}"


def oracle(
    case: Case, student: list[Tensor], teacher: list[Tensor], grad_output: Tensor, shapes: list[torch.Size]
) -> tuple[Tensor, list[Tensor]]:
    """The eager reference in fp64, its values in one vector where the reduction is none."""
    weights: Any = grad_output
    if case.reduction == "none":
        parts = grad_output.split([torch.Size(s).numel() for s in shapes])
        weights = [part.view(*shape) for part, shape in zip(parts, shapes)]
    values, gradients = case.oracle(student, teacher, weights)
    return (torch.cat([v.flatten() for v in values]) if case.reduction == "none" else values[0]), gradients


@contextmanager
def forced_tiling(**changes: Any) -> Any:
    """Every launch with a changed tiling, such as wide=True, or steps=1 to split rows wherever they can be split."""
    plan = importlib.import_module("kdops._triton.plan")
    steps = changes.pop("steps", plan._MIN_STEPS)
    original = plan.plan_tiles

    def changed(*args: Any) -> Any:
        return original(*args)._replace(**changes)

    plan._groups.cache_clear()
    with mock.patch.object(plan, "_MIN_STEPS", steps), mock.patch.object(plan, "plan_tiles", changed):
        yield
    plan._groups.cache_clear()


def mgd_operators() -> dict[str, Callable]:
    """The operators of a step of MGD that have no kernel for a CPU or another one."""
    names = {
        "mgd_mask": ("mgd_mask", "mgd_apply_mask_"),
        "mgd_loss": ("mgd_relu_bits", "mgd_relu_backward_", "mgd_difference_", "mgd_bias_relu_"),
        "scale": ("scale_gradients", "scale_gradients_"),
    }
    return {name: getattr(launcher(module), name) for module, each in names.items() for name in each}


@contextmanager
def mgd_on_triton() -> Iterator[None]:
    """MGDLoss takes a GPU's way on CPU tensors: its kernels in Triton, the convolutions the library's."""
    operators = mgd_operators()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("kdops._op.on_gpu", lambda x: True))
        for module in ("_generation", "_first_convolution"):
            stack.enter_context(mock.patch(f"kdops.{module}._ops", SimpleNamespace(**operators)))
        for name, operator in operators.items():
            stack.enter_context(mock.patch.object(torch.ops.kdops, name, operator))
        yield
