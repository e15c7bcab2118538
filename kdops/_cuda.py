"""Which kernels run a loss on a GPU: Triton's, or a path of the CUDA C++ kernels (csrc/cuda).

`RULES` is the only table. A path is chosen by shape, dtype, layout, compute capability and an occupancy query, never by
timing at run time: the fastest path would differ between ranks and runs, and so would the results. ``faster_on`` is
empty in every rule until a GPU has been measured (see DESIGN.md), so Triton runs every call; `forced` selects a path
for tests and benchmarks.

Where the gradient is computed. The kernels support both: from saved statistics in the backward (half precision, on
chip: 4 bytes an element in the forward and 6 in the backward), or in the forward (6, and 4 more if grad_output is not
1). The first is the default until measurements favour the second: it rounds once, works for fp16, whose gradients
underflow before a GradScaler's factor reaches them, and keeps no map of its own between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from kdops import _extension


class Path(IntEnum):
    """The number of a path in the operators' schemas."""

    TRITON = 0
    BLOCK = 1
    CLUSTER = 2
    WAVES = 3
    CHANNELS_LAST = 4


@dataclass(frozen=True)
class Rule:
    """When a path is chosen: the first rule that holds and for which `refusal` gives no reason.

    Attributes:
        path: the path.
        faster_on: compute capabilities (90 for 9.0) on which a CSV in benchmarks/results shows it faster than Triton.
        reason: why it should be faster, in bytes an element of one map in half precision, gradient in the forward.
    """

    path: Path
    faster_on: frozenset[int]
    reason: str


RULES = (
    Rule(Path.BLOCK, frozenset(), "a channel of both maps fits one block: 6 bytes instead of 14"),
    Rule(Path.CLUSTER, frozenset(), "a channel fits the blocks of a cluster: 6 bytes instead of 14"),
    Rule(Path.WAVES, frozenset(), "later passes find a channel in the L2 cache: 6 of 14 bytes from memory"),
    Rule(Path.CHANNELS_LAST, frozenset(), "14 bytes, as in Triton's kernels, without filling a table"),
)
_LOSSES = ("cwd_loss", "pkd_loss")
_forced: list[tuple[Path, bool]] = []
_operators = torch.ops.kdops


def built() -> bool:
    """Whether kdops._C was built with the CUDA C++ kernels."""
    info = _extension.build_info()
    return info is not None and info["cuda"] != "not built"


def refusal(loss: str, path: Path, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> str | None:
    """Why a path does not support these maps on their device, or None if it does."""
    if not built():
        return "kdops._C was built without CUDA kernels"
    return _operators.cuda_refusal(loss, path, list(student), list(teacher)) or None


def choices(loss: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[Path]:
    """The paths to try for a call, best first: those whose rule holds, then Triton."""
    if any(rule.faster_on for rule in RULES):
        major, minor = torch.cuda.get_device_capability(student[0].device)
        for rule in RULES:
            if 10 * major + minor in rule.faster_on and refusal(loss, rule.path, student, teacher) is None:
                yield rule.path
    yield Path.TRITON


@contextmanager
def forced(path: Path, gradient_in_forward: bool = False) -> Iterator[None]:
    """All calls use ``path``, in every thread (autograd has its own for the backward); an unsupported call raises."""
    _forced.append((path, gradient_in_forward))
    try:
        yield
    finally:
        _forced.pop()


def gradient_in_forward() -> bool:
    """Whether a forced path computes the gradient in the forward."""
    return bool(_forced) and _forced[-1][1]


def routed(loss: str, function: str, triton: Callable) -> Callable:
    """The kernel of an operator: ``function`` is "forward" or "backward", ``triton`` the launcher it falls back to."""
    if loss not in _LOSSES:
        return triton
    name = f"{loss}_cuda" if function == "forward" else f"{loss}_backward_cuda"
    maps = 0 if function == "forward" else 1  # after grad_output

    def on(path: Path, args: tuple) -> Any:
        return triton(*args) if path == Path.TRITON else getattr(_operators, name)(*args, path)

    def call(*args: Any) -> Any:
        if _forced:
            return on(_forced[-1][0], args)
        for path in choices(loss, args[maps], args[maps + 1]):
            try:
                return on(path, args)
            except NotImplementedError:  # known only at the launch: no room beside other work
                if path == Path.TRITON:
                    raise

    return call
