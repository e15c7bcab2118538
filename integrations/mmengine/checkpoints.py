"""Checkpoints of a distillation run under mmengine: without the teacher, and of the student alone."""
from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from kdops import student_checkpoint

from .student_config import note_student_config


@HOOKS.register_module()
class KDOpsStudentCheckpointHook(Hook):
    """Leaves the teacher out of every checkpoint, and writes the student alone at the end of training.

    The last file is ``{stem}_student.pth`` beside the last checkpoint. It holds the plain network's keys and ``meta``
    and loads with the student's own config, which is in ``meta`` too, for inferencers that read it from there. With an
    EMAHook it has the averaged weights, as the checkpoint itself has. A run can be resumed from checkpoints without the
    teacher if the config provides the teacher's weights (``teacher_ckpt``).

    Args:
        drop: prefixes of state-dict keys to leave out of every checkpoint.
        write_student: write the student's own file at the end.
    """

    # After EMAHook (NORMAL), which swaps averaged and raw weights, and after CheckpointHook (VERY_LOW).
    priority = "LOWEST"

    def __init__(self, drop: Sequence[str] = ("teacher.",), write_student: bool = True) -> None:
        if isinstance(drop, str):
            raise TypeError(f"KDOpsStudentCheckpointHook: drop must be a list of prefixes, got the string {drop!r}")
        self.drop = tuple(drop)
        self.write_student = write_student

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for entry, wrapper in (("state_dict", ""), ("ema_state_dict", "module.")):
            state = checkpoint.get(entry, {})
            for key in [key for key in state if key.startswith(tuple(wrapper + prefix for prefix in self.drop))]:
                del state[key]
        note_student_config(runner, checkpoint)

    def after_train(self, runner: Runner) -> None:
        if not self.write_student or runner.rank != 0:
            return
        last = runner.message_hub.get_info("last_ckpt") if "last_ckpt" in runner.message_hub.runtime_info else None
        if last is None or not os.path.isfile(last):
            print_log(
                f"kdops: no student checkpoint was written, for there is no last checkpoint on this disk ({last})",
                logger=runner.logger, level=logging.WARNING)
            return
        stem, _ = os.path.splitext(last)
        # The file was written by this run, so its pickle is trusted.
        report = student_checkpoint(last, f"{stem}_student.pth", force=True, allow_pickle=True)
        print_log(f"kdops: {report}", logger=runner.logger, level=logging.INFO)
