"""Every config that ships trains as it is, by MMYOLO's and MMDetection's own tools and with their data loaders.

The options are what a user sets: the batch, the workers, the length, smaller images. Weights that would be downloaded
are random ones where mmengine keeps its downloads; only torchvision's, which need torchvision, are named as a file.
"""

from __future__ import annotations

import shutil

import pytest
from mmengine.config import Config
from real_runs import INTEGRATIONS, PRINTED, assert_distilled, provide_downloads, smaller, train, write_weights

MMRAZOR = sorted((INTEGRATIONS / "mmrazor" / "configs").glob("*/*.py"))
RTMDET = sorted((INTEGRATIONS / "mmdet" / "configs").glob("rtmdet/*.py"))


def train_as_shipped(folder, package, path, options):
    """The steps of a run, and what was printed and logged: where weights came from is in the log file alone."""
    provide_downloads(folder, path)
    steps = train(folder, package, path, path.stem, {"train_cfg.max_epochs": 1, **smaller(path, 0.25), **options})
    log = next((folder / path.stem).glob("*/*.log"))
    said = (folder / path.stem / PRINTED).read_text() + log.read_text()
    shutil.rmtree(folder / path.stem)
    return steps, said


@pytest.mark.parametrize("path", MMRAZOR, ids=lambda path: path.stem)
def test_mmrazor_config_trains(coco, path):
    steps, said = train_as_shipped(coco, "mmyolo", path, {})
    assert len(steps) == 2 and "fused normalisation and CWD of loss_fpn0, loss_fpn1, loss_fpn2" in said
    for step in steps:
        assert_distilled(step, [f"distill.loss_fpn{level}" for level in range(3)])


@pytest.mark.parametrize("path", RTMDET, ids=lambda path: path.stem)
def test_rtmdet_config_trains(coco, path):
    steps, _ = train_as_shipped(coco, "mmdet", path, {})
    assert len(steps) == 2
    for step in steps:
        assert_distilled(step, ["distill.loss_fpn0+fpn1+fpn2"])


MGD_FROM_P3 = [f"distill.loss_mgd_p{level}" for level in range(3, 8)]
RESNET = {
    "retinanet/mgd_r101_retinanet_r50_1x_coco.py": MGD_FROM_P3,
    "retinanet/pkd_x101_retinanet_r50_2x_coco.py": ["distill.loss_pkd_p3+pkd_p4+pkd_p5+pkd_p6"],
    "mtpd/retinanet_r101_x101_retinanet_r50.py": MGD_FROM_P3,
    "mtpd/reppoints_r101_x101-dcn_reppoints_r50.py": MGD_FROM_P3,
    "mtpd/cascade-r50-dcn_cascade-x101-dcn_mask-rcnn_r50.py": [f"distill.loss_mgd_p{level}" for level in range(2, 6)],
}


@pytest.mark.parametrize("name", RESNET)
def test_resnet_config_trains(coco, name):
    path = INTEGRATIONS / "mmdet" / "configs" / name
    backbone = write_weights(coco / "resnet50.pth", dict(type="ResNet", depth=50))
    options = {"model.student.backbone.init_cfg.checkpoint": backbone}
    stages = 2 if name.startswith("mtpd") else 1
    if stages == 2:
        options.update({"model.stages.0.epochs": 1, "model.stages.1.epochs": 1, "train_cfg.max_epochs": 2})
    steps, said = train_as_shipped(coco, "mmdet", path, options)
    assert len(steps) == 2 * stages and ("stage 1 of distillation begins at iteration 2" in said) == (stages == 2)
    for step in steps:
        assert_distilled(step, RESNET[name])
    student = Config.fromfile(path).model.student
    assert f"PretrainedInit: load from {backbone}" in said
    for part in (student.neck, student.get("bbox_head", {})):
        if "checkpoint" in (part.get("init_cfg") or {}):
            assert f"PretrainedInit: load from {part.init_cfg.checkpoint}" in said


def test_all_are_here():
    assert len(MMRAZOR) == 4 and len(RTMDET) == 4
    shipped = (INTEGRATIONS / "mmdet" / "configs").glob("*/*.py")
    assert {path.relative_to(INTEGRATIONS / "mmdet" / "configs").as_posix() for path in shipped} == {
        *RESNET,
        *(f"rtmdet/{path.name}" for path in RTMDET),
    }
