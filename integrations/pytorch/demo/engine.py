"""Trains one run: epochs, learning rate, distillation, evaluations, checkpoints, and going on where it stopped."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdops import Distiller

from .data import CocoFolder, steps_per_epoch, training_batches
from .distillation import align_layers, make_distiller, make_taps, teacher_options
from .evaluate import evaluate
from .files import save_checkpoint
from .models import DetectorConfig, build_detector
from .plan import Phase, Run
from .settings import AMP_DTYPES, Settings

WARM_UP_SHARE = 0.1
SHOWN_EVERY = 10  # steps between updates of the losses in the progress bar


class Trainer:
    """One run. ``teachers``: trained models by the names of their runs.

    After ``train()``, ``model`` is the trained network, ``aligns`` are its layers to the teacher's width, and
    ``history`` holds ``steps`` (columns over all steps),
    ``epochs`` and ``evaluations`` (one dict each).
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        train_data: CocoFolder,
        val_data: CocoFolder,
        teachers: dict[str, nn.Module],
        checkpoint: Path,
    ):
        self.run, self.settings, self.checkpoint = run, settings, checkpoint
        self.train_data, self.val_data, self.teachers = train_data, val_data, teachers
        self.device = settings.torch_device()
        self.config = DetectorConfig(
            settings.model, run.backbone, run.fpn_channels, len(train_data.class_names) + 1, settings.image_size
        )
        torch.manual_seed(settings.seed)  # the same first weights for every student
        self.model = build_detector(self.config).to(self.device, memory_format=torch.channels_last)
        self.aligns: list[nn.Module] = []  # those of the last phase
        self.history: dict[str, Any] = {
            "steps": {"detection": [], "distillation": [], "lr": []},
            "epochs": [],
            "evaluations": [],
        }

    def train(self, resume: bool) -> Trainer:
        """Trains to the end, from the checkpoint if ``resume`` and there is one."""
        saved = None
        if resume and self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.history = saved["history"]
        first = saved["phase"] if saved else 0
        for number in range(first, len(self.run.phases)):
            _PhaseTrainer(self, number).train(saved if number == first else None)
        return self

    def final(self) -> dict[str, Any]:
        """The figures of the last evaluation."""
        return self.history["evaluations"][-1]


class _PhaseTrainer:
    """One learning-rate schedule of a run, with its own optimizer and distiller."""

    def __init__(self, trainer: Trainer, number: int):
        self.trainer, self.number = trainer, number
        self.settings, self.model = trainer.settings, trainer.model
        self.phase: Phase = trainer.run.phases[number]
        self.epochs_before = sum(phase.epochs for phase in trainer.run.phases[:number])
        self.steps_per_epoch = steps_per_epoch(trainer.train_data, self.settings.batch_size)
        self.steps = self.phase.epochs * self.steps_per_epoch
        self.optimizer = _optimizer(self.model, self.settings)
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=self.settings.amp == "fp16")
        self.distiller = self._distiller()

    def _distiller(self) -> Distiller | None:
        if self.phase.teacher is None:
            return None
        torch.manual_seed(self.settings.seed + 1 + self.number)  # the first weights of the align layers
        taps = make_taps(self.settings)
        self.trainer.aligns = align_layers(taps)
        teacher = self.trainer.teachers[self.phase.teacher]
        options = teacher_options(self.settings)
        return make_distiller(self.model, teacher, taps, self.phase, self.steps, options).bind(self.optimizer)

    def train(self, saved: dict[str, Any] | None) -> None:
        first = 0
        if saved:
            first = saved["epoch"]
            # The distiller goes first: one that has stopped takes its parameters out of the optimizer.
            if self.distiller is not None:
                self.distiller.load_state_dict(saved["distiller"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        for epoch in range(first, self.phase.epochs):
            self._epoch(epoch)
            if epoch == first and self.distiller is not None and self.distiller.teacher_report is not None:
                tqdm.write(str(self.distiller.teacher_report))
            self._evaluate(epoch + 1)
            self._save(epoch + 1)
        if self.distiller is not None and not self.distiller.stopped:
            self.distiller.close()

    def _epoch(self, epoch: int) -> None:
        data, settings, phase = self.trainer.train_data, self.settings, self.phase
        data.mosaic = phase.mosaic and (phase.stop_epoch is None or epoch < phase.stop_epoch)
        if self.distiller is not None:
            self.distiller.set_epoch(epoch)
        total_epoch = self.epochs_before + epoch
        # Seeded per epoch, so that a resumed run draws what the interrupted one would have drawn.
        torch.manual_seed(settings.seed * 100_003 + total_epoch)
        self.model.train()
        stage = self._stage(epoch)
        bar = tqdm(
            training_batches(data, total_epoch, settings.batch_size, settings.workers),
            desc=f"{self.trainer.run.name}, {stage}, epoch {epoch + 1}/{phase.epochs}",
            unit="step",
        )
        losses, rates, busy, start = [], [], 0.0, time.perf_counter()
        for step, batch in enumerate(bar):
            begin = time.perf_counter()
            rates.append(self._set_lr(epoch * self.steps_per_epoch + step))
            losses.append(self._step(*batch))
            busy += time.perf_counter() - begin
            if step % SHOWN_EVERY == 0:
                bar.set_postfix(dict(zip(("detection", "distillation"), losses[-1].tolist())))
        begin = time.perf_counter()
        values = torch.stack(losses).tolist()  # waits for the device, so it belongs to the steps' time
        busy += time.perf_counter() - begin
        if not all(math.isfinite(value) for row in values for value in row):
            raise FloatingPointError(
                f"the losses of {self.trainer.run.name} were not finite in epoch {epoch + 1}; "
                "a lower --lr, or --amp off, may help"
            )
        self._record(stage, epoch, values, rates, busy, time.perf_counter() - start)

    def _step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """One optimizer step; returns the detection loss and the distillation loss, detached."""
        device, dtype = self.trainer.device, AMP_DTYPES.get(self.settings.amp)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: value.to(device, non_blocking=True) for key, value in t.items()} for t in targets]
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            detection = sum(self.model(images, targets).values())
            distillation = detection.new_zeros(()) if self.distiller is None else self.distiller.loss().total
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(detection + distillation).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.distiller is not None:
            self.distiller.step()
        return torch.stack((detection.detach().float(), distillation.detach().float()))

    def _set_lr(self, step: int) -> float:
        warm_up = max(1, round(self.steps * WARM_UP_SHARE))
        progress = max(0, step - warm_up) / max(1, self.steps - warm_up)
        rate = self.settings.lr * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _stage(self, epoch: int) -> str:
        return next(name for name, end in self.phase.stages() if epoch < end)

    def _record(
        self, stage: str, epoch: int, values: list[list[float]], rates: list[float], busy: float, seconds: float
    ) -> None:
        history = self.trainer.history
        detection, distillation = (list(column) for column in zip(*values))
        for name, column in (("detection", detection), ("distillation", distillation), ("lr", rates)):
            history["steps"][name].extend(column)
        history["epochs"].append(
            {
                "phase": self.number,
                "stage": stage,
                "epoch": epoch + 1,
                "detection": sum(detection) / len(detection),
                "distillation": sum(distillation) / len(distillation),
                "step_ms": 1000 * busy / len(values),
                "seconds": seconds,
            }
        )

    def _evaluate(self, done: int) -> None:
        ends = done in [end for _, end in self.phase.stages()]
        if not ends and (self.settings.eval_every == 0 or done % self.settings.eval_every):
            return
        trainer, stage = self.trainer, self._stage(done - 1)
        figures = evaluate(
            self.model,
            trainer.val_data,
            device=trainer.device,
            batch_size=self.settings.batch_size,
            name=trainer.run.name,
        )
        tqdm.write(f"{trainer.run.name}, {stage}, epoch {done}/{self.phase.epochs}: AP {figures['AP']:.1f}")
        where = {"phase": self.number, "stage": stage, "epoch": done, "epochs_trained": self.epochs_before + done}
        trainer.history["evaluations"].append({**where, "stage_ends": ends, **figures})

    def _save(self, done: int) -> None:
        save_checkpoint(
            self.trainer.checkpoint,
            {
                "phase": self.number,
                "epoch": done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "distiller": None if self.distiller is None else self.distiller.state_dict(),
                "history": self.trainer.history,
            },
        )


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases and normalisation parameters do not decay. The first group takes the align layers later."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)
