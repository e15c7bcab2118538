"""RTMDet distilled by mmdet's own tools on a small COCO-format set, to a checkpoint that the plain config tests."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from kdops.integrations.pytorch.demo.compose import Composition, compose
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import save_checkpoint

TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"

# The student's plain config: mmdet's RTMDet-tiny on the digits, small images, one short epoch after the other.
PLAIN = """
_base_ = "mmdet::rtmdet/rtmdet_{size}_8xb32-300e_coco.py"
metainfo = dict(classes=tuple("0123456789"))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
resize = dict(type="Resize", scale=(128, 128), keep_ratio=False)
train = [*load, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test = [*load, resize, dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape",
                                                            "scale_factor"))]

split = dict(_delete_=True, type="CocoDataset", data_root="{data}", metainfo=metainfo)
train_set = dict(**split, ann_file="annotations/instances_train.json", data_prefix=dict(img="train/"), pipeline=train)
val_set = dict(**split, ann_file="annotations/instances_val.json", data_prefix=dict(img="val/"), pipeline=test)

train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False,
                        dataset=train_set)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=val_set)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{data}/annotations/instances_val.json")
test_evaluator = val_evaluator
model = dict(backbone=dict(init_cfg=None, norm_cfg=dict(type="BN")), neck=dict(norm_cfg=dict(type="BN")),
             bbox_head=dict(num_classes=10, norm_cfg=dict(type="BN")))
train_cfg = dict(max_epochs=3, val_interval=3, dynamic_intervals=None)
param_scheduler = []
custom_hooks = [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.1, update_buffers=True, priority=49)]
"""

DISTILLED = """
_base_ = "./plain_tiny.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])
model = dict(
    _delete_=True, type="KDOpsDistilledDetector", student=_base_.model, teacher="{folder}/plain_s.py",
    teacher_checkpoint="{folder}/teacher.pth",
    taps=[dict(student=f"neck.out_convs.{{i}}.conv", loss=dict(type="kdops.CWDLoss", norm="batch"), align=(96, 128),
               name=f"fpn{{i}}") for i in range(3)])
custom_hooks = [*_base_.custom_hooks, dict(type="KDOpsDistillHook"), dict(type="KDOpsStopHook", stop_epoch=2),
                dict(type="KDOpsStudentCheckpointHook")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtmdet")
    compose(folder / "digits", Composition(train_images=40, val_images=8, image_size=128))
    for size in ("tiny", "s"):
        (folder / f"plain_{size}.py").write_text(PLAIN.format(size=size, data=folder / "digits"))
    (folder / "distilled.py").write_text(DISTILLED.format(folder=folder))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        teacher = MODELS.build(Config.fromfile(folder / "plain_s.py").model)
    save_checkpoint(dict(state_dict=teacher.state_dict(), meta=dict()), str(folder / "teacher.pth"))
    return folder


def tool(name, *arguments):
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_from_training_to_a_checkpoint_of_the_plain_config(folder):
    tool("train.py", folder / "distilled.py", "--work-dir", folder / "run", "--cfg-options", "randomness.seed=0",
         "default_hooks.logger.interval=1")
    log = next((folder / "run").glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 30
    for number, line in enumerate(steps):
        term = line.get("distill.loss_fpn0+fpn1+fpn2")
        assert term > 0.001 if number < 20 else term is None, (number, term)
    trained = next(line for line in lines if "coco/bbox_mAP" in line)

    checkpoint = torch.load(folder / "run" / "epoch_3.pth", weights_only=False)
    assert not [key for key in checkpoint["state_dict"] if "teacher" in key or "distiller" in key]
    output = tool("test.py", folder / "plain_tiny.py", folder / "run" / "epoch_3_student.pth",
                  "--work-dir", folder / "tested")
    assert "do not match exactly" not in output, "the plain network has other keys"
    tested = json.loads(next((folder / "tested").glob("*/*.json")).read_text())
    assert tested["coco/bbox_mAP"] == pytest.approx(trained["coco/bbox_mAP"], abs=1e-6)
    size = os.path.getsize
    assert size(folder / "run" / "epoch_3_student.pth") < 0.4 * size(folder / "run" / "epoch_3.pth")
    assert not re.search(r"unexpected key|missing keys", output)
