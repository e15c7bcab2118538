"""Hooks that drive a KDOpsDistilledDetector through a run of mmengine's Runner."""
from __future__ import annotations

import copy
import logging
from typing import Any

from kdops.integrations.mmengine.stop import StopHook, forget_logged
from kdops.integrations.mmengine.student_config import note_student_config
from mmdet.registry import HOOKS
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from kdops import ProgressiveDistillation

from .detector import KDOpsDistilledDetector


def distilled_detector(owner: str, runner: Runner) -> KDOpsDistilledDetector:
    """The runner's model without its wrapper; raises TypeError if it is no KDOpsDistilledDetector."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, KDOpsDistilledDetector):
        raise TypeError(f"{owner}: the model must be a KDOpsDistilledDetector, got {type(model).__name__}")
    return model


@HOOKS.register_module()
class KDOpsDistillHook(Hook):
    """Reports steps and epochs to the distiller, and separates its state from the student's in checkpoints.

    Weight schedules and progressive teachers need it. ``state_dict`` of every checkpoint then contains only the
    student, exactly as the student's plain config saves it; the distiller's own state is in ``distiller``.

    At the start of the next stage of several teachers (MTPD), the learning rate returns to its initial value, the
    optimizer's momentum is dropped, and the parameter schedulers restart: every stage is a full schedule, so the
    schedulers of the config describe one stage.

    Args:
        restart_schedule: restart the schedule at every stage.

    Raises:
        TypeError: the runner's model is no KDOpsDistilledDetector.
        ValueError: a stage or a schedule is measured in epochs and the loop does not count them.
    """

    # After EMAHook, which swaps averaged and raw weights in checkpoints.
    priority = "LOWEST"

    def __init__(self, restart_schedule: bool = True) -> None:
        self.restart_schedule = restart_schedule

    def before_run(self, runner: Runner) -> None:
        model = distilled_detector("KDOpsDistillHook", runner)
        model.needs_hook = False
        if isinstance(model.distiller, ProgressiveDistillation):
            model.distiller.bind(runner.optim_wrapper.optimizer)
            self._start = _Start(runner)

    def before_train(self, runner: Runner) -> None:
        model = distilled_detector("KDOpsDistillHook", runner)
        if model.in_epochs and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f"KDOpsDistillHook: {', '.join(model.in_epochs)}: epochs never come under "
                f"{type(runner.train_loop).__name__}, which does not count them; give steps"
            )
        # A run that is resumed in a later stage: EMAHook copied the model in the first.
        if getattr(model.distiller, "stage", 0) > 0:
            _averages_follow(runner, model)

    def before_train_epoch(self, runner: Runner) -> None:
        self._follow(runner, lambda distiller: distiller.set_epoch(runner.epoch))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # With gradient accumulation, not every iteration is a step.
        if (runner.iter + 1) % getattr(runner.optim_wrapper, "_accumulative_counts", 1) == 0:
            self._follow(runner, lambda distiller: distiller.step())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state, average = checkpoint["state_dict"], checkpoint.get("ema_state_dict", {})
        own = {key: state.pop(key) for key in list(state) if key.startswith("distiller.")}
        for key in own:
            own[key] = average.pop("module." + key, own[key])  # EMAHook has swapped in the raw values
        checkpoint["distiller"] = {key[len("distiller."):]: value for key, value in own.items()}
        note_student_config(runner, checkpoint)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        own = checkpoint.get("distiller", {})
        checkpoint["state_dict"].update({f"distiller.{key}": value for key, value in own.items()})

    def _follow(self, runner: Runner, advance: Any) -> None:
        model = distilled_detector("KDOpsDistillHook", runner)
        before = getattr(model.distiller, "stage", None)
        advance(model.distiller)
        after = getattr(model.distiller, "stage", None)
        if after == before:
            return
        _averages_follow(runner, model)
        forget_logged(runner)
        if self.restart_schedule and not model.distiller.stopped:
            self._start.restore(runner)
        what = "distillation has ended" if model.distiller.stopped else f"stage {after} of distillation begins"
        print_log(f"kdops: {what} at iteration {runner.iter}", logger=runner.logger, level=logging.INFO)


def _averages_follow(runner: Runner, model: KDOpsDistilledDetector) -> None:
    """Give the averaged models the present stage's align layers; teacher and student are not copied."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, "ema_model"):
            average = hook.ema_model
            twin = average.module
            twin.distiller = copy.deepcopy(model.distiller, {id(model.student): twin.student}).requires_grad_(False)
            average.avg_parameters = twin.state_dict() if average.update_buffers else dict(twin.named_parameters())


class _Start:
    """The schedule as it is before the first step (and before a resume), to restart from."""

    def __init__(self, runner: Runner) -> None:
        self.schedulers = [copy.deepcopy(scheduler.state_dict()) for scheduler in runner.param_schedulers or ()]
        group = runner.optim_wrapper.optimizer.param_groups[0]
        # A warm-up has already set the first values, by factors that are the same for all groups.
        self.factors = {
            name[len("initial_"):]: group[name[len("initial_"):]] / group[name]
            for name in group if name.startswith("initial_") and group[name]
        }

    def restore(self, runner: Runner) -> None:
        optimizer = runner.optim_wrapper.optimizer
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for name, factor in self.factors.items():
                group[name] = group["initial_" + name] * factor
        for scheduler, state in zip(runner.param_schedulers or (), self.schedulers):
            scheduler.load_state_dict(copy.deepcopy(state))


@HOOKS.register_module()
class KDOpsStopHook(StopHook):
    """Ends the distillation of a KDOpsDistilledDetector at an epoch or an iteration.

    Afterwards a step costs as much as the student alone: the teacher is freed, the layers' hooks are removed. Together
    with mmdet's PipelineSwitchHook at the same epoch this is RTMDet's second stage.

    Args:
        stop_epoch: first epoch (from 0) without distillation.
        detach_epoch: another name for ``stop_epoch``.
        stop_iter: first iteration (from 0) without distillation.

    Raises:
        ValueError, TypeError: as `StopHook`; TypeError if the runner's model is no KDOpsDistilledDetector.
    """

    # No bucket of DistributedDataParallel contains the distiller's parameters.
    rewraps = False

    def before_run(self, runner: Runner) -> None:
        distilled_detector("KDOpsStopHook", runner)

    def stop_model(self, model: nn.Module) -> None:
        model.distiller.stop()
