"""The providers: the eager code that detectors are distilled with today, torch.compile of it, and kdops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from kdops import testing
from kdops.testing import Case, as_list

Maps = Union[Tensor, Sequence[Tensor]]
#: Takes student and teacher; returns the loss, or a list of losses that are differentiated together.
Provider = Callable[[Maps, Maps], Any]

EAGER = "eager"
COMPILE = "torch.compile"
MAX_AUTOTUNE = "torch.compile max-autotune"
KDOPS = "kdops"
KDOPS_COMPILED = "kdops in torch.compile"
KDOPS_PER_LEVEL = "kdops, one call per level"
BASELINES = (EAGER, COMPILE, MAX_AUTOTUNE)


def build(name: str, case: Case) -> Provider:
    """A provider's function for a case. A compiled one is compiled at its first call, for this case's shapes."""
    fused = _with_options(testing.LOSSES[case.loss][0], case.options)
    eager = _with_options(_EAGER[case.loss], case.options) if case.loss in _EAGER else _reference(case)
    if name == EAGER:
        return eager
    if name == COMPILE:
        return torch.compile(eager, dynamic=False)
    if name == MAX_AUTOTUNE:
        return torch.compile(eager, dynamic=False, mode="max-autotune")
    if name == KDOPS:
        return fused
    if name == KDOPS_COMPILED:
        return torch.compile(fused, dynamic=False, fullgraph=True)
    if name == KDOPS_PER_LEVEL:
        return lambda student, teacher: [fused(s, t) for s, t in zip(student, teacher)]
    raise ValueError(f"build: name must be one of the providers, got {name!r}")


def names(case: Case, max_autotune: bool = True) -> list[str]:
    """The providers of a case, the baselines first."""
    found = [EAGER, COMPILE, KDOPS, KDOPS_COMPILED]
    if max_autotune:
        found.insert(2, MAX_AUTOTUNE)
    return found + [KDOPS_PER_LEVEL] * (len(case.shapes) > 1)


def eager_cwd(
    student: Maps,
    teacher: Maps,
    tau: float = 1.0,
    norm: str | None = None,
    eps: float | None = None,
    loss_weight: float = 1.0,
) -> Tensor:
    """Channel-wise distillation as MMRazor computes it: both maps through BatchNorm without parameters, flattened to
    rows, softmax of the teacher against the log-softmax of both, one sum. Probabilities stay in the input's dtype.
    """
    total = 0.0
    for s, t in zip(as_list(student), as_list(teacher)):
        n, c, h, w = s.shape
        # MMRazor flattens with .view, which raises for channels_last; .reshape copies there.
        s, t = (_normalised(x, norm, eps).reshape(n * c, h * w) / tau for x in (s, t))
        p_t = F.softmax(t, dim=1)
        divergence = torch.sum(p_t * F.log_softmax(t, dim=1) - p_t * F.log_softmax(s, dim=1))
        total = total + loss_weight * tau**2 * divergence / (n * c)
    return total


def eager_pkd(
    student: Maps, teacher: Maps, loss_weight: float = 1.0, norm: str = "pkd", eps: float | None = None
) -> Tensor:
    """PKD as MMRazor computes it: normalise both maps per channel, then half their mean squared error."""
    total = 0.0
    for s, t in zip(as_list(student), as_list(teacher)):
        total = total + loss_weight * F.mse_loss(_normalised(s, norm, eps), _normalised(t, norm, eps)) / 2
    return total


def _normalised(x: Tensor, norm: str | None, eps: float | None) -> Tensor:
    if norm is None:
        return x
    if norm == "batch":
        return F.batch_norm(x, None, None, training=True, eps=1e-5 if eps is None else eps)
    n, c, h, w = x.shape
    rows = x.permute(1, 0, 2, 3).reshape(c, -1)
    rows = (rows - rows.mean(dim=-1, keepdim=True)) / (rows.std(dim=-1, keepdim=True) + (1e-6 if eps is None else eps))
    return rows.reshape(c, n, h, w).permute(1, 0, 2, 3)


_EAGER: dict[str, Callable[..., Tensor]] = {"cwd_loss": eager_cwd, "pkd_loss": eager_pkd}


def _with_options(loss: Callable[..., Any], options: dict[str, Any]) -> Provider:
    def call(student: Maps, teacher: Maps) -> Any:
        return loss(student, teacher, **options)

    return call


def _reference(case: Case) -> Provider:
    return _with_options(testing.LOSSES[case.loss][0], {**case.options, "backend": "reference"})
