"""What changes during training: the weight of the losses, and the moment at which distillation stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = [
    "ConstantWeight",
    "CosineWeight",
    "LinearWeight",
    "StopDistillation",
    "WarmupWeight",
    "WeightSchedule",
    "as_schedule",
]


class WeightSchedule:
    """A factor of the losses that depends on how far training has come.

    Called with ``step``, the number of finished optimizer steps, and ``epoch``, the number of finished epochs, it
    returns the factor for the next step. A schedule holds no state, so it needs nothing in a checkpoint.
    """

    def __call__(self, step: int, epoch: int) -> float:
        """Return the factor of the next step."""
        raise NotImplementedError


@dataclass(frozen=True)
class ConstantWeight(WeightSchedule):
    """The same factor throughout."""

    value: float = 1.0

    def __call__(self, step: int, epoch: int) -> float:
        """Return the factor of the next step."""
        return self.value


@dataclass(frozen=True)
class _Ramp(WeightSchedule):
    start: float
    end: float
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("start", "end"):
            _number(name, field, getattr(self, field))
        _one_of(name, steps=self.steps, epochs=self.epochs)

    def _progress(self, step: int, epoch: int) -> float:
        """0 at the start, 1 at the end and after it."""
        done, total = (step, self.steps) if self.steps is not None else (epoch, self.epochs)
        return min(done / total, 1.0)


@dataclass(frozen=True)
class LinearWeight(_Ramp):
    """``start + (end - start) * t / T``: a straight line over ``steps`` (or ``epochs``), then ``end``.

    Args:
        start: factor of the first step.
        end: factor from step T on.
        steps: T in optimizer steps.
        epochs: T in epochs, the factor changing once an epoch; give one of the two.
    """

    def __call__(self, step: int, epoch: int) -> float:
        """Return the factor of the next step."""
        return self.start + (self.end - self.start) * self._progress(step, epoch)


@dataclass(frozen=True)
class CosineWeight(_Ramp):
    """``(1 - cos(pi * t / T)) / 2 * (end - start) + start``, then ``end``.

    With 1 -> 0.1 over the steps of the whole training this is DAMO-YOLO's (arXiv:2211.15444), with 1 -> 0.01 over the
    epochs YOLOv6's.

    Args:
        start: factor of the first step.
        end: factor from step T on.
        steps: T in optimizer steps.
        epochs: T in epochs, the factor changing once an epoch; give one of the two.
    """

    start: float = 1.0
    end: float = 0.1

    def __call__(self, step: int, epoch: int) -> float:
        """Return the factor of the next step."""
        return (1 - math.cos(math.pi * self._progress(step, epoch))) / 2 * (self.end - self.start) + self.start


@dataclass(frozen=True)
class WarmupWeight(WeightSchedule):
    """Another schedule (or number) times ``min((step + 1) / steps, 1)``: from 1/steps to the full factor.

    Args:
        after: the schedule, or the number, that is warmed up to.
        steps: length of the warm-up in optimizer steps.
    """

    after: float | WeightSchedule = 1.0
    steps: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", as_schedule("WarmupWeight", self.after))
        _one_of("WarmupWeight", steps=self.steps)

    def __call__(self, step: int, epoch: int) -> float:
        """Return the factor of the next step."""
        return self.after(step, epoch) * min((step + 1) / self.steps, 1.0)


@dataclass(frozen=True)
class StopDistillation:
    """Ends distillation for good at an epoch or a step; what follows is plain training of the student.

    The Distiller drops its hooks, the teacher, and the gradients of align layers and generators; from then on
    ``distiller.loss()`` is an empty result of value 0 that costs nothing. A run that is resumed behind that moment
    stops as soon as its state is loaded. RTMDet: ``StopDistillation(epoch=280)`` of 300, mosaic off in the callback.

    Args:
        epoch: number of epochs with distillation: ``distiller.set_epoch(epoch)`` ends it.
        step: number of optimizer steps with distillation: the ``distiller.step()`` that makes them full ends it. Give
            one of the two.
        callback: called once with the Distiller in the moment of stopping, and again when a run is resumed behind it
            (a new process has its augmentation on again): the place to turn mosaic off.

    Raises:
        TypeError, ValueError: not exactly one of epoch and step, or not a whole number of at least 0.
    """

    epoch: int | None = None
    step: int | None = None
    callback: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        _one_of("StopDistillation", least=0, epoch=self.epoch, step=self.step)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"StopDistillation: callback must be callable, got {type(self.callback).__name__}")

    def due(self, step: int, epoch: int) -> bool:
        """Whether distillation is over after this many finished steps and epochs."""
        return epoch >= self.epoch if self.epoch is not None else step >= self.step


def as_schedule(owner: str, weight: Any) -> WeightSchedule | Callable[[int, int], float]:
    """A number becomes a constant schedule; a schedule or a function of (step, epoch) stays."""
    if callable(weight):
        return weight
    return ConstantWeight(_number(owner, "weight", weight))


def _number(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")
    return float(value)


def _one_of(owner: str, least: int = 1, **lengths: int | None) -> None:
    """Exactly one of the lengths must be given, as a whole number of at least ``least``."""
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{owner}: give exactly one of {' and '.join(lengths)}, got {given or 'none'}")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
