"""The demo's arguments."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .models import BACKBONES, MODELS

LOSSES = ("cwd", "pkd", "mgd")
RECIPES = ("plain", "rtmdet", "damo", "mtpd")
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What may differ between an interrupted run and the one that resumes it.
FREE_ON_RESUME = ("resume", "workers", "output")


def _option(default: Any, text: str, **how: Any) -> Any:
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Settings:
    """Every field is a command-line option of the same name."""

    model: str = _option("fcos", "detector", choices=MODELS)
    loss: str = _option("cwd", "distillation loss on the FPN outputs", choices=LOSSES)
    recipe: str = _option("plain", "how the student is distilled", choices=RECIPES)
    loss_weight: float | None = _option(None, "weight of the distillation loss (default: by --loss)", type=float)
    tau: float = _option(1.0, "temperature of cwd", type=float)
    backend: str = _option("auto", "kdops backend", choices=("auto", "fused", "reference"))
    teacher_backbone: str = _option("resnet18", "backbone of the teacher", choices=tuple(BACKBONES))
    weak_teacher_backbone: str = _option("slim18", "first teacher of --recipe mtpd", choices=tuple(BACKBONES))
    student_backbone: str = _option("slim10", "backbone of the student", choices=tuple(BACKBONES))
    teacher_channels: int = _option(128, "FPN width of the teacher", type=int)
    student_channels: int = _option(64, "FPN width of the student", type=int)
    epochs: int = _option(8, "epochs of each student", type=int)
    teacher_epochs: int = _option(10, "epochs of each teacher", type=int)
    batch_size: int = _option(8, "images per step", type=int)
    lr: float = _option(1e-3, "peak learning rate of AdamW", type=float)
    weight_decay: float = _option(0.05, "weight decay of AdamW", type=float)
    clip_grad: float = _option(35.0, "largest gradient norm", type=float)
    image_size: int = _option(128, "side of the square input", type=int)
    images: int = _option(480, "training images to compose", type=int)
    val_images: int = _option(100, "validation images to compose", type=int)
    flip: float = _option(0.0, "share of images mirrored (digits must not be)", type=float)
    device: str = _option("auto", "auto takes cuda where it is there")
    amp: str = _option("off", "autocast dtype", choices=("off", "bf16", "fp16"))
    prepare_teacher: str = _option(
        "auto",
        "precision of the prepared teacher; auto: bf16 where the device computes in it; off: as it is",
        choices=("auto", "off", "fp32", "bf16", "fp16"),
    )
    compile_teacher: bool = _option(False, "compile the prepared teacher, which takes seconds", action="store_true")
    seed: int = _option(0, "seed of data, weights and order", type=int)
    workers: int = _option(0, "processes that load data", type=int)
    eval_every: int = _option(2, "epochs between evaluations; 0: only at the end of a stage", type=int)
    data: Path | None = _option(None, "own data in COCO format: train/, val/, annotations/instances_*.json", type=Path)
    output: Path = _option(Path("runs/demo"), "folder for data, checkpoints and report", type=Path)
    resume: bool = _option(False, "go on where the run in --output stopped", action="store_true")

    def __post_init__(self) -> None:
        for name in ("epochs", "teacher_epochs", "batch_size", "image_size", "images", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"--eval-every must not be negative, got {self.eval_every}")
        if self.recipe in ("rtmdet", "damo") and self.epochs < 2:
            raise ValueError(f"--recipe {self.recipe} has two stages and needs --epochs 2 or more, got {self.epochs}")

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def as_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the interrupted one."""
        return {name: value for name, value in self.as_json().items() if name not in FREE_ON_RESUME}


def parse(arguments: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m kdops.integrations.pytorch.demo",
        description="Trains a teacher, a student alone and a distilled student, and reports how they compare.",
    )
    for item in fields(Settings):
        how = dict(item.metadata)
        default = item.default
        if default is MISSING:
            raise TypeError(f"Settings.{item.name} has no default")
        if default is not None and "action" not in how:
            how["help"] += f" (default: {default})"
        parser.add_argument("--" + item.name.replace("_", "-"), default=default, **how)
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
