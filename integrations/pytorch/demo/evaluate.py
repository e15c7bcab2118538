"""Average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import CocoFolder

# Places of COCOeval.stats.
STATISTICS = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}


def evaluate(model: nn.Module, data: CocoFolder, *, device: torch.device, batch_size: int, name: str) -> dict[str, Any]:
    """COCO's figures in percent (None where the set has no such objects), and the AP of every class."""
    found = detect(model, data, range(len(data)), device=device, batch_size=batch_size, name=name)
    return average_precision(data, found)


@torch.inference_mode()
def detect(
    model: nn.Module, data: CocoFolder, indices: Sequence[int], *, device: torch.device, batch_size: int, name: str
) -> list[dict[str, Tensor]]:
    """torchvision's detections of the images at ``indices``, in the pixels of the image files, on the CPU."""
    training = model.training
    model.eval()
    found = []
    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, desc=f"evaluating {name}", unit="batch", leave=False):
        batch = indices[start : start + batch_size]
        for index, detected in zip(batch, model([data[index][0].to(device) for index in batch])):
            detected = {key: value.cpu() for key, value in detected.items()}
            detected["boxes"] = detected["boxes"] / data.scale(index)
            found.append(detected)
    model.train(training)
    return found


def average_precision(data: CocoFolder, detections: list[dict[str, Tensor]]) -> dict[str, Any]:
    """``detections``: one dict per image of ``data`` with boxes (n, 4) x1 y1 x2 y2, labels (n,), scores (n,)."""
    from pycocotools.cocoeval import COCOeval

    if len(detections) != len(data):
        raise ValueError(f"average_precision: {len(data)} images need as many detections, got {len(detections)}")
    results = _coco_results(data, detections)
    if not results:
        return _figures(np.zeros(12), dict.fromkeys(data.class_names, 0.0))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.coco, data.coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: (IoU threshold, recall, class, area, detections per image); -1 marks a class without objects
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {name: _percent(precision[:, :, i].mean()) for i, name in enumerate(data.class_names)}
    return _figures(evaluation.stats, per_class)


def _coco_results(data: CocoFolder, detections: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    results = []
    for image_id, detected in zip(data.image_ids, detections):
        columns = (detected[key].tolist() for key in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(*columns):
            category = data.category_ids[label - 1]
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


def _figures(stats: np.ndarray, per_class: dict[str, Any]) -> dict[str, Any]:
    return {**{name: _percent(stats[place]) for name, place in STATISTICS.items()}, "per_class": per_class}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100.0 * float(value)
