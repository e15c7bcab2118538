"""Checks of the losses' arguments and the texts of their errors, once for every loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kdops import _norm

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Name of a reduction -> its code in the operators' schemas.
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
BACKENDS = ("auto", "fused", "reference")


def levels(loss: str, student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor], bool]:
    """Return student and teacher as equally long lists of maps, and whether they were given as single tensors."""
    single = isinstance(student, Tensor)
    if single and isinstance(teacher, Tensor):
        return [student], [teacher], True
    if not (_holds_levels(student) and _holds_levels(teacher)):
        raise TypeError(
            f"{loss}: student and teacher must both be tensors or both be lists of pyramid levels, "
            f"got {_kind(student)} and {_kind(teacher)}"
        )
    students, teachers = list(student), list(teacher)
    if len(students) != len(teachers):
        raise ValueError(
            f"{loss}: student and teacher must have the same number of levels, got {len(students)} and {len(teachers)}"
        )
    if not students:
        raise ValueError(f"{loss}: student and teacher must have at least one level, got empty lists")
    return students, teachers, False


def maps(
    loss: str, student: Sequence[Tensor], teacher: Sequence[Tensor], norm: str | None, same_size: bool = True
) -> None:
    """Check every pair of maps; with ``same_size=False`` height and width may differ (they will be resized)."""
    for level, (s, t) in enumerate(zip(student, teacher)):
        where = f"{loss}: level {level}: " if len(student) > 1 else f"{loss}: "
        _check_map(where, "student", s)
        _check_map(where, "teacher", t)
        if s.device != t.device:
            raise ValueError(f"{where}student and teacher must be on the same device, got {s.device} and {t.device}")
        if s.device != student[0].device:
            raise ValueError(f"{where}all levels must be on the same device, got {s.device} after {student[0].device}")
        dims = 4 if same_size else 2
        if s.shape[:dims] != t.shape[:dims]:
            what = "the same shape" if same_size else "the same batch size and number of channels"
            raise ValueError(f"{where}student and teacher must have {what}, got {tuple(s.shape)} and {tuple(t.shape)}")
        if t.requires_grad:
            raise ValueError(
                f"{where}teacher must not require grad, as no gradient is computed for it, got requires_grad=True: "
                "run the teacher under torch.no_grad() or pass teacher.detach(); a trainable layer after "
                "the teacher (a connector, an align layer) would get no gradient here: put it on the student's side"
            )
        if norm is not None and s.shape[0] * s.shape[2] * s.shape[3] == 1:
            raise ValueError(
                f"{where}norm={norm!r} needs more than one value per channel (N*H*W > 1), got shape {tuple(s.shape)}"
            )


def single_map(loss: str, name: str, x: Any) -> None:
    """Check one map by itself."""
    _check_map(f"{loss}: ", name, x)


def positive(loss: str, name: str, value: Any) -> float:
    """A finite number above 0."""
    value = number(loss, name, value)
    if value <= 0:
        raise ValueError(f"{loss}: {name} must be greater than 0, got {value}")
    return value


def number(loss: str, name: str, value: Any) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{loss}: {name} must be a number, got {_kind(value)}")
    if not -math.inf < value < math.inf:  # NaN too; torch.compile cannot trace math.isfinite
        raise ValueError(f"{loss}: {name} must be finite, got {value}")
    return float(value)


def eps(loss: str, norm: str | None, value: Any) -> float:
    """The eps of a convention: its default when None, else a finite number of at least 0."""
    if value is None:
        return _norm.DEFAULT_EPS[norm]
    value = number(loss, "eps", value)
    if value < 0:
        raise ValueError(f"{loss}: eps must be at least 0, got {value}")
    return value


def choice(loss: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that the value is one of the allowed names."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{loss}: {name} must be one of {listed}, got {value!r}")


def _check_map(where: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}{name} must be a tensor, got {_kind(x)}")
    if x.layout != torch.strided:
        raise ValueError(f"{where}{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(
            f"{where}{name} must have 4 dimensions (N, C, H, W), got {x.dim()} with shape {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise ValueError(f"{where}{name} must not be empty, got shape {tuple(x.shape)}")


def _holds_levels(value: Any) -> bool:
    """Whether it is an iterable of maps: no tensor, which iterates over images, and no dict, which does over names."""
    if isinstance(value, (list, tuple)):
        return True
    return isinstance(value, Iterable) and not isinstance(value, (Tensor, Mapping, str, bytes))


def _kind(value: Any) -> str:
    return f"{type(value).__name__}"
