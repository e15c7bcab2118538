"""What is trained, in which order: the recipes as data."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Settings

# Epochs without distillation at the end, of all epochs: 20 of 300 for RTMDet, 16 of 300 for DAMO-YOLO.
FINE_TUNE_SHARE = {"rtmdet": 20 / 300, "damo": 16 / 300}


@dataclass(frozen=True)
class Phase:
    """One learning-rate schedule from warm-up to zero.

    ``teacher``: the run whose model teaches, or None. ``stop_epoch``: distillation and mosaic end before this epoch
    (the first is 0); None: they last. ``weight``: the course of the distillation weight, ``"constant"`` or
    ``"cosine"``.
    """

    name: str
    epochs: int
    teacher: str | None = None
    mosaic: bool = False
    stop_epoch: int | None = None
    weight: str = "constant"

    def stages(self) -> list[tuple[str, int]]:
        """(name, number of epochs after which it ends)."""
        if self.stop_epoch is None:
            return [(self.name, self.epochs)]
        return [(self.name, self.stop_epoch), ("fine-tune", self.epochs)]


@dataclass(frozen=True)
class Run:
    """One network trained from random weights through its phases."""

    name: str
    role: str  # "teacher" or "student"
    backbone: str
    fpn_channels: int
    phases: tuple[Phase, ...]


def plan(settings: Settings) -> list[Run]:
    """The runs in order. Student alone and distilled student get the same epochs, schedules, data and first weights."""
    teachers = _teachers(settings)
    alone = tuple(_student_phase(settings, None, number) for number, _ in enumerate(teachers))
    distilled = tuple(_student_phase(settings, teacher.name, number) for number, teacher in enumerate(teachers))
    student = ("student", settings.student_backbone, settings.student_channels)
    return [*teachers, Run("student", *student, alone), Run("distilled", *student, distilled)]


def _teachers(settings: Settings) -> list[Run]:
    phase = (Phase("train", settings.teacher_epochs),)
    strong = Run("teacher", "teacher", settings.teacher_backbone, settings.teacher_channels, phase)
    if settings.recipe != "mtpd":
        return [strong]
    weak = Run("weak_teacher", "teacher", settings.weak_teacher_backbone, settings.teacher_channels, phase)
    return [weak, strong]


def _student_phase(settings: Settings, teacher: str | None, number: int) -> Phase:
    epochs = settings.epochs
    if settings.recipe == "mtpd":
        verb = f"distil from {teacher}" if teacher else "train"
        return Phase(f"stage {number + 1}: {verb}", epochs, teacher)
    if settings.recipe == "plain":
        return Phase("distil" if teacher else "train", epochs, teacher)
    stop = epochs - max(1, round(epochs * FINE_TUNE_SHARE[settings.recipe]))
    weight = "cosine" if settings.recipe == "damo" else "constant"
    name = "distil on mosaic" if teacher else "train on mosaic"
    return Phase(name, epochs, teacher, mosaic=True, stop_epoch=stop, weight=weight)
