"""MMRazor imports on this PyTorch: placeholders when, and only when, its quantization does not."""
from __future__ import annotations

import os
import subprocess
import sys

import kdops.integrations.mmrazor as kd
import pytest
from kdops.integrations.mmrazor import _placeholders

SCOPE = "mmrazor"


def python(program):
    # Not in the repository's root, whose kdops was built for another environment's PyTorch.
    folder = os.path.dirname(os.path.abspath(__file__))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=folder)


def test_says_once_what_it_replaced():
    done = python("import kdops.integrations.mmrazor, kdops.integrations.mmrazor.stock_names, mmrazor.models")
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in (done.stdout + done.stderr).splitlines() if "placeholders that raise on use" in line]
    assert len(said) == 1 and "Distillation is not affected" in said[0]


def test_placeholders_raise_on_use():
    from mmrazor.models.quantizers import OpenVINOQuantizer
    from mmrazor.registry import MODELS
    from mmrazor.structures.quantization import BackendConfigs, QConfigHandler

    for use in (
        OpenVINOQuantizer, lambda: QConfigHandler({}), lambda: QConfigHandler.check_qconfig,
        lambda: BackendConfigs["native"], lambda: MODELS.build(dict(type="TensorRTQuantizer")),
    ):
        with pytest.raises(RuntimeError, match=r"is a placeholder: MMRazor's quantization does not import"):
            use()


def test_another_failure_is_not_hidden():
    done = python("import sys; sys.modules['joblib'] = None; import kdops.integrations.mmrazor")
    assert done.returncode != 0
    assert "joblib" in done.stderr.splitlines()[-1] and "replaced by placeholders" not in done.stderr + done.stdout


def test_an_importable_quantization_stays(monkeypatch):
    imported = []
    monkeypatch.setattr(_placeholders.importlib, "import_module", lambda name: imported.append(name))
    monkeypatch.setattr(_placeholders, "_placeholder_module", lambda *_: pytest.fail("replaced without need"))
    assert _placeholders.import_mmrazor() is False
    assert imported == ["mmrazor.models", "mmrazor.engine"]


NORM = dict(type="BN", affine=False, track_running_stats=False)


def distiller(student=None, teacher=None, loss=None):
    return dict(
        connectors=dict(
            s=dict(
                type="ConvModuleConnector", in_channel=4, out_channel=6, norm_cfg=NORM, act_cfg=None,
                **(student or {})),
            t=dict(type="NormConnector", in_channels=6, norm_cfg=NORM, **(teacher or {}))),
        distill_losses=dict(loss_a=dict(type="ChannelWiseDivergence", tau=2), **(loss or {})),
        loss_forward_mappings={name: dict(
            preds_S=dict(from_student=True, recorder="r", connector="s"),
            preds_T=dict(from_student=False, recorder="r", connector="t")) for name in ("loss_a", *(loss or {}))})


def test_fuse_rewrites_and_leaves_its_input_alone():
    cfg = distiller()
    fused, report = kd.fuse(cfg)
    assert fused["connectors"] == dict(
        s=dict(type="ConvModuleConnector", in_channel=4, out_channel=6, act_cfg=None, bias=False))
    assert fused["distill_losses"]["loss_a"] == dict(
        type="mmrazor.KDOpsChannelWiseDivergence", tau=2, norm="batch", eps=1e-5)
    assert "connector" not in fused["loss_forward_mappings"]["loss_a"]["preds_T"]
    assert cfg == distiller() and report.fused == ["loss_a"] and "loss_a" in str(report)
    again, report = kd.fuse(fused)
    assert again == fused and report.left == {"loss_a": "it has norm='batch' already"}


def changed(path, value):
    cfg = distiller()
    target = cfg
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return cfg


@pytest.mark.parametrize("cfg, reason", [
    (changed(("connectors", "s", "act_cfg"), dict(type="ReLU")), "has an activation"),
    (changed(("connectors", "s", "norm_cfg"), dict(type="BN")), "the norm of preds_S is not BN(affine=False"),
    (changed(("connectors", "t", "norm_cfg"), dict(NORM, type="SyncBN")), "the norm of preds_T is SyncBN"),
    (changed(("connectors", "t", "norm_cfg"), dict(NORM, eps=1e-3)), "differ in eps"),
    (changed(("connectors", "t", "type"), "TorchFunctionalConnector"), "preds_T does not go through a NormConnector"),
    (changed(("distill_losses", "loss_a", "type"), "L2Loss"), "its type is L2Loss"),
    (changed(("loss_forward_mappings", "loss_a", "preds_S", "connector"), None), "preds_S does not go through"),
    (distiller(student=dict(order=("act", "conv", "norm"))), "has order="),
    (distiller(loss=dict(loss_b=dict(type="L2Loss"))), "shares a connector with loss_b"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_fuse_leaves_what_is_not_the_pattern(cfg, reason):
    fused, report = kd.fuse(cfg)
    assert fused == cfg and not report.fused
    assert reason in report.left["loss_a"] and reason in str(report)


def test_fuse_keeps_eps_and_scope():
    cfg = distiller()
    for connector in cfg["connectors"].values():
        connector["norm_cfg"] = dict(NORM, eps=1e-3)
    cfg["distill_losses"]["loss_a"]["type"] = "mmrazor.ChannelWiseDivergence"
    fused, _ = kd.fuse(dict(model=dict(distiller=cfg)))
    assert fused["model"]["distiller"]["distill_losses"]["loss_a"]["eps"] == 1e-3
    with pytest.raises(ValueError, match="fuse: cfg must have distill_losses"):
        kd.fuse(dict(model=dict(type="RTMDet")))
