"""Correctness before speed: every provider against the fp64 oracle of the same rounded inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import providers, timing
from kdops import testing
from kdops.testing import Case, as_list, relative_error

#: The error up to which a baseline counts as the same function. Eager half precision keeps probabilities in half.
BASELINE_VALUE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
BASELINE_GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}


@dataclass(frozen=True)
class Errors:
    """Errors relative to the oracle, and the largest allowed ones."""

    value: float
    gradient: float
    value_budget: float
    gradient_budget: float

    @property
    def agree(self) -> bool:
        return self.value <= self.value_budget and self.gradient <= self.gradient_budget


class Oracle:
    """Value and gradient of a case in fp64, computed once for all providers."""

    def __init__(self, case: Case, student: Any, teacher: Any) -> None:
        values, self.gradients = case.oracle(student, teacher)
        self.value, self.dtype = torch.stack(values).sum(), case.student_dtype

    def errors(self, name: str, run: providers.Provider, student: Any, teacher: Any) -> Errors:
        """The errors of a provider: of the value, and the largest of the levels' gradients."""
        value, gradients = timing.Step(lambda: run(student, teacher), student)()
        total = torch.stack([v.detach().double() for v in as_list(value)]).sum()
        gradient = max(relative_error(g, expected) for g, expected in zip(gradients, self.gradients))
        baseline = name in providers.BASELINES
        value_budget = (BASELINE_VALUE if baseline else testing.VALUE_BUDGET)[self.dtype]
        gradient_budget = (BASELINE_GRADIENT if baseline else testing.GRADIENT_BUDGET)[self.dtype]
        return Errors(relative_error(total, self.value), gradient, value_budget, gradient_budget)
