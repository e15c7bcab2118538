"""Progressive distillation (MTPD, Cao et al. 2023): one teacher after another, from weak to strong."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdops.distill import _optimizer
from kdops.distill._arguments import check_arguments
from kdops.distill._copying import copy_sharing
from kdops.distill.distiller import Distiller, DistillLoss
from kdops.distill.schedules import WeightSchedule, as_schedule
from kdops.distill.taps import Tap, find_layer, unwrap
from kdops.distill.teacher_options import TeacherOptions

__all__ = ["ProgressiveDistillation", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One teacher's part of the training.

    Args:
        teacher: the trained network, or a function without arguments that loads it. Only a function frees the memory
            of the teachers before and keeps later ones off the device: whoever made a module may still hold it.
        taps: the layers that are compared. Their losses and align modules are copied when the stage begins, so align
            layers and generators are reset in every stage, also where two stages name the same ones.
        epochs: length in epochs.
        steps: length in optimizer steps; give one of the two. Only the last stage may have neither: it never ends.
        weight: factor of the stage's terms, a number or a schedule that counts from the stage's beginning.
    """

    teacher: nn.Module | Callable[[], nn.Module]
    taps: Sequence[Tap]
    epochs: int | None = None
    steps: int | None = None
    weight: float | WeightSchedule | Callable[[int, int], float] = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module) and not callable(self.teacher):
            raise TypeError(f"Stage: teacher must be a module or a function, got {type(self.teacher).__name__}")
        object.__setattr__(self, "weight", as_schedule("Stage", self.weight))

    @property
    def length(self) -> int | None:
        """Length in whichever unit is given, None without end."""
        return self.steps if self.epochs is None else self.epochs


class ProgressiveDistillation(nn.Module):
    """A sequence of teachers for one student, each with its own taps and length. Used like a `Distiller`.

    Between two stages the student's weights carry on; align layers and generators are reset, the optimizer's state of
    the old ones goes, and the old teacher is freed before the next is loaded. Behind the last stage distillation ends
    as with `StopDistillation`. Learning rates are the trainer's: MTPD runs a full schedule per stage, see
    ``on_stage``::

        stages = [
            Stage(load_r101, taps, epochs=12),
            Stage(load_x101, taps, epochs=12),
        ]
        distiller = ProgressiveDistillation(student, stages)
        optimizer = SGD(student.parameters(), lr=0.01)
        distiller.bind(optimizer)
        for epoch in range(24):
            distiller.set_epoch(epoch)
            ...

    The stage follows from the steps and epochs that are done, so ``set_epoch`` and ``load_state_dict`` both land in the
    right one. Load the distiller's state before the optimizer's: the optimizer then has the stage's parameters.

    Args:
        student: the network that is trained.
        stages: the stages in their order, all measured in epochs or all in steps.
        run_teacher, split_terms, teacher_options: as for `Distiller`, in every stage.
        on_stage: called with this object whenever its ``stage`` changes, on resuming too; ``stage`` equals the number
            of stages when distillation has ended.

    Raises:
        TypeError, ValueError: stages are missing, of the wrong type or have no usable length; as `Distiller` for the
            first stage.
    """

    def __init__(
        self,
        student: nn.Module,
        stages: Sequence[Stage],
        *,
        run_teacher: Callable[..., Any] | None = None,
        split_terms: bool = False,
        teacher_options: TeacherOptions | None = None,
        on_stage: Callable[[ProgressiveDistillation], None] | None = None,
    ) -> None:
        super().__init__()
        self._by_epoch = _measured_in_epochs(stages)
        self._ends = _ends(stages)
        for stage in stages:  # all of them now, rather than in the middle of the training
            check_arguments(student, stage.taps, run_teacher, None, teacher_options)
            for tap in stage.taps:
                find_layer("ProgressiveDistillation: student", unwrap(student), tap.places[0])
        self._stages: list[Stage | None] = list(stages)  # None once a stage is over
        self._student = (unwrap(student),)
        self._options = {
            "run_teacher": run_teacher,
            "split_terms": split_terms,
            "teacher_options": teacher_options,
        }
        self._on_stage = on_stage
        self._optimizers: list[tuple[Optimizer, int]] = []
        self._step = self._epoch = 0
        self._stage = 0
        self.distiller = self._begin(0)

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self._student[0]

    @property
    def teacher(self) -> nn.Module | None:
        """The present stage's teacher, None behind the last stage."""
        return self.distiller.teacher

    @property
    def stage(self) -> int:
        """Index of the present stage; the number of stages once distillation has ended."""
        return self._stage

    @property
    def stopped(self) -> bool:
        """Whether distillation has ended."""
        return self.distiller.stopped

    @property
    def progress(self) -> tuple[int, int]:
        """Finished optimizer steps and epochs, of all stages."""
        return self._step, self._epoch

    def loss(self) -> DistillLoss:
        """Return the present stage's loss. See `Distiller.loss`."""
        return self.distiller.loss()

    def build(self, *args: Any, **kwargs: Any) -> ProgressiveDistillation:
        """Find the widths of the present stage from a first batch. See `Distiller.build`."""
        self.distiller.build(*args, **kwargs)
        return self

    def bind(self, optimizer: Optimizer, group: int = 0) -> ProgressiveDistillation:
        """Let an optimizer have the present parameters of every stage. See `Distiller.bind`."""
        self._optimizers.append((optimizer, group))
        self.distiller.bind(optimizer, group)
        return self

    def step(self) -> None:
        """Record a finished optimizer step."""
        self._step += 1
        self.distiller.step()
        self._follow()

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of finished epochs, at the start of each."""
        self._epoch = epoch
        self._follow()

    def clear(self) -> None:
        """Forget a forward of the student that no loss will be asked for."""
        self.distiller.clear()

    def stop(self) -> None:
        """End distillation, whatever stages are left."""
        self._change(len(self._stages))

    def check_widths(self) -> None:
        """Raise a RuntimeError while the widths of an align layer are unknown and no optimizer is bound."""
        self.distiller.check_widths()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The present stage's parameters; refused while the widths of an align layer are unknown."""
        self.check_widths()
        return super().named_parameters(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """How far training has come: finished steps and epochs, and the stage."""
        return torch.tensor([self._step, self._epoch, self._stage])

    def set_extra_state(self, state: Tensor) -> None:
        """Go to the stage of a checkpoint; the stage's own state is loaded next."""
        self._step, self._epoch, stage = state.tolist()
        self._change(stage)

    def _follow(self) -> None:
        """Go to the stage that the finished steps or epochs call for."""
        done = self._epoch if self._by_epoch else self._step
        stage = sum(end is not None and done >= end for end in self._ends)
        if stage > self._stage:
            self._change(stage)
            if not self._optimizers and not self.stopped and (self.distiller.taps.unknown() or [*self.parameters()]):
                raise RuntimeError(
                    f"ProgressiveDistillation: the align layers and losses of stage {stage} start anew, and no "
                    "optimizer would train them; call bind(optimizer) once before training"
                )
        if self._by_epoch and not self.stopped:
            self.distiller.set_epoch(done - self._start)

    @property
    def _start(self) -> int:
        return self._ends[self._stage - 1] if self._stage else 0

    def _change(self, stage: int) -> None:
        if stage == self._stage:
            return
        if stage < self._stage:
            raise RuntimeError(
                f"ProgressiveDistillation: stages go forward only, got stage {stage} after {self._stage}; "
                "load into a new ProgressiveDistillation"
            )
        previous, self._stage = self._stage, stage
        if stage == len(self._stages):
            self._end()
        else:
            self._hand_over(previous)
        if self._on_stage is not None:
            self._on_stage(self)

    def _end(self) -> None:
        old = list(self.distiller.taps.parameters())
        self.distiller.stop()
        for optimizer, group in self._optimizers:
            _optimizer.replace(optimizer, old, [], group)
        self.distiller.taps.drop()

    def _hand_over(self, previous: int) -> None:
        old = list(self.distiller.taps.parameters())
        self.distiller.close()
        for index in range(previous, self._stage):
            self._stages[index] = None
        gc.collect()  # the old teacher's memory must be there for the next one
        self.distiller = self._begin(self._stage)
        new = list(self.distiller.taps.parameters())
        for optimizer, group in self._optimizers:
            self.distiller.bind(optimizer, _optimizer.replace(optimizer, old, new, group))

    def _begin(self, index: int) -> Distiller:
        stage = self._stages[index]
        teacher = stage.teacher
        return Distiller(
            self.student,
            # A function's result is moved to the student's device, so a module is given as one too.
            (lambda: teacher) if isinstance(teacher, nn.Module) else teacher,
            [_anew(tap) for tap in stage.taps],
            weight=stage.weight,
            **self._options,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgressiveDistillation:
        return copy_sharing(self, memo, ("_stages", "_options", "_on_stage"))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but optimizers."""
        return {**self.__dict__, "_optimizers": []}


def _anew(tap: Tap) -> Tap:
    """The tap with copies of its modules, so that the given ones stay as they are."""
    fresh = {name: copy.deepcopy(getattr(tap, name)) for name in ("loss", "align") if _is_module(getattr(tap, name))}
    return replace(tap, **fresh)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _measured_in_epochs(stages: Any) -> bool:
    if not isinstance(stages, (list, tuple)) or not all(isinstance(stage, Stage) for stage in stages):
        raise TypeError(f"ProgressiveDistillation: stages must be a list of Stage, got {type(stages).__name__}")
    if not stages:
        raise ValueError("ProgressiveDistillation: stages must not be empty, got none")
    for index, stage in enumerate(stages):
        if stage.epochs is not None and stage.steps is not None:
            raise ValueError(f"ProgressiveDistillation: stage {index}: give epochs or steps, got both")
        last = index == len(stages) - 1
        if stage.length is None and last:
            continue
        if isinstance(stage.length, bool) or not isinstance(stage.length, int) or stage.length < 1:
            raise ValueError(
                f"ProgressiveDistillation: stage {index}: epochs or steps must be a whole number of at least 1"
                f"{'' if last else ' (only the last stage may go without)'}, got {stage.length!r}"
            )
    units = {"epochs" if stage.epochs is not None else "steps" for stage in stages if stage.length is not None}
    if len(units) > 1:
        raise ValueError("ProgressiveDistillation: all stages must be measured in epochs or all in steps, got both")
    return units != {"steps"}


def _ends(stages: Sequence[Stage]) -> list[int | None]:
    """The number of finished epochs (or steps) at which each stage is over."""
    ends: list[int | None] = []
    for stage in stages:
        ends.append(None if stage.length is None else (ends[-1] or 0 if ends else 0) + stage.length)
    return ends
