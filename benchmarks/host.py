"""Host time of a call on a map that is too small to cost anything, and its parts.

Small maps are host-bound: Python's checks, autograd's bookkeeping and PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import providers, timing
from kdops.testing import Case

SHAPE = (1, 4, 4, 4)


class _EmptyFunction(torch.autograd.Function):
    """The lower bound for a loss with its own backward: no work in either direction."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student)
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        return ctx.saved_tensors[0], None


class _Recorder(TorchDispatchMode):
    """Remembers the kdops operators that a call reaches, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.namespace == "kdops":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def measure(case: Case, device: str, seconds: float) -> dict[tuple[str, str], timing.Quantiles]:
    """Host time by (provider, mode): whole steps of the providers, and the parts of kdops's step."""
    student, teacher = case.inputs(device)
    eager, fused = providers.build(providers.EAGER, case), providers.build(providers.KDOPS, case)
    whole = timing.Step(lambda: fused(student, teacher), student)
    functions: dict[tuple[str, str], Callable[[], Any]] = {
        (providers.EAGER, timing.BOTH): timing.Step(lambda: eager(student, teacher), student),
        (providers.KDOPS, timing.BOTH): whole,
        (providers.KDOPS, timing.FORWARD): lambda: fused(student, teacher),
        (providers.KDOPS, "forward, no_grad"): lambda: _without_grad(fused, student, teacher),
        ("empty autograd.Function", timing.BOTH): timing.Step(lambda: _EmptyFunction.apply(student, teacher), student),
    }
    for function, args in _operators(whole):
        functions[function.name().split("::")[1] + " operator", "below autograd"] = _below_autograd(function, args)
    named = {" | ".join(name): function for name, function in functions.items()}
    measured = timing.calls(named, seconds, device)
    return {name: measured[" | ".join(name)] for name in functions}


def _operators(step: timing.Step) -> list[tuple[Any, tuple]]:
    with _Recorder() as recorder:
        step()
    return recorder.calls


def _below_autograd(function: Any, args: tuple) -> Callable[[], Any]:
    def call() -> None:
        with torch._C._AutoDispatchBelowAutograd():
            function(*args)

    return call


def _without_grad(run: providers.Provider, student: Any, teacher: Any) -> None:
    with torch.no_grad():
        run(student, teacher)
