"""Runs an unmodified MMRazor config on kdops, by registering kdops classes under MMRazor's names."""
from __future__ import annotations

import logging
from collections.abc import Iterable

from mmengine.logging import print_log
from mmengine.registry import Registry
from mmrazor.registry import HOOKS, MODELS

from .hooks import KDOpsStopDistillHook
from .losses import KDOpsChannelWiseDivergence, KDOpsMGDConnector, KDOpsMGDLoss, KDOpsPKDLoss

STOCK_NAMES: dict[str, tuple[Registry, type]] = {
    "ChannelWiseDivergence": (MODELS, KDOpsChannelWiseDivergence),
    "PKDLoss": (MODELS, KDOpsPKDLoss),
    "MGDLoss": (MODELS, KDOpsMGDLoss),
    "MGDConnector": (MODELS, KDOpsMGDConnector),
    "StopDistillHook": (HOOKS, KDOpsStopDistillHook),
}
_replaced: dict[str, type] = {}


def take_over(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Register kdops classes under MMRazor's own names, so that `type="ChannelWiseDivergence"` builds kdops'.

    Args:
        names: some of ``STOCK_NAMES``; None for all.

    Returns:
        The names now taken over that were not before.

    Raises:
        ValueError: a name is not one of ``STOCK_NAMES``.
    """
    names = _known("take_over", names)
    taken = tuple(name for name in names if name not in _replaced)
    for name in taken:
        registry, ours = STOCK_NAMES[name]
        _replaced[name] = registry.module_dict[name]
        registry.register_module(name=name, module=ours, force=True)
    if taken:
        print_log(f"kdops: takes over {', '.join(taken)} of MMRazor", logger="current", level=logging.INFO)
    return taken


def give_back(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Undo `take_over`: register MMRazor's own classes under their names again.

    Args:
        names: some of ``STOCK_NAMES``; None for all.

    Returns:
        The names given back.

    Raises:
        ValueError: a name is not one of ``STOCK_NAMES``.
    """
    returned = tuple(name for name in _known("give_back", names) if name in _replaced)
    for name in returned:
        STOCK_NAMES[name][0].register_module(name=name, module=_replaced.pop(name), force=True)
    return returned


def _known(function: str, names: Iterable[str] | None) -> tuple[str, ...]:
    names = tuple(STOCK_NAMES) if names is None else tuple(names)
    unknown = [name for name in names if name not in STOCK_NAMES]
    if unknown:
        raise ValueError(f"{function}: names must be among {sorted(STOCK_NAMES)}, got {unknown}")
    return names
