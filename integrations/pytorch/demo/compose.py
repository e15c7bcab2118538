"""A detection set made of real images that ship inside installed packages: handwritten digits on photographs.

The digits are scikit-learn's scans (`load_digits`, 8x8 pixels, 10 classes), the backgrounds are photographs of
scikit-learn and scikit-image that need no download. The same seed gives the same pixels. Training and validation
share neither a scan nor a photograph.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .files import write_json

FORMAT_VERSION = 1

# (package, file inside the package)
TRAIN_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/coins.png"),
)
VAL_PHOTOGRAPHS = (
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/moon.png"),
)
# load_digits orders its scans by writer groups: the tail is written by other hands than the head.
TRAIN_SCANS = slice(0, 1400)
VAL_SCANS = slice(1400, None)
BRIGHTNESS = 0.6  # of the backgrounds


@dataclass(frozen=True)
class Composition:
    """What is drawn. Lengths are in pixels; a digit's height is its 8x8 scan's height after scaling."""

    train_images: int = 480
    val_images: int = 100
    image_size: int = 128
    digits_per_image: tuple[int, int] = (4, 9)
    digit_height: tuple[float, float] = (20.0, 56.0)
    seed: int = 0


def compose(folder: Path, what: Composition) -> dict[str, Any]:
    """Writes the set in COCO format, or finds it there already, and returns its manifest.

    ``folder`` gets ``train/``, ``val/``, ``annotations/instances_{train,val}.json`` and ``manifest.json``. It is made
    under another name and renamed, so an interrupted run leaves no half set. Raises ValueError when ``folder`` holds
    something else.
    """
    folder = Path(folder)
    wanted = _settings(what)
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        if manifest["composition"] == wanted:
            return manifest
        raise ValueError(f"compose: {folder} holds a set made with other settings; remove it or choose another folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"compose: {folder} exists, is not empty and has no manifest.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        digest = hashlib.sha256()
        for split, count, scans, photographs in _splits(what):
            _write_split(temporary, split, count, scans, photographs, what, digest)
        manifest = {"composition": wanted, "sha256": digest.hexdigest()}
        write_json(temporary / "manifest.json", manifest)
        os.chmod(temporary, 0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _settings(what: Composition) -> dict[str, Any]:
    # Through JSON, so that it compares equal to what is read back.
    return json.loads(json.dumps({"format": FORMAT_VERSION, **asdict(what)}))


def _splits(what: Composition):
    scans, labels = _digit_scans()
    for split, count, part, photographs in (
        ("train", what.train_images, TRAIN_SCANS, TRAIN_PHOTOGRAPHS),
        ("val", what.val_images, VAL_SCANS, VAL_PHOTOGRAPHS),
    ):
        yield split, count, (scans[part], labels[part]), [_photograph(*source) for source in photographs]


def _digit_scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255.0 / 16.0)).astype(np.uint8), digits.target


def _photograph(package: str, name: str) -> Image.Image:
    import importlib

    path = Path(importlib.import_module(package).__file__).parent / name
    if not path.exists():
        raise FileNotFoundError(f"compose: {package} ships no {name} here ({path})")
    with Image.open(path) as image:
        return image.convert("RGB")


def _write_split(root: Path, split: str, count: int, scans, photographs, what: Composition, digest) -> None:
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in tqdm(range(count), desc=f"composing {split}", unit="image"):
        # One generator per image: the first images stay the same when more are asked for.
        rng = np.random.default_rng([what.seed, len(split), index])
        pixels, boxes, labels = compose_image(rng, scans, photographs, what)
        name = f"{index:06d}.png"
        Image.fromarray(pixels).save(root / split / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": what.image_size, "height": what.image_size})
        for (x, y, width, height), label in zip(boxes, labels):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        digest.update(pixels.tobytes())
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    digest.update(json.dumps(annotations).encode())
    write_json(root / "annotations" / f"instances_{split}.json", content)


def compose_image(rng: np.random.Generator, scans, photographs, what: Composition):
    """One image: uint8 pixels (H, W, 3), boxes as [x, y, width, height] and the digits' values."""
    canvas = _background(rng, photographs, what.image_size)
    taken, boxes, labels = np.zeros(canvas.shape[:2], dtype=bool), [], []
    for _ in range(int(rng.integers(what.digits_per_image[0], what.digits_per_image[1] + 1))):
        chosen = int(rng.integers(len(scans[0])))
        low, high = np.log(what.digit_height)
        height = int(round(float(np.exp(rng.uniform(low, high)))))
        ink = _ink(scans[0][chosen], height)
        place = _free_place(rng, taken, ink.shape)
        if place is None:
            continue
        y, x = place
        region = (slice(y, y + ink.shape[0]), slice(x, x + ink.shape[1]))
        canvas[region] = _painted(rng, canvas[region], ink)
        taken[region] = True
        boxes.append([x, y, ink.shape[1], ink.shape[0]])
        labels.append(int(scans[1][chosen]))
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes, labels


def _background(rng: np.random.Generator, photographs, size: int) -> np.ndarray:
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.uniform(0.35, 1.0) * min(photograph.size))
    x = int(rng.integers(photograph.width - side + 1))
    y = int(rng.integers(photograph.height - side + 1))
    window = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return BRIGHTNESS * np.asarray(window, dtype=np.float32)


def _ink(scan: np.ndarray, height: int) -> np.ndarray:
    """The scan enlarged to ``height`` and cut to its ink: opacity in [0, 1]."""
    enlarged = np.asarray(Image.fromarray(scan).resize((height, height), Image.Resampling.BICUBIC))
    # Enlarging blurs the 8x8 scan; the steeper edge keeps the strokes crisp.
    opacity = np.clip(enlarged.astype(np.float32) / 127.5 - 0.5, 0.0, 1.0)
    rows, columns = np.where(opacity > 0)
    return opacity[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _free_place(rng: np.random.Generator, taken: np.ndarray, shape: tuple[int, int]):
    for _ in range(20):
        y = int(rng.integers(taken.shape[0] - shape[0] + 1))
        x = int(rng.integers(taken.shape[1] - shape[1] + 1))
        if not taken[y : y + shape[0], x : x + shape[1]].any():
            return y, x
    return None


def _painted(rng: np.random.Generator, under: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Ink of a random light colour; the backgrounds are darkened, so that it shows everywhere."""
    colour = rng.uniform(170, 255, 3).astype(np.float32)
    return under * (1 - ink[..., None]) + colour * ink[..., None]
