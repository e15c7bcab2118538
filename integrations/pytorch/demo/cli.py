"""`make demo`: data, teacher(s), student alone, distilled student, report."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import page
from .compose import Composition, compose
from .data import CocoFolder
from .engine import Trainer
from .files import write_json
from .models import load_student, save_student
from .plan import plan
from .report import write_report
from .settings import Settings, parse


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    try:
        run(settings)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"demo: {error}")


def run(settings: Settings) -> dict[str, Any]:
    """Trains everything and writes ``report/`` and the checkpoints under ``settings.output``; returns the report."""
    start = time.perf_counter()
    trainers, data = train_all(settings)
    _save_students(settings, trainers)
    report = write_report(settings.output / "report", settings, list(trainers.values()), data)
    _say(settings, report, time.perf_counter() - start)
    return report


def train_all(settings: Settings) -> tuple[dict[str, Trainer], dict[str, Any]]:
    """The trained runs by name, in their order, and a description of the data."""
    _prepare_output(settings)
    train_data, val_data, data = _data(settings)
    trainers: dict[str, Trainer] = {}
    for planned in plan(settings):
        teachers = {name: trainer.model for name, trainer in trainers.items()}
        checkpoint = settings.output / "checkpoints" / f"{planned.name}.pt"
        trainer = Trainer(planned, settings, train_data, val_data, teachers, checkpoint)
        trainers[planned.name] = trainer.train(settings.resume)
    return trainers, data


def _prepare_output(settings: Settings) -> None:
    path, checkpoints = settings.output / "settings.json", settings.output / "checkpoints"
    if settings.resume and path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        fixed = settings.fixed()
        changed = [f"{name} {stored.get(name)} -> {fixed[name]}" for name in fixed if stored.get(name) != fixed[name]]
        if changed:
            raise ValueError(f"--resume needs the settings of the run in {settings.output}: {', '.join(changed)}")
        return
    # What an earlier run left here must not be taken for this one's.
    for old in checkpoints.glob("*.pt"):
        old.unlink()
    write_json(path, settings.fixed())


def _data(settings: Settings) -> tuple[CocoFolder, CocoFolder, dict[str, Any]]:
    folder, described = settings.data, {"source": str(settings.data)}
    if folder is None:
        what = Composition(settings.images, settings.val_images, settings.image_size, seed=settings.seed)
        name = f"digits-{what.image_size}px-{what.train_images}-{what.val_images}-seed{what.seed}"
        folder = settings.output / "data" / name
        described = {"source": "composed of digit scans and photographs of installed packages", **compose(folder, what)}
    train = CocoFolder(folder, "train", settings.image_size, augment=True, seed=settings.seed, flip_share=settings.flip)
    val = CocoFolder(folder, "val", settings.image_size, augment=False)
    if train.category_ids != val.category_ids:
        raise ValueError(f"{folder}: the categories of train and val differ")
    for name, split in (("train", train), ("val", val)):
        described[name] = {"images": len(split), "objects": len(split.coco.anns)}
    return train, val, {**described, "classes": train.class_names}


def _save_students(settings: Settings, trainers: dict[str, Trainer]) -> None:
    for name in ("student", "distilled"):
        trainer = trainers[name]
        path = settings.output / f"{name}.pt"
        meta = {"run": name, "classes": trainer.val_data.class_names, "AP": trainer.final()["AP"]}
        save_student(path, trainer.model, trainer.config, meta)
        load_student(path)  # raises where the file does not fit the plain torchvision model


def _say(settings: Settings, report: dict[str, Any], seconds: float) -> None:
    tqdm.write("\n" + page.table_text(report) + "\n")
    tqdm.write(report["summary"])
    tqdm.write(f"{seconds / 60:.1f} minutes. Report: {_absolute(settings, 'report/index.html')}")
    tqdm.write(f"Student without teacher: {_absolute(settings, 'distilled.pt')}")


def _absolute(settings: Settings, name: str) -> Path:
    return (settings.output / name).resolve()
