"""Distillation in a Hugging Face Trainer: a subclass with one more argument, and the training code stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ._placement import DISTILLERS, AnyDistiller, place_beside_student
from .demo.files import save_checkpoint

__all__ = ["DistillationMixin", "DistillationTrainer", "without_labels"]

#: File in a checkpoint's folder, beside the student's model and the optimizer.
DISTILLER_FILE = "distiller.pt"


def without_labels(teacher: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a teacher on the student's batch without its labels, as ``Distiller(..., run_teacher=without_labels)``.

    A detector of transformers matches queries to labels and computes its loss when it gets labels; a teacher needs
    none, and its classes may be others.

    Args:
        teacher: the teacher.
        args, kwargs: what the student was called with.

    Returns:
        What the teacher returns.
    """
    return teacher(*args, **{k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")})


class DistillationMixin:
    """A `transformers.Trainer` (or a subclass of one's own: ``class Mine(DistillationMixin, MyTrainer)``) that distils.

    It adds the distiller's loss to what ``compute_loss`` gives in training, lets align layers and the losses' own
    parameters join the optimizer's first group, tells the distiller epochs and optimizer steps, and logs the mean of
    every term since the last log as ``distill/<term>``. Checkpoints hold the student as a plain model, as in a run
    without distillation, and the distiller's state in ``distiller.pt``; ``train(resume_from_checkpoint=...)`` goes on
    from both. Gradients are clipped for the model's own parameters only (``max_grad_norm``).

    With mixed precision, ``compute_loss`` runs under autocast as a whole, and so does the teacher.

    Args:
        distiller: a `Distiller` or `ProgressiveDistillation` on the Trainer's model or a part of it.
        args, kwargs: of the Trainer.

    Raises:
        TypeError: ``distiller`` is neither.
        ValueError: its student is no part of the model; the model is replicated by DataParallel.
        FileNotFoundError: the checkpoint to resume from has no ``distiller.pt``.
    """

    def __init__(self, *args: Any, distiller: AnyDistiller, **kwargs: Any) -> None:
        if not isinstance(distiller, DISTILLERS):
            raise TypeError(
                f"{type(self).__name__}: distiller must be a Distiller or a ProgressiveDistillation, "
                f"got {type(distiller).__name__}"
            )
        self.distiller = distiller
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bound: Any = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Progress(distiller))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; a resumed run loads the distiller's state first."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__}: the model must not be replicated by DataParallel, got {self.args.n_gpu} GPUs "
                "in one process; start one process per GPU (torchrun) or show it a single one"
            )
        if not any(module is self.distiller.student for module in self.model.modules()):
            raise ValueError(
                f"{type(self).__name__}: the distiller's student must be the Trainer's model or a part of it, "
                f"got a {type(self.distiller.student).__name__} that is not"
            )
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if folder:
            self._resume(Path(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer and let it have the distiller's parameters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        place_beside_student(self.distiller)
        if self._bound is not optimizer:
            self._bound = optimizer
            self.distiller.bind(optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, in training with the distiller's."""
        arguments = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.distiller.stopped or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, **arguments)
        self.distiller.clear()
        # Accelerate puts autocast inside the model's forward; the distiller takes over what is on around it.
        with self.accelerator.autocast():
            result = super().compute_loss(model, inputs, **arguments)
        added = self.distiller.loss()
        for name, term in added.log.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] = self._counts.get(name, 0) + 1
        more = added.total / self._undivided(num_items_in_batch)
        return (result[0] + more, *result[1:]) if return_outputs else result + more

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the terms' means since the last time, over all processes."""
        if "loss" in logs and self._sums:
            means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update({f"distill/{name}": mean for name, mean in zip(self._sums, means)})
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    def _undivided(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how much the Trainer will not divide, where it takes the loss for one of all accumulated batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def _resume(self, folder: Path) -> None:
        path = folder / DISTILLER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{type(self).__name__}: a checkpoint to resume from must hold {DISTILLER_FILE}, got none in {folder}; "
                "was it written without distillation, or with save_only_model?"
            )
        self.distiller.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that distils. See `DistillationMixin`::

    distiller = Distiller(model, teacher, taps, run_teacher=without_labels)
    trainer = DistillationTrainer(model, args, train_dataset=data, data_collator=collate, distiller=distiller)
    trainer.train()
    """


class _Progress(TrainerCallback):
    """Drives the distiller along, and saves it."""

    def __init__(self, distiller: AnyDistiller) -> None:
        self.distiller = distiller

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A sum of fractions of an epoch, so that a finished one may come out a little short.
        self.distiller.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.distiller.zero_grad()  # the Trainer forgets the gradients of its model only
        self.distiller.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and not args.save_only_model:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_checkpoint(folder / DISTILLER_FILE, self.distiller.state_dict())
