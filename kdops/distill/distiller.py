"""The Distiller: runs a frozen teacher beside a student that is trained, and compares chosen layers of the two."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdops.distill import _average, _optimizer
from kdops.distill._arguments import check_arguments, check_passes, loaded, unknown_widths
from kdops.distill._capture import Recorder, captured_once
from kdops.distill._compare import Comparison, call_directly
from kdops.distill._copying import copy_sharing
from kdops.distill._prepared import hold_teacher
from kdops.distill.schedules import StopDistillation, WeightSchedule, as_schedule
from kdops.distill.taps import Place, Tap, find_layer, unwrap
from kdops.distill.teacher_options import TeacherOptions, TeacherReport

__all__ = ["DistillLoss", "Distiller"]

#: Calls of loss() after which align layers that no optimizer has changed are reported.
_PATIENCE = 50


@dataclass(frozen=True)
class DistillLoss:
    """What ``distiller.loss()`` returns; ``task_loss + distiller.loss()`` is a tensor.

    Attributes:
        total: scalar Tensor, the sum of the terms, with a gradient.
        terms: every term by name: scalar Tensors that hold their graph, weights included.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def log(self) -> dict[str, Tensor]:
        """The terms without their graph, for a log that outlives the step."""
        return {name: term.detach() for name, term in self.terms.items()}

    def __add__(self, other: Any) -> Any:
        """Add the total to a tensor or a number; an empty result changes nothing."""
        return self.total + other if self.terms else other

    __radd__ = __add__


class Distiller(nn.Module):
    """Feature distillation beside an ordinary training step.

    The step stays as it is: run the student, add ``distiller.loss()`` to its loss, go backward::

        taps = [Tap(f"neck.out_layers.{i}.conv", loss=CWDLoss(norm="batch"), align=(96, 128)) for i in range(3)]
        distiller = Distiller(student, teacher, taps, stop=StopDistillation(epoch=280))
        optimizer = SGD([*student.parameters(), *distiller.parameters()], lr=0.01)
        for epoch in range(300):
            distiller.set_epoch(epoch)
            for images, targets in loader:
                loss = criterion(student(images), targets) + distiller.loss()
                ...
                optimizer.step()
                distiller.step()

    Hooks on the tapped layers record the student's forwards in training mode with gradients enabled. ``loss()`` then
    runs the teacher with the arguments that the student received, in eval mode throughout, without gradients, in the
    student's autocast state and no deeper than its last tapped layer (its first run goes to the end, to find layers
    that run more than once), and lets go of all maps.

    Neither student nor teacher is a sub-module: ``parameters()`` and ``state_dict()`` hold the align layers and the
    losses' own parameters, and how far training has come. ``to()`` moves them and the teacher. ``copy.deepcopy``
    copies the student along (or takes the copy that is being made of it) and shares the teacher, which the copy does
    not move; a pickle holds both networks.

    With torch.distributed initialised, the distiller's own parameters start equal in all processes and their gradients
    are averaged here; DistributedDataParallel is not for them, see `kdops.DistilledStudent`.

    Args:
        student: the network that is trained, called as a module (not by ``forward``). May be wrapped by
            torch.compile or DistributedDataParallel, now or later; layers go by their names inside the wrapper.
        teacher: the trained network, or a function without arguments that returns it (it is then moved to the
            student's device, and nobody else keeps its memory). It is frozen: eval mode, ``requires_grad_(False)``.
        taps: the layers that are compared, see `kdops.Tap`.
        run_teacher: ``run_teacher(teacher, *args, **kwargs)`` runs the teacher on the student's arguments; by default
            ``teacher(*args, **kwargs)``.
        weight: factor of all terms: a number, a schedule, or a function of (step, epoch).
        stop: when distillation ends.
        split_terms: report every level of a grouped call by its own name. It takes the loss's values per row instead
            of its fused scalar, which costs a little.
        teacher_options: prepare the teacher on the first batch, so that it costs less, see `kdops.TeacherOptions`. It
            is then a copy that is frozen, and the given module stays as it is. None: it runs as it is given.

    Raises:
        TypeError: student, teacher or taps are of the wrong type.
        ValueError: no tap, an unknown layer (with the names near to it), a term's name given twice, student and
            teacher sharing parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Callable[[], nn.Module],
        taps: Sequence[Tap],
        *,
        run_teacher: Callable[..., Any] | None = None,
        weight: float | WeightSchedule | Callable[[int, int], float] = 1.0,
        stop: StopDistillation | None = None,
        split_terms: bool = False,
        teacher_options: TeacherOptions | None = None,
    ) -> None:
        super().__init__()
        check_arguments(student, taps, run_teacher, stop, teacher_options)
        student = unwrap(student)
        self._student = (student,)  # in a tuple, so that it is no sub-module
        self._run_teacher = run_teacher
        self._weight = as_schedule("Distiller", weight)
        self._stop = stop
        self._step = self._epoch = 0
        self._used = False
        self._in_step = False  # parameters equal in all processes
        self._idle = (-1, 0)
        self._optimizers: list[tuple[Optimizer, int]] = []
        self._zero: Tensor | None = None
        self.taps = Comparison(taps, split_terms, like=next(student.parameters(), None))
        for place, _ in self.taps.places:  # before a teacher is loaded, and before any hook is there to be left behind
            find_layer("Distiller: student", student, place)
        self._owns_teacher = True
        places = [place for _, place in self.taps.places]
        self._teacher = hold_teacher("Distiller: teacher", loaded(teacher, student), places, teacher_options)
        self._recorder: Recorder | None = self._record()
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self._student[0]

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network, None once distillation has ended."""
        return self._teacher.network

    @property
    def teacher_report(self) -> TeacherReport | None:
        """What the first batch showed of a teacher that is prepared (``teacher_options``)."""
        return getattr(self._teacher, "report", None)

    @property
    def stopped(self) -> bool:
        """Whether distillation has ended."""
        return self._zero is not None

    @property
    def progress(self) -> tuple[int, int]:
        """Finished optimizer steps and epochs."""
        return self._step, self._epoch

    def loss(self) -> DistillLoss:
        """Run the teacher on what the student was just run on and compare them; once per forward of the student.

        Returns:
            DistillLoss: the total and every term by name. After the end of distillation 0 and no term.

        Raises:
            RuntimeError: the student has not been run since the last call, or was run twice; a tapped layer did not
                run, ran twice or was overwritten in place; its output carries no gradient; widths are not known yet.
            TypeError, ValueError: a layer gave no 4-D map, or maps that do not fit each other; a loss gave no scalar;
                the teacher is on another device.
        """
        return DistillLoss(self._zero) if self.stopped else self._loss()

    @torch._disable_dynamo  # torch.compiler.disable, without importing the compiler together with kdops
    def _loss(self) -> DistillLoss:
        students, (args, kwargs), autocast = self._take()
        first = next(iter(students.values()))
        mode = autocast.get(first.device.type)
        with torch.autocast(first.device.type, mode[1], mode[0]) if mode else contextlib.nullcontext():
            teachers = self._teach(first.device, args, kwargs)
            if self.taps.unknown():
                self._build(students, teachers)
            terms = self.taps(students, teachers, self._factor, self._caller())
        self._used = True
        self._warn_if_idle()
        return DistillLoss(functools.reduce(torch.add, terms.values()), terms)

    def build(self, *args: Any, **kwargs: Any) -> Distiller:
        """Run student and teacher once on a first batch, find the widths of ``align=True`` and check that all fits.

        To be called before the optimizer is made. Both networks run without gradients and in eval mode; the student's
        modes and its statistics stay as they were.

        Args:
            args, kwargs: what the student will be called with.

        Returns:
            The distiller itself.

        Raises: as ``loss()``.
        """
        places = [place for place, _ in self.taps.places]
        students = captured_once("Distiller: student", self.student, places, lambda net: net(*args, **kwargs))
        teachers = self._teach(next(iter(students.values())).device, args, kwargs)
        self.taps.build(students, teachers)
        self.taps.check(students, teachers)
        return self

    def bind(self, optimizer: Optimizer, group: int = 0) -> Distiller:
        """Put the distiller's parameters into a group of the optimizer, where it does not have them yet.

        With an optimizer bound, ``align=True`` may wait for its widths until the first ``loss()``, and the end of
        distillation drops the optimizer's state of align layers and losses.
        """
        self._optimizers.append((optimizer, group))
        self._enroll()
        return self

    def step(self) -> None:
        """Record a finished optimizer step: moves the weight's schedule on, and ends distillation by step."""
        self._step += 1
        self._stop_if_due()

    def set_epoch(self, epoch: int) -> None:
        """Tell the number of finished epochs, at the start of each: schedules by epoch and the end of distillation."""
        self._epoch = epoch
        self._stop_if_due()

    def stop(self) -> None:
        """End distillation: drop hooks, teacher, and the gradients and optimizer state of align layers and losses."""
        if self.stopped:
            return
        parameters = list(self.taps.parameters())
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for optimizer, _ in self._optimizers:
            _optimizer.forget(optimizer, parameters)
        self.close()
        if self._stop is not None and self._stop.callback is not None:
            self._stop.callback(self)

    def close(self) -> None:
        """Take the hooks off the student and let go of the teacher, without touching anything else."""
        self._recorder.remove()
        self._teacher.free()
        self._zero = torch.zeros((), device=getattr(next(self.student.parameters(), None), "device", None))

    def clear(self) -> None:
        """Forget a forward of the student that no loss will be asked for."""
        if not self.stopped:
            self._recorder.clear()

    def check_widths(self) -> None:
        """Raise a RuntimeError while the widths of an align layer are unknown and no optimizer is bound."""
        if self.taps.unknown() and not self._optimizers:
            raise RuntimeError(unknown_widths([self.taps.taps[i].label for i in self.taps.unknown()]))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of align layers and losses; refused while the widths of an align layer are unknown."""
        self.check_widths()
        return super().named_parameters(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """How far training has come: finished steps, finished epochs, whether distillation has ended."""
        return torch.tensor([self._step, self._epoch, int(self.stopped)])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there; ends distillation where it had ended."""
        self._step, self._epoch, stopped = state.tolist()
        if self.stopped and not stopped:
            raise RuntimeError("Distiller: distillation has ended and its teacher is gone; load into a new Distiller")
        if stopped:
            self.stop()
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        if not self.stopped and self._stop is not None and self._stop.due(self._step, self._epoch):
            self.stop()

    def _record(self) -> Recorder:
        recorder = Recorder(self.student, [place for place, _ in self.taps.places])
        weakref.finalize(self, recorder.remove).atexit = False  # a forgotten distiller leaves no hooks
        return recorder

    def _take(self) -> tuple[dict[Place, Tensor], Any, dict[str, tuple[bool, torch.dtype]]]:
        recorder = self._recorder
        try:
            check_passes(recorder.passes, self._used, self.student.training)
            students = recorder.capture.take()
            call, autocast = recorder.call, recorder.autocast
        finally:
            recorder.clear()
        for place, feature in students.items():
            if not feature.requires_grad:
                raise RuntimeError(
                    f"Distiller: the output of student layer '{place}' carries no gradient, so distillation would do "
                    "nothing there: the layer is frozen, or ran without gradients, as inside activation checkpointing "
                    "with use_reentrant=True (use_reentrant=False works)"
                )
        return students, call, autocast

    def _teach(self, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        if self.teacher is None:
            raise RuntimeError("Distiller: the teacher is gone, as distillation has ended in the original of this copy")
        if self._teacher.device not in (None, device):
            raise ValueError(
                f"Distiller: the teacher is on {self._teacher.device}, but the student's maps are on {device}; "
                f"move it with distiller.to('{device}')"
            )
        return self._teacher.run(self._run_teacher or call_directly, args, kwargs)

    def _build(self, students: dict[Place, Tensor], teachers: dict[Place, Tensor]) -> None:
        self.check_widths()
        self.taps.build(students, teachers)
        self._enroll()

    def _enroll(self) -> None:
        for optimizer, group in self._optimizers:
            _optimizer.add_missing(optimizer, list(self.taps.parameters()), group)

    def _factor(self, weight: Callable[[int, int], float]) -> float:
        return weight(self._step, self._epoch) * self._weight(self._step, self._epoch)

    def _caller(self) -> Callable[..., Any]:
        if _average.world_size() == 1:
            return call_directly
        if not self._in_step:
            _average.broadcast(self.taps)
            self._in_step = True
        return _average.Averaged(self.taps)

    def _warn_if_idle(self) -> None:
        """Say so when align layers get gradients, but nothing ever changes them."""
        first = next((p for p in self.taps.parameters() if p.requires_grad), None)
        version, calls = self._idle
        if first is None or calls > _PATIENCE:
            return
        if version not in (-1, first._version):
            calls = _PATIENCE
        elif first.grad is not None and calls == _PATIENCE:
            warnings.warn(
                f"Distiller: {_PATIENCE} losses were computed and no optimizer has changed the align layers and "
                "losses; give distiller.parameters() to the optimizer, or distiller.bind(optimizer)",
                stacklevel=6,  # the caller of loss()
            )
        self._idle = (first._version, calls + 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        if self._owns_teacher and self.teacher is not None:
            self._teacher.apply(fn)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        shared = ("_teacher", "_run_teacher", "_weight", "_stop")
        return copy_sharing(self, memo, shared, _owns_teacher=False)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and optimizers."""
        return {**self.__dict__, "_recorder": None, "_optimizers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hooks on again."""
        super().__setstate__(state)
        if not self.stopped:
            self._recorder = self._record()


def _after_loading(distiller: Distiller, _: Any) -> None:
    """Align layers whose widths came from a checkpoint are for the optimizer, unless distillation has ended."""
    distiller.taps.requires_grad_(not distiller.stopped)
    distiller._enroll()
