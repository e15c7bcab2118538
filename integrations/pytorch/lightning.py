"""Distillation in a Lightning Trainer: one callback, and the LightningModule stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kdops.distill.checkpoints import CALLBACK_MARK

from ._placement import DISTILLERS, AnyDistiller, place_beside_student

__all__ = ["DistillationCallback"]


class DistillationCallback(Callback):
    """Adds a distiller's loss to what ``training_step`` returns, and drives the distiller along with the Trainer::

        module = MyDetector()  # a LightningModule that trains its part module.model
        taps = [Tap("neck.out.0", loss=CWDLoss(norm="batch"), align=(96, 128))]
        distiller = Distiller(module.model, teacher, taps, stop=StopDistillation(epoch=280))
        Trainer(callbacks=[DistillationCallback(distiller)]).fit(module)

    Align layers and the losses' own parameters join a group of the optimizer that ``configure_optimizers`` returned
    (and so its schedule, its gradient clipping and its state), the distiller's state is in the Trainer's checkpoints
    and is resumed from them, epochs and optimizer steps are told to the distiller, and every term is logged. Neither
    the teacher nor the distiller is a part of the LightningModule: its ``state_dict()`` is that of a run without
    distillation, and ``kdops student-checkpoint`` takes the student out of the Trainer's checkpoints.

    It is for automatic optimization; with manual optimization, call ``distiller.loss()`` in the ``training_step``.

    Args:
        distiller: a `Distiller` or `ProgressiveDistillation` on a part of the LightningModule, or a function that is
            given the LightningModule and returns one, for a student that ``configure_model`` makes.
        group: index of the optimizer's group for the distiller's parameters.
        prefix: what the names of the logged terms begin with; the sum is logged as ``{prefix}total``.

    Raises:
        TypeError: ``distiller`` is neither.
        ValueError: when training starts: the student is no part of the LightningModule.
        RuntimeError: when training starts: the LightningModule optimizes manually.
    """

    def __init__(
        self,
        distiller: AnyDistiller | Callable[[LightningModule], AnyDistiller],
        *,
        group: int = 0,
        prefix: str = "distill/",
    ) -> None:
        if not isinstance(distiller, DISTILLERS) and (isinstance(distiller, nn.Module) or not callable(distiller)):
            raise TypeError(
                "DistillationCallback: distiller must be a Distiller, a ProgressiveDistillation or a function that "
                f"returns one, got {type(distiller).__name__}"
            )
        self._given = distiller
        self.distiller: AnyDistiller | None = distiller if isinstance(distiller, nn.Module) else None
        self.group = group
        self.prefix = prefix
        self._module: LightningModule | None = None
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the LightningModule; its parts may not be there yet."""
        self._module = pl_module

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; Lightning calls it before it makes the optimizers and loads their state."""
        self._made().load_state_dict(state_dict["distiller"])

    def state_dict(self) -> dict[str, Any]:
        """The distiller's state, and the student's name in the LightningModule."""
        if self.distiller is None or self._module is None:
            return {}
        return {CALLBACK_MARK: self._student_name(), "distiller": self.distiller.state_dict()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the optimizer and put the loss behind ``training_step``."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "DistillationCallback: the LightningModule must optimize automatically, got "
                "automatic_optimization=False: add distiller.loss() to the loss in its training_step instead"
            )
        distiller = self._made()
        self._student_name()
        place_beside_student(distiller)
        distiller.bind(trainer.optimizers[0], self.group)
        pl_module.training_step = self._distilled(pl_module, pl_module.training_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count optimizer steps from here."""
        self._seen = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the distiller the epoch, before its first batch is fetched."""
        self.distiller.set_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tell the distiller the epoch where a resumed run has skipped its start."""
        if self.distiller.progress[1] != trainer.current_epoch:
            self.distiller.set_epoch(trainer.current_epoch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tell the distiller a finished optimizer step; with accumulated gradients not every batch is one."""
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.distiller.step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the LightningModule its own ``training_step`` back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the LightningModule its own ``training_step`` back."""
        self._restore(pl_module)

    def _made(self) -> AnyDistiller:
        if self.distiller is None:
            made = self._given(self._module)
            if not isinstance(made, DISTILLERS):
                raise TypeError(
                    "DistillationCallback: the function must return a Distiller or a ProgressiveDistillation, "
                    f"got {type(made).__name__}"
                )
            self.distiller = made
        return self.distiller

    def _student_name(self) -> str:
        student = self.distiller.student
        name = next((name for name, module in self._module.named_modules() if module is student), None)
        if not name:
            what = "no part of it" if name is None else "the LightningModule itself"
            raise ValueError(
                "DistillationCallback: the distiller's student must be a part of the LightningModule, that its "
                f"training_step calls, got a {type(student).__name__} that is {what}"
            )
        return name

    def _distilled(self, pl_module: LightningModule, training_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.distiller.clear()
            output = training_step(*args, **kwargs)
            if output is None or self.distiller.stopped:  # None: this batch is skipped
                self.distiller.clear()
                return output
            added = self.distiller.loss()
            logged = {f"{self.prefix}{name}": value for name, value in added.log.items()}
            pl_module.log_dict({**logged, f"{self.prefix}total": added.total.detach()})
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + added}
            return output + added

        return step

    def _restore(self, pl_module: LightningModule) -> None:
        step = pl_module.__dict__.get("training_step")
        if step is None:
            return
        del pl_module.training_step
        original = step.__wrapped__
        if getattr(original, "__func__", None) is not type(pl_module).training_step:
            pl_module.training_step = original  # it was an attribute before, as torch.compile makes it
