"""The student's own config, made from the configs of its distillation, builds the plain network and no more."""

from __future__ import annotations

from pathlib import Path

import kdops.integrations
import kdops.integrations.mmrazor  # noqa: F401  (registers what the configs name)
import pytest
from kdops.integrations.mmengine.student_config import student_config
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from offline import offline

FOLDER = Path(kdops.integrations.__file__).parent
SHIPPED = sorted(FOLDER.glob("mm*/configs/*/*.py"))
PLAIN = {
    "mgd_r101_retinanet_r50_1x_coco": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "pkd_x101_retinanet_r50_2x_coco": "mmdet::retinanet/retinanet_r50_fpn_2x_coco.py",
    "retinanet_r101_x101_retinanet_r50": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "reppoints_r101_x101-dcn_reppoints_r50": "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
    "cascade-r50-dcn_cascade-x101-dcn_mask-rcnn_r50": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
}


def plain_name(path):
    """The config that the student of a shipped config has when nobody teaches it."""
    if path.stem in PLAIN:
        return PLAIN[path.stem]
    size = path.stem.split("_")[1]
    infix = "_syncbn_fast" if "mmrazor" in path.parts else ""
    return f"{'mmyolo' if infix else 'mmdet'}::rtmdet/rtmdet_{size}{infix}_8xb32-300e_coco.py"


def without_scope(cfg):
    if isinstance(cfg, dict):
        return {key: without_scope(value) for key, value in cfg.items() if key not in ("_scope_", "init_cfg")}
    return [without_scope(item) for item in cfg] if isinstance(cfg, (list, tuple)) else cfg


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_have_their_plain_students(path):
    register_all_modules(False)
    cfg = Config.fromfile(path)
    before = cfg.pretty_text
    text = student_config(cfg).pretty_text
    assert cfg.pretty_text == before
    made = Config.fromstring(text, file_format=".py")
    assert without_scope(made.model) == without_scope(get_config(plain_name(path)).model)
    hooks = str([made.get("custom_hooks"), made.default_hooks])
    assert "KDOps" not in hooks and "Distill" not in hooks
    assert made.custom_imports.imports == [] and "find_unused_parameters" not in made
    with DefaultScope.overwrite_default_scope(made.default_scope):
        model = MODELS.build(offline(made.model))
    assert not any(name.startswith(("student.", "architecture.")) for name in model.state_dict())


def test_what_else_belongs_to_distillation_goes():
    cfg = Config(
        dict(
            model=dict(
                type="KDOpsDistilledDetector", student=dict(type="RetinaNet"), data_preprocessor=dict(type="Mine")
            ),
            custom_imports=dict(imports=["mine", "kdops.integrations.mmdet"], allow_failed_imports=True),
            custom_hooks=[dict(type="EMAHook"), dict(type="mmrazor.StopDistillHook", stop_epoch=2)],
            default_hooks=dict(timer=dict(type="IterTimerHook"), fuse=dict(type="mmrazor.KDOpsFuseHook")),
            val_cfg=dict(type="mmrazor.SingleTeacherDistillValLoop"),
        )
    )
    made = student_config(cfg)
    assert made.model == dict(type="RetinaNet", data_preprocessor=dict(type="Mine"))
    assert made.custom_imports == dict(imports=["mine"], allow_failed_imports=True)
    assert made.custom_hooks == [dict(type="EMAHook")] and set(made.default_hooks) == {"timer"}
    assert made.val_cfg == dict(type="ValLoop")


@pytest.mark.parametrize("cfg", [dict(), dict(model=dict(type="RetinaNet"))], ids=["no model", "no student"])
def test_there_may_be_no_student(cfg):
    assert student_config(Config(cfg)) is None
