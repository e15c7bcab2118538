"""Student and Distiller as one module, for DistributedDataParallel and trainers that take a single model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdops.distill.distiller import Distiller
from kdops.distill.progressive import ProgressiveDistillation

__all__ = ["DistilledOutput", "DistilledStudent", "exclude_from_ddp"]


class DistilledOutput(NamedTuple):
    """What a `DistilledStudent` returns in training.

    Attributes:
        student: whatever the student returned, its losses for example.
        distill: scalar Tensor, the sum of the terms; 0 after the end of distillation.
        terms: every distillation term by name, scalar Tensors.
    """

    student: Any
    distill: Tensor
    terms: dict[str, Tensor]


class DistilledStudent(nn.Module):
    """A student whose forward also computes its distillation losses.

    In training it returns a `DistilledOutput`, else what the student returns. ``DistributedDataParallel(model)`` keeps
    the student in its buckets and leaves the distiller's parameters to the distiller, which averages their gradients
    itself; neither find_unused_parameters nor a new wrapping is needed when distillation ends or the teacher changes.
    The state dict has the student under ``student.`` and the distiller under ``distiller.``; the teacher is in neither.

    Args:
        distiller: a Distiller or a ProgressiveDistillation, built on the student.
    """

    def __init__(self, distiller: Distiller | ProgressiveDistillation) -> None:
        super().__init__()
        self.student = distiller.student
        self.distiller = distiller

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student and, in training, the distiller."""
        output = self.student(*args, **kwargs)
        if not (self.training and torch.is_grad_enabled()):
            return output
        loss = self.distiller.loss()
        return DistilledOutput(output, loss.total, loss.terms)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's and the distiller's parameters; refused while the widths of an align layer are unknown."""
        self.distiller.check_widths()
        return super().named_parameters(*args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel when it is built."""
        return _own_parameters(self)


def exclude_from_ddp(model: nn.Module) -> None:
    """Keep the parameters of every Distiller inside ``model`` out of DistributedDataParallel's buckets.

    For a model of one's own (a LightningModule) that holds a Distiller; to be called before it is wrapped. A
    `DistilledStudent` needs no call.
    """
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, _own_parameters(model))


def _own_parameters(model: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Distiller)
        for name, _ in module.taps.named_parameters(prefix="taps")
    ]
