"""Ends distillation during a run of mmengine's Runner, and frees its memory."""
from __future__ import annotations

import gc
import logging
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Marks a checkpoint that was written after distillation had ended.
STOPPED_KEY = "kdops_distillation_stopped"


class StopHook(Hook):
    """Ends distillation at an epoch or an iteration; a resumed run stays stopped.

    Subclasses implement `stop_model`, which is called for the runner's model and for the copy of an EMAHook. The model
    is then wrapped by DistributedDataParallel again, so that no bucket contains what was dropped and
    ``find_unused_parameters`` is not needed.

    Args:
        stop_epoch: first epoch (from 0) without distillation.
        detach_epoch: another name for ``stop_epoch``.
        stop_iter: first iteration (from 0) without distillation, for epoch- and iteration-based loops.

    Raises:
        ValueError: not exactly one of the three is given, or it is negative.
        TypeError: it is not an int.
    """

    priority = "LOW"
    #: Whether the buckets of DistributedDataParallel contained what is dropped.
    rewraps = True

    def __init__(
        self, stop_epoch: int | None = None, detach_epoch: int | None = None, stop_iter: int | None = None
    ) -> None:
        given = {"stop_epoch": stop_epoch, "detach_epoch": detach_epoch, "stop_iter": stop_iter}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"{type(self).__name__}: give exactly one of stop_epoch, detach_epoch and stop_iter, got {given}"
            )
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{type(self).__name__}: {name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
        self.stop_epoch = stop_epoch if detach_epoch is None else detach_epoch
        self.stop_iter = stop_iter
        self.stopped = False

    def stop_model(self, model: nn.Module) -> None:
        """End distillation in ``model`` and drop what only distillation needs."""
        raise NotImplementedError

    def before_train(self, runner: Runner) -> None:
        """Raise for a stop that would never happen."""
        if self.stop_epoch is not None and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f"{type(self).__name__}: stop_epoch={self.stop_epoch} never comes under "
                f"{type(runner.train_loop).__name__}, which does not count epochs; give stop_iter"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        if self.stop_epoch is not None and runner.epoch >= self.stop_epoch:
            self.stop(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.stop_iter is not None and runner.iter >= self.stop_iter:
            self.stop(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"][STOPPED_KEY] = self.stopped

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Stop at once when resuming a run that had stopped: its checkpoint has no connectors."""
        if runner._resume and checkpoint.get("meta", {}).get(STOPPED_KEY, False):
            # The loop does not know yet where it will resume.
            self.stop(runner, "Distillation had been stopped when the checkpoint was written, and stays so")

    def stop(self, runner: Runner, message: str | None = None) -> None:
        """End distillation now and log it, with another message if given; does nothing the second time."""
        if self.stopped:
            return
        self.stopped = True
        wrapper = runner.model
        model = wrapper.module if is_model_wrapper(wrapper) else wrapper
        self.stop_model(model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and hasattr(hook, "ema_model"):
                self._stop_average(hook.ema_model)
        if self.rewraps and isinstance(wrapper, DistributedDataParallel):
            runner.model = None
            del wrapper
            gc.collect()  # removes the old reducer's hooks on the parameters
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        forget_logged(runner)
        message = message or f"Distillation has been stopped at iteration {runner.iter}"
        print_log(message, logger=runner.logger, level=logging.INFO)

    def _stop_average(self, average: nn.Module) -> None:
        self.stop_model(average.module)
        # BaseAveragedModel looks its entries up by the names it saw when it was built.
        average.avg_parameters = (
            average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
        )


def forget_logged(runner: Runner) -> None:
    """Remove the last values of the distillation losses, which mmengine would log on as if distillation continued."""
    hub = runner.message_hub
    for name in [name for name in hub.log_scalars if name.startswith("train/distill.")]:
        del hub.log_scalars[name]
        hub._resumed_keys.pop(name, None)  # or a resumed run warns about the missing name


def release_storage(module: nn.Module) -> None:
    """Free the memory of a module's parameters and buffers even if they are referenced elsewhere.

    An optimizer built from the whole model lists the teacher's parameters too. They stay in its groups, empty, so
    that its state dict keeps the shape that a resume expects.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.new_empty(0)
        tensor.grad = None
