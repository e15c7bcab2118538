"""Hooks for MMRazor's SingleTeacherDistill and FpnTeacherDistill."""
from __future__ import annotations

import logging
from typing import Any

from kdops.integrations.mmengine.stop import StopHook, release_storage
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmrazor.engine import SingleTeacherDistillValLoop
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import DistillDeliveryManager, RecorderManager
from mmrazor.registry import HOOKS
from torch import Tensor, nn


class StoppedTeacher(nn.Module):
    """Replaces the teacher: MMRazor's algorithms still call it, but it computes nothing."""

    def extract_feat(self, batch_inputs: Tensor) -> tuple:
        return ()

    def forward(self, batch_inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> dict:
        return {}


@HOOKS.register_module()
class KDOpsStopDistillHook(StopHook):
    """MMRazor's `StopDistillHook` that also stops the teacher's forward and frees the teacher and the connectors.

    Accepts the spelling of the class (``stop_epoch``) and of the published README (``detach_epoch``), and
    ``stop_iter``. Afterwards a step costs as much as the student alone, and the model's state dict and parameters
    contain only the student; ``find_unused_parameters`` is not needed.

    A teacher that SingleTeacherDistillValLoop validates is kept for it; only its part in training ends. The student
    then computes itself what ``distill_deliveries`` passed to it from the teacher. Any other algorithm, without a
    single teacher and a ConfigurableDistiller, only gets its flag set, as by MMRazor's hook.

    Args:
        stop_epoch: first epoch (from 0) without distillation.
        detach_epoch: another name for ``stop_epoch``.
        stop_iter: first iteration (from 0) without distillation.

    Raises:
        ValueError, TypeError: as `StopHook`; TypeError if the runner's model is no distillation algorithm of MMRazor.
    """

    def stop(self, runner: Runner, message: str | None = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not hasattr(model, "distillation_stopped"):
            raise TypeError(
                f"KDOpsStopDistillHook: the model must be a distillation algorithm of MMRazor, got "
                f"{type(model).__name__} without distillation_stopped"
            )
        if not self.stopped and not _can_be_freed(model):
            self.stopped = model.distillation_stopped = True
            print_log(
                f"kdops: {type(model).__name__} is told that distillation has been stopped; what it holds is not freed",
                logger="current", level=logging.WARNING)
            return
        self._keeps_teacher = isinstance(runner.val_loop, SingleTeacherDistillValLoop)
        if self._keeps_teacher and not self.stopped:
            print_log(
                "kdops: the teacher stays in memory, for SingleTeacherDistillValLoop validates it",
                logger=runner.logger, level=logging.WARNING)
        super().stop(runner, message)

    def stop_model(self, model: nn.Module) -> None:
        model.distillation_stopped = True
        _forget_records(model.distiller)
        # The student would wait for a delivery that no longer comes.
        model.distiller.deliveries = DistillDeliveryManager()
        for parameter in model.distiller.parameters():
            parameter.grad = None
        model.distiller.connectors = nn.ModuleDict()
        model.distiller.distill_losses = nn.ModuleDict()
        if not self._keeps_teacher:
            release_storage(model.teacher)
        model.teacher = StoppedTeacher()


def _can_be_freed(model: Any) -> bool:
    teacher, distiller = getattr(model, "teacher", None), getattr(model, "distiller", None)
    return isinstance(teacher, nn.Module) and isinstance(distiller, ConfigurableDistiller)


def _forget_records(distiller: nn.Module) -> None:
    """Clear MMRazor's recorders, which keep the last step's maps alive, and disable them."""
    for name in ("student_recorders", "teacher_recorders"):
        for recorder in getattr(distiller, name).recorders.values():
            recorder.reset_data_buffer()
        setattr(distiller, name, RecorderManager())


@HOOKS.register_module()
class KDOpsTeacherEvalHook(Hook):
    """Keeps MMRazor's whole teacher in eval mode while the student trains.

    MMRazor puts the teacher's BatchNorm layers in eval and leaves the rest in training mode, so that the drop-path of
    a Swin teacher, or its dropout, adds noise to what the student learns from.
    """

    priority = "LOW"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        # The loop calls model.train() at each epoch and after each validation, which sets this flag again.
        if model.teacher.training:
            model.teacher.eval()
