"""Copies of modules that leave some of their attributes shared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_sharing", "copy_sharing_tensors", "hooks_of"]

Kind = TypeVar("Kind", bound=nn.Module)


def copy_sharing(module: Kind, memo: dict[int, Any], shared: Sequence[str], **changes: Any) -> Kind:
    """Deep-copy a module by its pickled state, except for the attributes in ``shared``; then apply ``changes``."""
    twin = module.__class__.__new__(module.__class__)
    memo[id(module)] = twin
    state = module.__getstate__()
    kept = {name: state.pop(name) for name in shared}
    twin.__setstate__({**copy.deepcopy(state, memo), **kept, **changes})
    return twin


def copy_sharing_tensors(module: Kind) -> Kind:
    """Deep-copy a module whose parameters and buffers are others, frozen, on the same memory.

    Hooks are the same objects, so that whoever put them there sees the copy run.
    """
    memo: dict[int, Any] = {id(hook): hook for part in module.modules() for hook in hooks_of(part)}
    memo.update({id(tensor): _frozen_twin(tensor) for tensor in chain(module.parameters(), module.buffers())})
    return copy.deepcopy(module, memo)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks around a module's forward, without those that a copy does not take along."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not hasattr(hook, "__deepcopy__")]


def _frozen_twin(tensor: Tensor) -> Tensor:
    twin = tensor.detach()
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
