"""The lines that the README of the MMDetection integration gives, in real runs of MMDetection's tools."""

from __future__ import annotations

from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.apis import DetInferencer
from real_runs import (
    INTEGRATIONS,
    PRINTED,
    TRUSTED,
    assert_distilled,
    assert_tested,
    command,
    options_of_test,
    provide_downloads,
    readme_config,
    smaller,
    terms,
    train,
    write_weights,
)

PLAIN = Path(mmdet.__file__).parent / ".mim" / "configs" / "rtmdet" / "rtmdet_tiny_8xb32-300e_coco.py"
TERM = ["distill.loss_neck.out_convs.0.conv+neck.out_convs.1.conv+neck.out_convs.2.conv"]


@pytest.fixture(scope="module")
def distilled(coco):
    """The README's config for two epochs, the second without distillation, and its log of steps."""
    config = readme_config(coco, "mmdet", 0, "readme.py")
    write_weights(coco / "rtmdet_s.pth", "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py")
    provide_downloads(coco, config)
    options = {
        **smaller(config, 0.25),
        "train_cfg.max_epochs": 2,
        "custom_hooks.1.switch_epoch": 1,
        "custom_hooks.3.stop_epoch": 1,
        "train_dataloader.num_workers": 1,
    }
    return options, train(coco, "mmdet", config, "readme", options)


def test_stops(coco, distilled):
    _, steps = distilled
    assert [step["epoch"] for step in steps] == [1, 1, 2, 2]
    for step in steps[:2]:
        assert_distilled(step, TERM)
    assert not any(map(terms, steps[2:]))


def test_resumes(coco, distilled):
    options, _ = distilled
    config = coco / "trusting_readme.py"
    config.write_text(
        (coco / "readme.py")
        .read_text()
        .replace('custom_imports = dict(imports=["kdops.integrations.mmdet"])', imports_of_readme(coco))
    )
    options = {**options, "train_cfg.max_epochs": 3, "custom_hooks.3.stop_epoch": 2}
    steps = train(coco, "mmdet", config, "resumed readme", options, "--resume", "readme/epoch_1.pth")
    assert [(step["epoch"], bool(terms(step))) for step in steps] == [(2, True)] * 2 + [(3, False)] * 2


def imports_of_readme(folder):
    """The README's line for those who trust their checkpoints."""
    line = readme_config(folder, "mmdet", 1, "line.py").read_text().strip()
    assert line.startswith("custom_imports = ") and TRUSTED in line
    return line


def test_plain_config_tests_the_students_file_and_trusted_checkpoints(coco, distilled):
    (coco / "trusting_plain.py").write_text(f"_base_ = '{PLAIN}'\n{imports_of_readme(coco)}\n")
    command(coco, "-m", "kdops", "student-checkpoint", "--allow-pickle", "readme/epoch_1.pth", "first.pth")
    for config, weights in (
        (PLAIN, "readme/epoch_2_student.pth"),
        (PLAIN, "first.pth"),
        ("trusting_plain.py", "readme/epoch_1.pth"),
    ):
        assert_tested(coco, "mmdet", config, weights, options_of_test(PLAIN, 0.25))
    assert_same_weights(coco / "first.pth", coco / "readme" / "epoch_1.pth")
    assert_same_weights(coco / "readme" / "epoch_2_student.pth", coco / "readme" / "epoch_2.pth")


def assert_same_weights(*paths):
    first, second = (torch.load(path, weights_only=False)["state_dict"] for path in paths)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_students_file_is_enough_for_an_inferencer(coco, distilled):
    image = coco / "data" / "coco" / "val2017" / "0.jpg"
    command(coco, "-m", "kdops", "student-checkpoint", "--allow-pickle", "readme/epoch_2.pth", "by_command.pth")
    for weights in ("readme/epoch_2_student.pth", "by_command.pth"):
        assert "kdops" not in torch.load(coco / weights, weights_only=True)["meta"]["cfg"]
        inferencer = DetInferencer(weights=str(coco / weights), device="cpu")
        assert type(inferencer.model).__name__ == "RTMDet"
        assert inferencer(str(image), no_save_vis=True)["predictions"]


MTPD = INTEGRATIONS / "mmdet" / "configs" / "mtpd" / "retinanet_r101_x101_retinanet_r50.py"
RETINANET = PLAIN.parents[1] / "retinanet" / "retinanet_r50_fpn_1x_coco.py"


def test_progressive_teachers_resume_and_test(coco):
    provide_downloads(coco, MTPD)
    backbone = write_weights(coco / "resnet50.pth", dict(type="ResNet", depth=50))
    (coco / "trusting_mtpd.py").write_text(f"_base_ = '{MTPD}'\n{imports_of_readme(coco)}\n")
    options = {
        **smaller(MTPD, 0.25),
        "model.student.backbone.init_cfg.checkpoint": backbone,
        "model.stages.0.epochs": 1,
        "model.stages.1.epochs": 1,
        "train_cfg.max_epochs": 1,
    }
    names = [f"distill.loss_mgd_p{level}" for level in range(3, 8)]
    steps = train(coco, "mmdet", MTPD, "mtpd", options)
    longer = {**options, "train_cfg.max_epochs": 3}
    steps += train(coco, "mmdet", "trusting_mtpd.py", "resumed mtpd", longer, "--resume", "mtpd/epoch_1.pth")
    assert [(step["epoch"], sorted(terms(step))) for step in steps] == (
        [(1, names)] * 2 + [(2, names)] * 2 + [(3, [])] * 2
    )
    printed = (coco / "resumed mtpd" / PRINTED).read_text()
    assert "stage 1 of distillation begins at iteration 2" in printed and "distillation has ended" in printed
    assert_tested(coco, "mmdet", RETINANET, "resumed mtpd/epoch_3_student.pth", options_of_test(RETINANET, 0.25))
