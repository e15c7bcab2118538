"""How a teacher is prepared for being read only, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["TeacherOptions", "TeacherReport"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: The relative difference of a tapped map that rounding explains, by the coarsest precision that has a part in it.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Convolutions in float32 may be computed in TF32 there.
_TOLERANCE_OF_TF32 = 1e-2


@dataclass(frozen=True)
class TeacherOptions:
    """What is done once, on the first batch, so that every later run of the teacher costs less.

    The work is done on a copy that shares the memory of all weights that stay as they are; the given teacher is not
    touched in any way. Its weights are read on that first batch: a teacher that goes on changing (an average of the
    student) cannot be prepared, and is refused when its weights change.

    Taps see what they name: a layer that a tap names, or one inside it whose batch norm is not, is not folded. What
    cannot be prepared runs as it is and is named once in the log (the logger ``kdops``). The first batch goes through
    the teacher as it was given too, and the maps are compared, see `TeacherReport`.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16`` (or the name): convolutions and linear layers hold their weights
            in it and the teacher runs under autocast to it. None: the teacher's own, under the student's autocast.
        channels_last: convolutions work on maps whose channels lie next to each other in memory.
        fold_batch_norm: batch norms that follow a convolution become a part of its weights.
        compile: run the teacher through torch.compile, as a whole or else in the largest parts that it takes without a
            graph break. On a CPU with frozen weights, which takes the memory of the compiled weights again; on a GPU
            as a CUDA graph where the shapes do not change. ``"auto"``: where it cannot be compiled it runs as it is;
            True: a teacher of which nothing can be compiled is refused.
        tolerance: the largest relative difference, in the Euclidean norm, of a tapped map on the first batch. None: by
            precision: 1e-4 in float32 (1e-2 on a GPU, where convolutions may run in TF32), 1e-2 in float16, 5e-2 in
            bfloat16.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.
    """

    dtype: torch.dtype | str | None = None
    channels_last: bool = True
    fold_batch_norm: bool = True
    compile: bool | str = "auto"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        dtype = _DTYPES.get(self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        if dtype is not None and dtype not in _DTYPES.values():
            raise ValueError(f"TeacherOptions: dtype must be None, bfloat16 or float16, got {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype)
        for name in ("channels_last", "fold_batch_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"TeacherOptions: {name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ValueError(f'TeacherOptions: compile must be True, False or "auto", got {self.compile!r}')
        if self.tolerance is not None:
            if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)):
                raise TypeError(f"TeacherOptions: tolerance must be None or a number, got {self.tolerance!r}")
            if not self.tolerance > 0:
                raise ValueError(f"TeacherOptions: tolerance must be greater than 0, got {self.tolerance}")

    def allowed(self, precisions: Sequence[torch.dtype], device: torch.device) -> float:
        """The tolerance, where these precisions have a part in the maps."""
        if self.tolerance is not None:
            return self.tolerance
        known = [_TOLERANCES[dtype] for dtype in precisions if dtype in _TOLERANCES]
        largest = max(known, default=_TOLERANCES[torch.float32])
        return largest if device.type == "cpu" else max(largest, _TOLERANCE_OF_TF32)


@dataclass
class TeacherReport:
    """What the first batch showed of a prepared teacher.

    Attributes:
        folded: the convolutions that took in their batch norm.
        left: layers that stay as they are, each with the reason.
        compiled: the parts that go through torch.compile; ``"(all)"`` where it is the whole teacher.
        not_compiled: parts that torch.compile refused, each with the reason; their own parts may be compiled.
        differences: for every tapped layer, the relative difference of its map from the given teacher's.
        tolerance: the largest difference that is let through.
        bytes: memory of the weights that are not the given teacher's own, without what compiling keeps.
    """

    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    not_compiled: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    bytes: int = 0

    def __str__(self) -> str:
        maps = ", ".join(f"'{place}' {value:.1e}" for place, value in self.differences.items())
        return (
            f"kdops: the teacher is prepared: {len(self.folded)} batch norms folded, {len(self.left)} layers left, "
            f"compiled: {', '.join(self.compiled) or 'nothing'}, {self.bytes / 2**20:.1f} MiB of weights of its own; "
            f"relative difference of its maps: {maps}"
        )


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference in units of the expected map's norm."""
    expected = expected.double()
    difference, norm = (value.double() - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def first_line(error: Exception) -> str:
    """An exception as a reason in the report."""
    return (str(error).splitlines() or [type(error).__name__])[0]
