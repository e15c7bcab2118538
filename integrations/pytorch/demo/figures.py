"""The report's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kdops.files import write_atomically

from .attention import LevelMaps

COLOURS = {"teacher": "#555555", "weak_teacher": "#aaaaaa", "student": "#d1495b", "distilled": "#00798c"}
DPI = 110


def save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI, facecolor="white"))


def label_of(name: str) -> str:
    return {"student": "student alone", "distilled": "student distilled"}.get(name, name.replace("_", " "))


def curves(histories: dict[str, dict[str, Any]]) -> Figure:
    """Detection loss, distillation loss and AP of all runs over their training."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    detection, distillation, precision = figure.subplots(1, 3)
    for name, history in histories.items():
        style = {"color": COLOURS.get(name), "label": label_of(name)}
        _curve(detection, history["steps"]["detection"], style)
        if any(history["steps"]["distillation"]):
            _curve(distillation, history["steps"]["distillation"], style)
        points = [(e["epochs_trained"], e["AP"]) for e in history["evaluations"]]
        precision.plot(*zip(*points), marker="o", **style)
        for end in [e["epochs_trained"] for e in history["evaluations"] if e["stage_ends"]][:-1]:
            precision.axvline(end, color=style["color"], linestyle=":", linewidth=1)
    for axes, title, unit in (
        (detection, "detection loss", "step"),
        (distillation, "distillation loss", "step"),
        (precision, "AP on the validation images", "epoch"),
    ):
        axes.set(title=title, xlabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    precision.set_ylim(bottom=0)
    return figure


def detections(
    images: list[np.ndarray], rows: dict[str, list[dict[str, Tensor]]], class_names: list[str], threshold: float
) -> Figure:
    """One row per entry of ``rows`` (ground truth has no scores), one column per image."""
    figure = Figure(figsize=(2.6 * len(images), 2.75 * len(rows)), layout="constrained")
    grid = np.atleast_2d(figure.subplots(len(rows), len(images), squeeze=False))
    for line, (title, found) in zip(grid, rows.items()):
        for axes, image, boxes in zip(line, images, found):
            axes.imshow(image)
            _hide_ticks(axes)
            _draw_boxes(axes, boxes, class_names, threshold)
        line[0].set_ylabel(title, fontsize=12)
    return figure


def mean_attention(images: list[np.ndarray], maps: dict[str, list[LevelMaps]], level: int, stride: int) -> Figure:
    """The mean channel attention of one level over the images, one row per network."""
    figure = Figure(figsize=(2.6 * len(images), 2.75 * (1 + len(maps))), layout="constrained")
    grid = figure.subplots(1 + len(maps), len(images), squeeze=False)
    for axes, image in zip(grid[0], images):
        axes.imshow(image)
    for line, (title, levels) in zip(grid[1:], maps.items()):
        for axes, image, attention in zip(line, images, levels[level].mean_attention):
            _overlay(axes, image, attention.numpy())
        line[0].set_ylabel(title, fontsize=12)
    for axes in grid.flat:
        _hide_ticks(axes)
    figure.suptitle(f"mean over the channels of softmax(normalised FPN output), stride {stride}", fontsize=12)
    return figure


def channel_attention(
    image: np.ndarray, teacher: LevelMaps, student: LevelMaps, which: int, channels: list[int], titles: tuple[str, str]
) -> Figure:
    """Single channels of the teacher, and the same channels of the student behind its align layer."""
    figure = Figure(figsize=(2.2 * (1 + len(channels)), 4.9), layout="constrained")
    grid = figure.subplots(2, 1 + len(channels), squeeze=False)
    for line, maps, title in zip(grid, (teacher, student), titles):
        line[0].imshow(image)
        line[0].set_ylabel(title, fontsize=12)
        for axes, channel in zip(line[1:], channels):
            _overlay(axes, image, maps.attention[which, channel].numpy())
            axes.set_title(f"channel {channel}", fontsize=10)
    for axes in grid.flat:
        _hide_ticks(axes)
    return figure


def sharpest_channels(maps: LevelMaps, which: int, count: int) -> list[int]:
    """The channels whose attention on one image is the least spread out."""
    attention = maps.attention[which].flatten(1)
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(dim=1)
    return torch.argsort(entropy)[:count].tolist()


def _curve(axes, values: list[float], style: dict[str, Any]) -> None:
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
    window = max(1, len(values) // 40)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, **style)
    # The first steps' losses are far above the rest and would flatten the picture.
    axes.set_ylim(0, max(axes.get_ylim()[1] if axes.lines[2:] else 0, 1.3 * float(smooth[len(smooth) // 20])))


def _draw_boxes(axes, found: dict[str, Tensor], class_names: list[str], threshold: float) -> None:
    truth = "scores" not in found
    scores = torch.ones(len(found["labels"])) if truth else found["scores"]
    for (x1, y1, x2, y2), label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), scores.tolist()):
        if score < threshold:
            continue
        colour = "#ffffff" if truth else f"C{label % 10}"
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        text = class_names[label - 1] + ("" if truth else f" {100 * score:.0f}")
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
        # Above the box, or inside it where the picture ends.
        above = "bottom" if y1 > 0.06 * axes.get_ylim()[0] else "top"
        axes.text(x1, y1, text, fontsize=7, color="black" if truth else "white", bbox=box, va=above, clip_on=True)


def _overlay(axes, image: np.ndarray, attention: np.ndarray) -> None:
    grey = np.repeat(image.mean(axis=2, keepdims=True) / 255.0, 3, axis=2)
    axes.imshow(0.6 * grey + 0.2)
    # A few positions hold most of the mass: the colours end at a high percentile, not at the peak.
    axes.imshow(
        attention,
        extent=(0, image.shape[1], image.shape[0], 0),
        cmap="inferno",
        alpha=0.65,
        interpolation="bilinear",
        vmin=float(np.percentile(attention, 5)),
        vmax=float(np.percentile(attention, 99.5)) + 1e-12,
    )


def _hide_ticks(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
