"""A folder in COCO format as training and validation data.

The layout of ``--data``:

    <folder>/train/*.jpg|png   <folder>/annotations/instances_train.json
    <folder>/val/*.jpg|png     <folder>/annotations/instances_val.json

COCO's own names (``train2017``, ``instances_train2017.json``, ...) are found too.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Sample, colour_jitter, flip, letterbox, mosaic, random_crop_resize

CACHE_BYTES = 2**30  # decoded images are kept in memory up to here


class CocoFolder(Dataset):
    """One split. Images are letterboxed to ``image_size``; with ``augment`` they are varied, the same way each time
    for the same (seed, epoch, index), so that a resumed run sees what the interrupted one would have seen."""

    def __init__(self, root: Path, split: str, image_size: int, *, augment: bool, seed: int = 0, flip_share: float = 0):
        self.folder, self.annotation_file = _find_split(Path(root), split)
        self.coco = _read_coco(self.annotation_file)
        self.image_size, self.augment, self.seed, self.flip_share = image_size, augment, seed, flip_share
        self.epoch, self.mosaic = 0, False
        self.category_ids = sorted(self.coco.getCatIds())
        self._label_of = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self.image_ids = sorted(self.coco.getImgIds())
        if not self.coco.anns:
            raise ValueError(f"{self.annotation_file} holds no objects")
        self._keep = len(self.image_ids) * image_size**2 * 3 <= CACHE_BYTES
        self._cache: dict[int, Sample] = {}

    @property
    def class_names(self) -> list[str]:
        return [self.coco.cats[category]["name"] for category in self.category_ids]

    def __len__(self) -> int:
        return len(self.image_ids)

    def scale(self, index: int) -> float:
        """Letterboxed pixels per pixel of the image file."""
        info = self.coco.imgs[self.image_ids[index]]
        return self.image_size / max(info["width"], info["height"])

    def load(self, index: int) -> Sample:
        """The letterboxed image without augmentation."""
        if index not in self._cache:
            sample = self._read(index)
            if not self._keep:
                return sample
            self._cache[index] = sample
        return self._cache[index]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, boxes, labels = self._augmented(index) if self.augment else self.load(index)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
        target = {"boxes": torch.from_numpy(boxes.reshape(-1, 4)), "labels": torch.from_numpy(labels)}
        return image, target

    def _augmented(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        size = self.image_size
        if self.mosaic:
            others = [int(other) for other in rng.integers(len(self), size=3)]
            sample = mosaic(rng, self.load, [index, *others], size)
        else:
            sample = random_crop_resize(rng, self.load(index), (size, size), (1.0, 1.4))
        if rng.uniform() < self.flip_share:
            sample = flip(sample)
        return (colour_jitter(rng, sample[0]), *sample[1:])

    def _read(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        with Image.open(self.folder / self.coco.imgs[image_id]["file_name"]) as image:
            pixels, scale = letterbox(image.convert("RGB"), self.image_size)
        boxes, labels = [], []
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, width, height = annotation["bbox"]
            if annotation.get("iscrowd", 0) or width <= 0 or height <= 0:
                continue
            boxes.append([x, y, x + width, y + height])
            labels.append(self._label_of[annotation["category_id"]])
        scaled = np.asarray(boxes, dtype=np.float32).reshape(-1, 4) * np.float32(scale)
        return pixels, scaled, np.asarray(labels, dtype=np.int64)


def training_batches(data: CocoFolder, epoch: int, batch_size: int, workers: int) -> DataLoader:
    """The batches of one epoch; their order depends on the data's seed and the epoch only."""
    data.epoch = epoch
    order = np.random.default_rng([data.seed, epoch]).permutation(len(data)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()  # a short batch would count its images more than the others
    return DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=_collate)


def steps_per_epoch(data: CocoFolder, batch_size: int) -> int:
    return max(1, len(data) // batch_size)


def _collate(samples):
    images, targets = zip(*samples)
    return list(images), list(targets)


def _find_split(root: Path, split: str) -> tuple[Path, Path]:
    tried = []
    for name in (split, f"{split}2017"):
        folder, annotations = root / name, root / "annotations" / f"instances_{name}.json"
        if folder.is_dir() and annotations.is_file():
            return folder, annotations
        tried.append(f"{folder} with {annotations}")
    raise FileNotFoundError(f"no {split} data: looked for {' and for '.join(tried)}")


def _read_coco(path: Path):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))
