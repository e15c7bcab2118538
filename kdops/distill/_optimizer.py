"""Parameters that come and go while an optimizer is at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["add_missing", "forget", "replace"]


def add_missing(optimizer: Optimizer, parameters: Sequence[Tensor], group: int) -> None:
    """Put the parameters that no group has into one group, whose settings and schedule they then share."""
    known = {id(p) for g in optimizer.param_groups for p in g["params"]}
    missing = [p for p in parameters if id(p) not in known]
    _insert(optimizer.param_groups[group], len(optimizer.param_groups[group]["params"]), missing)


def replace(optimizer: Optimizer, old: Sequence[Tensor], new: Sequence[Tensor], group: int) -> int:
    """Put new parameters where the old ones were, drop the old ones and their state.

    Returns the group of the old ones; without any, ``group``, to which the new ones then go.
    """
    gone = {id(p) for p in old}
    place = None
    for index, candidate in enumerate(optimizer.param_groups):
        dropped = [i for i, p in enumerate(candidate["params"]) if id(p) in gone]
        if dropped and place is None:
            group, place = index, dropped[0]
        for key in ("params", "param_names"):
            if key in candidate:
                candidate[key] = [entry for i, entry in enumerate(candidate[key]) if i not in dropped]
    home = optimizer.param_groups[group]
    _insert(home, len(home["params"]) if place is None else place, list(new))
    forget(optimizer, old)
    return group


def forget(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Drop the state of parameters that will not be stepped again."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _insert(group: dict[str, Any], place: int, parameters: list[Tensor]) -> None:
    group["params"][place:place] = parameters
    if "param_names" in group:  # of an optimizer made from named parameters
        group["param_names"][place:place] = [f"distiller.{place + i}" for i in range(len(parameters))]
