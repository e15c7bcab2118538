"""Parameters that come and go while an optimizer is at work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["add_missing", "forget", "replace"]


def add_missing(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Put the parameters that no group has into the first group, whose settings and schedule they then share."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _insert(optimizer.param_groups[0], None, [p for p in parameters if id(p) not in known])


def replace(optimizer: Optimizer, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Put new parameters where the old ones were, or into the first group, and drop the old ones and their state."""
    gone = {id(p) for p in old}
    home, place = optimizer.param_groups[0], None
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        if len(kept) < len(group["params"]):
            if place is None:
                home = group
                place = next(i for i, p in enumerate(group["params"]) if id(p) in gone)
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in kept]
    _insert(home, place, list(new))
    forget(optimizer, old)


def forget(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Drop the state of parameters that will not be stepped again."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _insert(group: dict, place: int | None, parameters: list[Tensor]) -> None:
    place = len(group["params"]) if place is None else place
    group["params"][place:place] = parameters
    if "param_names" in group:
        group["param_names"][place:place] = [f"distiller.{place + i}" for i in range(len(parameters))]
