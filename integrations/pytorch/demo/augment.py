"""Augmentation on uint8 images (H, W, 3) with boxes (n, 4) as x1, y1, x2, y2 in pixels, float32."""

from __future__ import annotations

from typing import Callable

import numpy as np
from PIL import Image

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]  # pixels, boxes, labels


def letterbox(image: Image.Image, size: int) -> tuple[np.ndarray, float]:
    """Scales the longer side to ``size``, pads right and below with grey, and returns the pixels and the scale."""
    scale = size / max(image.size)
    if image.size != (size, size):
        target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = Image.new("RGB", (size, size), (114, 114, 114))
        canvas.paste(image.resize(target, Image.Resampling.BILINEAR))
        image = canvas
    return np.asarray(image), scale


def random_crop_resize(
    rng: np.random.Generator, sample: Sample, size: tuple[int, int], scale: tuple[float, float], visible: float = 0.6
) -> Sample:
    """A window of the image, scaled by a factor drawn from ``scale``, that fills ``size`` (height, width).

    The factor is raised where the image would not cover ``size``. Boxes are cut at the window; those of which less
    than the share ``visible`` is left are dropped.
    """
    pixels, boxes, labels = sample
    height, width = pixels.shape[:2]
    factor = max(float(rng.uniform(*scale)), size[0] / height, size[1] / width)
    window = (size[0] / factor, size[1] / factor)
    y, x = rng.uniform(0, height - window[0] + 1e-6), rng.uniform(0, width - window[1] + 1e-6)
    box = (x, y, min(x + window[1], width), min(y + window[0], height))
    view = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))
    moved = (boxes - np.array([x, y, x, y], dtype=np.float32)) * np.float32(factor)
    cut = np.clip(moved, 0, np.array([size[1], size[0], size[1], size[0]], dtype=np.float32))
    keep = _area(cut) >= visible * _area(moved)
    return view, cut[keep], labels[keep]


def mosaic(rng: np.random.Generator, load: Callable[[int], Sample], indices: list[int], size: int) -> Sample:
    """Four images around a random centre, each as a random window that fills its quarter."""
    if len(indices) != 4:
        raise ValueError(f"mosaic: takes 4 indices, got {len(indices)}")
    centre_y, centre_x = (int(v) for v in rng.uniform(0.3, 0.7, 2) * size)
    canvas = np.empty((size, size, 3), dtype=np.uint8)
    all_boxes, all_labels = [], []
    corners = [(0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)]
    for index, (y, x) in zip(indices, corners):
        quarter = ((size - centre_y) if y else centre_y, (size - centre_x) if x else centre_x)
        pixels, boxes, labels = random_crop_resize(rng, load(index), quarter, (0.5, 1.0))
        canvas[y : y + quarter[0], x : x + quarter[1]] = pixels
        all_boxes.append(boxes + np.array([x, y, x, y], dtype=np.float32))
        all_labels.append(labels)
    return canvas, np.concatenate(all_boxes), np.concatenate(all_labels)


def colour_jitter(rng: np.random.Generator, pixels: np.ndarray, strength: float = 0.3) -> np.ndarray:
    """Gain and offset drawn per channel."""
    gain = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    offset = rng.uniform(-64, 64, 3).astype(np.float32) * strength
    return np.clip(pixels * gain + offset, 0, 255).astype(np.uint8)


def flip(sample: Sample) -> Sample:
    pixels, boxes, labels = sample
    flipped = boxes.copy()
    flipped[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
    return pixels[:, ::-1], flipped, labels


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
