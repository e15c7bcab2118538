"""Every config that ships builds and takes a training step, with random weights in place of downloads."""
from __future__ import annotations

from pathlib import Path

import kdops.integrations
import pytest
import recipes
import torch
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from offline import offline_config

FOLDER = Path(kdops.integrations.__file__).parent
MMDET = sorted((FOLDER / "mmdet" / "configs").glob("*/*.py"))
MMRAZOR = sorted((FOLDER / "mmrazor" / "configs").glob("*/*.py"))


def build_hooks(cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        return [HOOKS.build(dict(hook)) for hook in cfg.custom_hooks]


def test_all_are_here():
    assert len(MMDET) == 9 and len(MMRAZOR) == 4


@pytest.mark.parametrize("path", MMDET, ids=lambda path: path.stem)
def test_mmdet_config_steps(path):
    register_all_modules(False)
    cfg = offline_config(path)
    hooks = build_hooks(cfg, "mmdet")
    assert all(isinstance(hook, Hook) for hook in hooks)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
    model.needs_hook = False  # the hook would say so; there is no Runner here
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if "stages" in cfg.model:
        model.distiller.bind(optim_wrapper.optimizer)
        assert [stage["epochs"] for stage in cfg.model.stages] == [12, 12] and cfg.train_cfg.max_epochs == 24
    before = {name: value.clone() for name, value in model.distiller.state_dict().items()}
    data = demo_mm_inputs(2, [[3, 128, 128]] * 2, num_classes=80, with_mask="mask-rcnn" in path.stem)
    losses = model.train().train_step(data, optim_wrapper)
    terms = {name: float(value) for name, value in losses.items() if name.startswith("distill.loss_")}
    assert terms and all(value > 0 for value in terms.values()), terms
    assert float(losses["loss"]) >= sum(terms.values()) * (1 - 1e-5)
    learned = [name for name, value in model.distiller.state_dict().items() if not torch.equal(value, before[name])]
    assert learned or "pkd" in path.stem, "align layers or generators are not in the optimizer"
    assert not any(name.startswith("teacher") for name, _ in model.named_parameters())


@pytest.mark.parametrize("path", MMRAZOR, ids=lambda path: path.stem)
def test_mmrazor_config_is_fused(path):
    cfg = Config.fromfile(path)
    cfg.model.teacher_ckpt = None
    assert "KDOpsStopDistillHook" in [type(hook).__name__ for hook in build_hooks(cfg, "mmyolo")]
    model = recipes.build(cfg.model)
    assert {loss.norm for loss in model.distiller.distill_losses.values()} == {"batch"}
    logs = recipes.train(model, cfg, size=128, steps=1)
    assert all(logs[0][f"distill.loss_fpn{level}"] > 0.01 for level in range(3))
