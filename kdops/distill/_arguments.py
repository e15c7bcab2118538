"""What a Distiller refuses, and in which words."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdops.distill.schedules import StopDistillation
from kdops.distill.taps import Tap
from kdops.distill.teacher_options import TeacherOptions

__all__ = ["check_arguments", "check_passes", "loaded", "unknown_widths"]


def check_arguments(student: Any, taps: Any, run_teacher: Any, stop: Any, teacher_options: Any = None) -> None:
    """Types and names of a Distiller's arguments."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"Distiller: student must be a module, got {type(student).__name__}")
    if not isinstance(taps, (list, tuple)) or not all(isinstance(tap, Tap) for tap in taps):
        raise TypeError(f"Distiller: taps must be a list of Tap, got {type(taps).__name__}: {taps!r}")
    if not taps:
        raise ValueError("Distiller: taps must name at least one pair of layers, got an empty list")
    labels = [tap.label for tap in taps]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"Distiller: every tap needs its own name, got {twice} more than once; give Tap(name=...)")
    if run_teacher is not None and not callable(run_teacher):
        raise TypeError(f"Distiller: run_teacher must be a function, got {type(run_teacher).__name__}")
    if stop is not None and not isinstance(stop, StopDistillation):
        raise TypeError(f"Distiller: stop must be a StopDistillation, got {type(stop).__name__}")
    if teacher_options is not None and not isinstance(teacher_options, TeacherOptions):
        raise TypeError(f"Distiller: teacher_options must be TeacherOptions, got {type(teacher_options).__name__}")


def loaded(teacher: Any, student: nn.Module) -> nn.Module:
    """The teacher itself, called for and moved to the student if it came as a function."""
    like = next(student.parameters(), None)
    if not isinstance(teacher, nn.Module) and callable(teacher):
        teacher = teacher()
        if isinstance(teacher, nn.Module) and like is not None:
            teacher = teacher.to(like.device)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"Distiller: teacher must be a module or return one, got {type(teacher).__name__}")
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError("Distiller: student and teacher must not share parameters, got networks that do")
    return teacher


def check_passes(passes: int, used: bool, training: bool) -> None:
    """The student must have been run once since the last loss."""
    if passes == 1:
        return
    if passes > 1:
        raise RuntimeError(
            f"Distiller.loss: the student was run {passes} times since the last loss; ask for the loss after each "
            "forward, or call distiller.clear() after one that needs none"
        )
    if used and training:
        raise RuntimeError(
            "Distiller.loss: asked for twice after one forward of the student; keep the result of the first call"
        )
    raise RuntimeError(
        "Distiller.loss: the student has not been run: call it as a module (not its forward), in training mode, with "
        f"gradients enabled; got student.training={training} and no such forward"
    )


def unknown_widths(names: list[str]) -> str:
    """The text for align layers that cannot be made yet."""
    listed = ", ".join(f"'{name}'" for name in names)
    return (
        f"Distiller: the widths of the align layers of {listed} are not known, and no optimizer would train them: "
        "give align=(student_width, teacher_width), or call distiller.build(first_batch) before the optimizer is "
        "made, or distiller.bind(optimizer) after it"
    )
