"""The losses of a Distiller: which taps share a call, and that call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdops.cwd_loss import CWDLoss, cwd_loss
from kdops.distill.taps import Tap
from kdops.pkd_loss import PKDLoss, pkd_loss

__all__ = ["Term", "adapts_size", "adapts_width", "group"]

#: Losses that take a list of levels, by their module. Their weight is taken in the forward.
_MULTI_LEVEL: dict[type, Callable[..., Any]] = {CWDLoss: cwd_loss, PKDLoss: pkd_loss}


@dataclass(frozen=True)
class Term:
    """One call of a loss, for one tap or for several."""

    name: str
    taps: tuple[int, ...]
    weight: Callable[[int, int], float]
    function: Callable[..., Any] | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def multi_level(
        self, names: Sequence[str], student: Sequence[Tensor], teacher: Sequence[Tensor], factor: float, split: bool
    ) -> dict[str, Tensor]:
        """Call a loss that takes a list of levels; with ``split`` every level's value stands by its own name."""
        options = dict(self.options)
        options["loss_weight"] = options.get("loss_weight", 1.0) * factor
        if not split or len(student) == 1:
            return {self.name: self.function(list(student), list(teacher), **options)}
        mean = options.pop("reduction", "mean") == "mean"
        parts = self.function(list(student), list(teacher), reduction="none", **options)
        return {name: part.mean() if mean else part.sum() for name, part in zip(names, parts)}


def group(taps: Sequence[Tap]) -> list[Term]:
    """Put taps with the same kdops loss, options and weight into one term, in the order of the taps."""
    calls = [_multi_level_call(tap.loss) for tap in taps]
    terms: list[Term] = []
    grouped: dict[Any, list[int]] = {}
    for index, (tap, call) in enumerate(zip(taps, calls)):
        key = index if call is None else (call, tap.weight)
        grouped.setdefault(key, []).append(index)
    for indices in grouped.values():
        first = indices[0]
        function, options = calls[first] or (None, ())
        name = "+".join(taps[i].label for i in indices)
        terms.append(Term(name, tuple(indices), taps[first].weight, function, options))
    return terms


def _multi_level_call(loss: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[tuple[str, Any], ...]] | None:
    """The function and options of a kdops loss that takes several levels, None for any other loss."""
    function = _MULTI_LEVEL.get(type(loss))
    if function is not None:
        known = inspect.signature(function).parameters
        return function, tuple((name, getattr(loss, name)) for name in known if hasattr(loss, name))
    options: dict[str, Any] = {}
    while isinstance(loss, functools.partial) and not loss.args:
        options = {**loss.keywords, **options}
        loss = loss.func
    if loss in _MULTI_LEVEL.values():
        return loss, tuple(sorted(options.items()))
    return None


def adapts_width(loss: Any) -> bool:
    """Whether a loss may bring the widths together itself: a module with parameters (MGD's align)."""
    return isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None


def adapts_size(loss: Any) -> bool:
    """Whether a loss resizes one of the maps itself (PKD with resize)."""
    if isinstance(loss, functools.partial):
        return loss.keywords.get("resize") is not None
    return getattr(loss, "resize", None) is not None
