"""Puts the report folder together: report.json, the pictures and the index page."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import nms
from tqdm import tqdm

from . import figures, page
from .attention import agreement, level_maps
from .engine import Trainer
from .evaluate import detect
from .files import write_json, write_text
from .models import FPN_STRIDES, forward_gflops, parameter_count
from .settings import Settings

PACKAGES = ("kdops", "torch", "torchvision", "pycocotools", "numpy", "scikit-learn", "scikit-image", "pillow")
SHOWN_IMAGES = 6
SHOWN_SCORE = 0.3
SHOWN_OVERLAP = 0.5
SHOWN_CHANNELS = 5
SHOWN_LEVEL = 0


def write_report(folder: Path, settings: Settings, trainers: list[Trainer], data: dict[str, Any]) -> dict[str, Any]:
    """Writes the folder and returns the content of its report.json; the index page comes last."""
    runs = {trainer.run.name: trainer for trainer in trainers}
    report = {
        "summary": summary(runs),
        "settings": settings.as_json(),
        "versions": versions(settings.torch_device()),
        "data": data,
        "runs": {name: run_figures(trainer) for name, trainer in runs.items()},
        "pictures": [],
    }
    pictures = _Pictures(folder, settings, runs)
    for draw in tqdm((pictures.curves, pictures.detections, pictures.attention, pictures.channels), desc="pictures"):
        report["pictures"].append(draw())
    report["attention_agreement"] = pictures.agreement
    write_json(folder / "report.json", report)
    write_text(folder / "index.html", page.render(report))
    return report


def summary(runs: dict[str, Trainer]) -> str:
    teacher, alone, distilled = (runs[name].final()["AP"] for name in ("teacher", "student", "distilled"))
    return (
        f"Teacher {teacher:.1f} AP, student alone {alone:.1f} AP, student distilled {distilled:.1f} AP "
        f"({distilled - alone:+.1f}). One run from one seed: a small difference may be chance."
    )


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({_processor()})"
    found["threads"] = str(torch.get_num_threads())
    return found


def run_figures(trainer: Trainer) -> dict[str, Any]:
    """Everything that report.json says about one run."""
    history, image_size = trainer.history, trainer.settings.image_size
    return {
        "role": trainer.run.role,
        "backbone": trainer.run.backbone,
        "fpn_channels": trainer.run.fpn_channels,
        "parameters": parameter_count(trainer.model),
        "gflop_per_image": forward_gflops(trainer.model, image_size),
        "phases": [asdict(phase) for phase in trainer.run.phases],
        "final": trainer.final(),
        "stages": _stages(history),
        "training_seconds": sum(epoch["seconds"] for epoch in history["epochs"]),
        **history,
    }


def _stages(history: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per stage: its epochs, its median time per step, and the AP at its end."""
    stages = []
    for evaluation in history["evaluations"]:
        if not evaluation["stage_ends"]:
            continue
        key = ("phase", "stage")
        epochs = [e for e in history["epochs"] if all(e[k] == evaluation[k] for k in key)]
        step_ms = float(np.median([e["step_ms"] for e in epochs]))
        stages.append(
            {
                "stage": evaluation["stage"],
                "epochs": len(epochs),
                "step_ms": step_ms,
                "distillation": epochs[-1]["distillation"],
                "AP": evaluation["AP"],
            }
        )
    return stages


class _Pictures:
    """Draws into ``folder``; every method returns the picture's file name and caption."""

    def __init__(self, folder: Path, settings: Settings, runs: dict[str, Trainer]):
        self.folder, self.settings, self.runs = folder, settings, runs
        self.data = val_data = runs["distilled"].val_data
        self.device = settings.torch_device()
        self.shown = np.linspace(0, len(val_data) - 1, min(SHOWN_IMAGES, len(val_data))).astype(int).tolist()
        self.images = [val_data.load(index)[0] for index in self.shown]
        self.maps = {
            figures.label_of(name): level_maps(runs[name].model, val_data, self.shown, self.device)
            for name in ("teacher", "student", "distilled")
        }
        teacher = self.maps["teacher"][SHOWN_LEVEL]
        self.agreement = {
            name: agreement(teacher, maps[SHOWN_LEVEL]) for name, maps in self.maps.items() if name != "teacher"
        }

    def curves(self) -> dict[str, str]:
        histories = {name: trainer.history for name, trainer in self.runs.items()}
        return self._save("curves.png", figures.curves(histories), "Losses and AP over the training.")

    def detections(self) -> dict[str, str]:
        rows = {"ground truth": [self._truth(index) for index in self.shown]}
        for name, trainer in self.runs.items():
            rows[figures.label_of(name)] = self._detections(trainer)
        figure = figures.detections(self.images, rows, self.data.class_names, SHOWN_SCORE)
        text = f"Detections with a score of at least {100 * SHOWN_SCORE:g} %, the surest class of every place."
        return self._save("detections.png", figure, text)

    def attention(self) -> dict[str, str]:
        figure = figures.mean_attention(self.images, self.maps, SHOWN_LEVEL, FPN_STRIDES[SHOWN_LEVEL])
        values = ", ".join(f"{name} {value:.2f}" for name, value in self.agreement.items())
        text = f"Mean channel attention of the networks. Correlation with the teacher's over these images: {values}."
        return self._save("attention.png", figure, text)

    def channels(self) -> dict[str, str]:
        distilled = self.runs["distilled"]
        aligned = level_maps(distilled.model, self.data, self.shown, self.device, distilled.aligns)[SHOWN_LEVEL]
        teacher = self.maps["teacher"][SHOWN_LEVEL]
        channels = figures.sharpest_channels(teacher, 0, SHOWN_CHANNELS)
        titles = ("teacher", "student distilled,\naligned")
        figure = figures.channel_attention(self.images[0], teacher, aligned, 0, channels, titles)
        text = "Attention of single channels: the teacher's sharpest ones on one image, and the same channels of the "
        return self._save("channels.png", figure, text + "distilled student behind its 1x1 align layer.")

    def _save(self, name: str, figure, caption: str) -> dict[str, str]:
        figures.save(figure, self.folder / name)
        return {"file": name, "caption": caption}

    def _truth(self, index: int) -> dict[str, torch.Tensor]:
        _, target = self.data[index]
        return target

    def _detections(self, trainer: Trainer) -> list[dict[str, torch.Tensor]]:
        found = detect(trainer.model, self.data, self.shown, device=self.device, batch_size=8, name="pictures")
        return [self._best(index, detected) for index, detected in zip(self.shown, found)]

    def _best(self, index: int, detected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # torchvision suppresses per class only: for the eye, the surest class of a place is enough.
        keep = nms(detected["boxes"], detected["scores"], SHOWN_OVERLAP)
        detected = {key: value[keep] for key, value in detected.items()}
        # Back to the pixels of the letterboxed images that are shown.
        return {**detected, "boxes": detected["boxes"] * self.data.scale(index)}


def _processor() -> str:
    return platform.processor() or platform.machine()
