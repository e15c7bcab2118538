"""Align layers and generators in data-parallel training: the same start and the mean gradient in every process.

They stay out of DistributedDataParallel's buckets, for two reasons: a bucket waits for every one of its parameters, so
the step after the end of distillation would fail without find_unused_parameters; and a later teacher's align layers
could not enter buckets that were laid out at the start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Averaged", "broadcast", "world_size"]


def world_size() -> int:
    """Number of processes that train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(module: nn.Module) -> None:
    """Give every process the first one's parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            dist.broadcast(parameter, src=0)


class Averaged:
    """Calls sub-modules with parameters whose gradients are averaged over the processes, all in one collective."""

    def __init__(self, module: nn.Module) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.stand_ins: dict[nn.Parameter, Tensor] = {}
        if parameters:
            self.stand_ins = dict(zip(parameters, _MeanGradient.apply(*parameters)))

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Call a sub-module with the stand-ins of its parameters."""
        own = {name: self.stand_ins[p] for name, p in module.named_parameters() if p in self.stand_ins}
        return functional_call(module, own, args) if own else module(*args)


class _MeanGradient(torch.autograd.Function):
    """Identity of many tensors; its backward runs once, when the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        means: list[Tensor | None] = [None] * len(gradients)
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            chosen = [i for i, g in enumerate(gradients) if g.dtype == dtype]
            flat = torch.cat([gradients[i].reshape(-1) for i in chosen])
            dist.all_reduce(flat)
            flat /= world_size()
            parts = flat.split([gradients[i].numel() for i in chosen])
            for i, part in zip(chosen, parts):
                means[i] = part.view(gradients[i].shape)
        return tuple(means)
