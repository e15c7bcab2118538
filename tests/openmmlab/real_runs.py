"""Runs the trainers' own tools, as processes, on a small data set in COCO's format and layout.

Configs find it where they look for COCO, at data/coco in the folder that the tool is run in.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import cv2
import kdops.integrations
import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from offline import offline

INTEGRATIONS = Path(kdops.integrations.__file__).parent
READMES = Path(__file__).parents[2] / "integrations"
IMAGE_SIZE = (96, 128)
PRINTED = "printed.txt"
TRUSTED = "kdops.integrations.mmengine.trusted_checkpoints"

#: Few images and processes, and a checkpoint and a line in the log as often as possible.
SMALL = {
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "val_dataloader.batch_size": 1,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.logger.interval": 1,
}


def write_coco(folder: Path, train: int = 4, val: int = 1) -> None:
    """Write images of filled rectangles, with boxes, masks and COCO's categories."""
    generator = np.random.default_rng(0)
    categories = [dict(id=number + 1, name=name) for number, name in enumerate(CocoDataset.METAINFO["classes"])]
    for split, count in (("train2017", train), ("val2017", val)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            image = generator.integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
            images.append(dict(id=number, file_name=f"{number}.jpg", height=IMAGE_SIZE[0], width=IMAGE_SIZE[1]))
            for _ in range(3):
                x, y = (int(generator.integers(0, size // 2)) for size in IMAGE_SIZE[::-1])
                w, h = (int(generator.integers(size // 4, size // 2)) for size in IMAGE_SIZE[::-1])
                category = int(generator.integers(0, 80))
                image[y : y + h, x : x + w] = category * 3
                annotations.append(
                    dict(
                        id=len(annotations),
                        image_id=number,
                        category_id=category + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
            cv2.imwrite(str(folder / split / f"{number}.jpg"), image)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )


def tool(folder: Path, package: str, name: str, *arguments: Any, options: Mapping[str, Any] | None = None) -> str:
    """Run ``tools/<name>`` of an installed package in a folder; returns what it printed."""
    script = Path(importlib.util.find_spec(package).origin).parent / ".mim" / "tools" / name
    options = [f"{key}={value}" for key, value in (options or {}).items()]
    return command(folder, script, *arguments, *(["--cfg-options", *options] if options else []))


def command(folder: Path, *arguments: Any) -> str:
    """Run Python with some arguments in a folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "TORCH_HOME": str(folder / "torch")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def train(folder: Path, package: str, config: Any, run: str, options: Mapping[str, Any], *arguments: Any) -> list[dict]:
    """Train by the package's own tool, in folder/run; returns what was logged of each of its steps.

    What the tool printed is in the file PRINTED there: more than its log, which begins with the Runner.
    """
    before = set((folder / run).glob("*/vis_data/scalars.json"))
    output = tool(folder, package, "train.py", config, "--work-dir", run, *arguments, options={**SMALL, **options})
    (folder / run / PRINTED).write_text(output)
    (log,) = set((folder / run).glob("*/vis_data/scalars.json")) - before
    steps = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert steps and all(math.isfinite(value) for step in steps for value in step.values()), steps
    return steps


def assert_tested(folder: Path, package: str, config: Any, weights: str, options: Mapping[str, Any]) -> None:
    """Test by the package's own tool: to the end, from weights that are the config's network's and no more."""
    output = tool(folder, package, "test.py", config, weights, "--work-dir", "tested", options=options)
    assert f"Load checkpoint from {weights}" in output and "Epoch(test) [1/1]" in output, output[-2000:]
    assert "do not match exactly" not in output, "the plain network has other keys"


def options_of_test(config: Any, factor: float) -> dict[str, Any]:
    """The options for a tool that tests: as `SMALL` and `smaller`."""
    small = {name.replace("val", "test"): value for name, value in SMALL.items() if name.startswith("val_dataloader")}
    return {**small, **smaller(config, factor, ("test",))}


def smaller(config: Any, factor: float, splits: Sequence[str] = ("train", "val")) -> dict[str, str]:
    """The options that make a config's images smaller, wherever one of its pipelines has a size."""
    cfg = Config.fromfile(config)
    pipelines = {
        f"{split}_dataloader.dataset.pipeline": cfg[f"{split}_dataloader"].dataset.pipeline for split in splits
    }
    for number, hook in enumerate(cfg.get("custom_hooks", ()) if "train" in splits else ()):
        if "switch_pipeline" in hook:
            pipelines[f"custom_hooks.{number}.switch_pipeline"] = hook.switch_pipeline
    return {
        f"{name}.{number}.{key}": "({},{})".format(*(int(size * factor) for size in transform[key]))
        for name, pipeline in pipelines.items()
        for number, transform in enumerate(pipeline)
        for key in ("img_scale", "scale", "crop_size", "size")
        if key in transform
    }


def terms(step: Mapping[str, float]) -> dict[str, float]:
    """What distillation added to a step's loss, by name."""
    return {name: value for name, value in step.items() if name.startswith("distill.loss")}


def assert_distilled(step: Mapping[str, float], names: Sequence[str]) -> None:
    assert sorted(terms(step)) == sorted(names) and all(value > 0 for value in terms(step).values()), step


def readme_config(folder: Path, integration: str, number: int, name: str) -> Path:
    """Write a block of Python of an integration's README as a config, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (READMES / integration / "README.md").read_text(), re.DOTALL)
    (folder / name).write_text(blocks[number])
    return folder / name


def provide_downloads(folder: Path, config: Any) -> None:
    """Put random weights of the right networks where mmengine keeps what it has downloaded for a config."""
    model = Config.fromfile(config).model
    student = _config_of(model.get("student") or model["architecture"])
    stages = model.get("stages") or [model]
    teachers = [(stage.get("teacher_checkpoint") or stage["teacher_ckpt"], stage["teacher"]) for stage in stages]
    for url, network in [*teachers, *((url, student) for url in _initial_weights(student))]:
        path = folder / "torch" / "hub" / "checkpoints" / Path(urlparse(url).path).name
        if url.startswith("https://"):
            write_weights(path, network)


def write_weights(path: Path, network: Any) -> Path:
    """Write random weights of a network, which is given by its model's config or by the name of a config file."""
    if path.exists():
        return path
    register_all_modules(False)
    torch.manual_seed(0)
    network = _config_of(network)
    with DefaultScope.overwrite_default_scope(network.get("_scope_", "mmdet")):
        model = MODELS.build(offline(network))
        model.init_weights()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), path)
    return path


def _config_of(network: Any) -> Any:
    name = network if isinstance(network, str) else network.get("cfg_path")
    if name is None:
        return network
    return {**get_config(name).model, "_scope_": name.split("::")[0]}


def _initial_weights(model: Any) -> set[str]:
    """The files that the parts of a model's config begin from."""
    if isinstance(model, (list, tuple)):
        return set().union(*map(_initial_weights, model))
    if not isinstance(model, Mapping):
        return set()
    own = {model["checkpoint"]} if model.get("type") == "Pretrained" else set()
    return own.union(*map(_initial_weights, model.values()))
