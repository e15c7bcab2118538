"""The forms that the README of the MMRazor integration recommends, in real runs of MMYOLO's and MMDetection's tools."""

from __future__ import annotations

from pathlib import Path

import mmyolo
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

TINY = INTEGRATIONS / "mmrazor" / "configs" / "rtmdet" / "kd_tiny_rtmdet_s_neck_300e_coco.py"
PLAIN = Path(mmyolo.__file__).parent / ".mim" / "configs" / "rtmdet" / "rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py"
TERMS = [f"distill.loss_fpn{level}" for level in range(3)]

# The same base with an import alone, for what the command line adds.
IMPORTED = """
_base_ = "mmyolo::rtmdet/distillation/kd_tiny_rtmdet_s_neck_300e_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmrazor"])
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))
"""


def printed(folder, run):
    return (folder / run / PRINTED).read_text()


def test_all_forms_train_alike(coco):
    """Each form by itself, and the same losses of the same first batch from all of them."""
    (coco / "imported.py").write_text(IMPORTED)
    one_by_one = {
        f"model.distiller.distill_losses.loss_fpn{level}.type": "KDOpsChannelWiseDivergence" for level in range(3)
    }
    forms = {
        "stock": (coco / "imported.py", {}, None),
        "names": (readme_config(coco, "mmrazor", 0, "names.py"), {}, "takes over ChannelWiseDivergence"),
        "losses": (coco / "imported.py", one_by_one, None),
        "distiller": (readme_config(coco, "mmrazor", 1, "distiller.py"), {}, "fused normalisation and CWD of"),
        "option": (coco / "imported.py", {"model.distiller.type": "KDOpsDistiller"}, "fused normalisation and CWD of"),
        "hook": (coco / "imported.py", {"default_hooks.fuse.type": "mmrazor.KDOpsFuseHook"}, "fused normalisation and"),
    }
    provide_downloads(coco, TINY)
    first = {}
    for form, (config, options, said) in forms.items():
        seeded = {"randomness.seed": 0, "train_cfg.max_epochs": 1, **smaller(config, 0.25), **options}
        steps = train(coco, "mmyolo", config, form, seeded)
        assert said is None or said in printed(coco, form), form
        assert_distilled(steps[0], TERMS)
        first[form] = steps[0]
    for form, step in first.items():
        for name in (*TERMS, "loss", "student.loss_cls"):
            assert step[name] == pytest.approx(first["stock"][name], rel=1e-4), (form, name)


@pytest.fixture(scope="module")
def distilled(coco):
    """The shipped recipe for two epochs, the second without distillation, and its log of steps."""
    provide_downloads(coco, TINY)
    options = {
        **smaller(TINY, 0.25),
        "train_cfg.max_epochs": 2,
        "custom_hooks.1.switch_epoch": 1,
        "custom_hooks.2.stop_epoch": 1,
        "train_dataloader.num_workers": 1,
    }
    return options, train(coco, "mmyolo", TINY, "chain", options)


def test_stops(coco, distilled):
    _, steps = distilled
    assert [step["epoch"] for step in steps] == [1, 1, 2, 2]
    for step in steps[:2]:
        assert_distilled(step, TERMS)
    assert not any(map(terms, steps[2:]))
    names = [
        set(torch.load(coco / "chain" / f"epoch_{epoch}.pth", weights_only=False)["state_dict"]) for epoch in (1, 2)
    ]
    assert {name.split(".")[0] for name in names[0]} == {"architecture", "distiller"}
    assert {name.split(".")[0] for name in names[1]} == {"architecture"}


@pytest.mark.parametrize("epoch", [1, 2], ids=["before the stop", "behind the stop"])
def test_resumes(coco, distilled, epoch):
    options, _ = distilled
    (coco / "trusting.py").write_text(
        f"_base_ = '{TINY}'\ncustom_imports = dict(imports=['kdops.integrations.mmrazor', '{TRUSTED}'])\n"
    )
    run = f"resumed from {epoch}"
    options = {**options, "train_cfg.max_epochs": 3, "custom_hooks.2.stop_epoch": 2}
    steps = train(coco, "mmyolo", "trusting.py", run, options, "--resume", f"chain/epoch_{epoch}.pth")
    # What has stopped stays so, though the options of this run would distil for another epoch.
    assert [(step["epoch"], bool(terms(step))) for step in steps] == (
        [(2, True)] * 2 + [(3, False)] * 2 if epoch == 1 else [(3, False)] * 2
    )
    assert ("Distillation had been stopped when the checkpoint was written" in printed(coco, run)) == (epoch == 2)


def test_students_file_tests_with_the_plain_config(coco, distilled):
    command(coco, "-m", "kdops", "student-checkpoint", "--allow-pickle", "chain/epoch_2.pth", "converted.pth")
    for weights in ("chain/epoch_2_student.pth", "converted.pth"):
        assert_tested(coco, "mmyolo", PLAIN, weights, options_of_test(PLAIN, 0.25))
    files = [torch.load(coco / name, weights_only=True) for name in ("chain/epoch_2_student.pth", "converted.pth")]
    assert set(files[0]["state_dict"]) == set(files[1]["state_dict"])
    assert all(torch.equal(value, files[1]["state_dict"][name]) for name, value in files[0]["state_dict"].items())


def test_students_file_is_enough_for_an_inferencer(coco, distilled):
    image = coco / "data" / "coco" / "val2017" / "0.jpg"
    inferencer = DetInferencer(weights=str(coco / "chain" / "epoch_2_student.pth"), scope="mmyolo", device="cpu")
    assert type(inferencer.model).__name__ == "YOLODetector"
    assert inferencer(str(image), no_save_vis=True)["predictions"]


HOOK = {"default_hooks.fuse.type": "mmrazor.KDOpsFuseHook", "custom_hooks.2.type": "mmrazor.KDOpsStopDistillHook"}


@pytest.mark.parametrize(
    "form, package, options",
    [("names", "kdops.integrations.mmrazor.stock_names", {}), ("hook", "kdops.integrations.mmrazor", HOOK)],
)
def test_other_forms_stop_resume_and_test(coco, form, package, options):
    if form == "names":
        readme_config(coco, "mmrazor", 0, "chained.py")
    else:
        (coco / "chained.py").write_text(IMPORTED)
    (coco / "resumed.py").write_text(
        f"_base_ = './chained.py'\ncustom_imports = dict(imports=['{package}', '{TRUSTED}'])\n"
    )
    provide_downloads(coco, TINY)
    run = f"chain of {form}"
    small = smaller(coco / "chained.py", 0.25)
    options = {**small, "train_cfg.max_epochs": 2, "custom_hooks.2.stop_epoch": 1, **options}
    steps = train(coco, "mmyolo", "chained.py", run, options)
    steps += train(coco, "mmyolo", "resumed.py", f"resumed {run}", options, "--resume", f"{run}/epoch_1.pth")
    assert [(step["epoch"], sorted(terms(step))) for step in steps] == [(1, TERMS)] * 2 + [(2, [])] * 4
    command(coco, "-m", "kdops", "student-checkpoint", "--allow-pickle", f"{run}/epoch_1.pth", f"{form}.pth")
    assert_tested(coco, "mmyolo", PLAIN, f"{form}.pth", options_of_test(PLAIN, 0.25))


MGD = """
_base_ = "mmrazor::distill/mmdet/mgd/mgd_fpn_retina_x101_retina_r50_2x_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmrazor.stock_names"])
"""


def test_mmrazors_mgd_config_trains_by_mmdetections_tool(coco):
    (coco / "mgd.py").write_text(MGD)
    provide_downloads(coco, coco / "mgd.py")
    write_weights(coco / "resnet50.pth", dict(type="ResNet", depth=50))
    steps = train(
        coco,
        "mmdet",
        "mgd.py",
        "mgd",
        {
            **smaller(coco / "mgd.py", 0.25),
            "train_cfg.max_epochs": 1,
            "model.architecture.backbone.init_cfg.checkpoint": "resnet50.pth",
        },
    )
    assert "takes over ChannelWiseDivergence, PKDLoss, MGDLoss, MGDConnector, StopDistillHook" in printed(coco, "mgd")
    for step in steps:
        assert_distilled(step, [f"distill.loss_mgd_fpn{level}" for level in range(5)])
