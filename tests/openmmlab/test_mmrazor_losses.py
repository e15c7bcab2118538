"""The kdops losses and MGD connector under MMRazor's names, beside MMRazor's own."""
from __future__ import annotations

import os

import mmrazor
import pytest
import recipes
import torch
from kdops.integrations.mmrazor import give_back, take_over
from kdops.integrations.mmrazor.takeover import STOCK_NAMES
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmrazor.registry import HOOKS, MODELS

DISTILL_CONFIGS = os.path.join(os.path.dirname(mmrazor.__file__), ".mim", "configs", "distill", "mmdet")

SCOPE = "mmrazor"


def maps(shape, seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def value_and_gradient(loss, student, teacher):
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("cfg", [
    dict(type="ChannelWiseDivergence"),
    dict(type="ChannelWiseDivergence", tau=4, loss_weight=3),
    dict(type="PKDLoss", loss_weight=6),
    dict(type="MGDLoss", alpha_mgd=5e-7),
], ids=lambda cfg: "-".join(map(str, cfg.values())))
def test_a_change_of_type_is_all(cfg):
    student, teacher = maps((2, 12, 9, 7), 0), maps((2, 12, 9, 7), 1)
    expected = value_and_gradient(MODELS.build(dict(cfg)), student, teacher)
    ours = MODELS.build({**cfg, "type": "KDOps" + cfg["type"]})
    for got, want in zip(value_and_gradient(ours, student, teacher), expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("resize_stu", [True, False])
def test_pkd_resizes_as_mmrazor_does(resize_stu):
    student, teacher = maps((2, 6, 8, 10), 0), maps((2, 6, 4, 5), 1)
    cfg = dict(loss_weight=10.0, resize_stu=resize_stu)
    expected = value_and_gradient(MODELS.build(dict(type="PKDLoss", **cfg)), student, teacher)
    ours = MODELS.build(dict(type="KDOpsPKDLoss", **cfg))
    for got, want in zip(value_and_gradient(ours, student, teacher), expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_pkd_takes_tuples_of_levels_and_refuses_unequal_ones():
    levels = [maps((2, 6, size, size), size) for size in (8, 4)]
    others = [maps((2, 6, size, size), size + 1) for size in (8, 4)]
    ours, stock = MODELS.build(dict(type="KDOpsPKDLoss")), MODELS.build(dict(type="PKDLoss"))
    torch.testing.assert_close(ours(tuple(levels), tuple(others)), stock(tuple(levels), tuple(others)))
    with pytest.raises(ValueError, match="pkd_loss"):
        ours(tuple(levels), tuple(others[:1]))


@pytest.mark.parametrize("channels", [(6, 10), (8, 8)])
def test_mgd_connector_equals_mmrazors_where_nothing_is_masked(channels):
    cfg = dict(student_channels=channels[0], teacher_channels=channels[1], lambda_mgd=0.0)
    torch.manual_seed(0)
    stock = MODELS.build(dict(type="MGDConnector", **cfg)).double()
    torch.manual_seed(0)
    ours = MODELS.build(dict(type="KDOpsMGDConnector", **cfg)).double()
    assert set(ours.state_dict()) == set(stock.state_dict())
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in ours.state_dict().items())
    teacher, results = maps((2, channels[1], 7, 7), 1), []
    for connector, kind in ((stock, "MGDLoss"), (ours, "KDOpsMGDLoss")):
        loss = MODELS.build(dict(type=kind))
        student = maps((2, channels[0], 7, 7), 0, requires_grad=True)
        value = loss(connector(student), teacher)
        value.backward()
        results.append([value.detach(), student.grad, *(parameter.grad for parameter in connector.parameters())])
    for want, got in zip(*results):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_mgd_connector_masks_the_fraction_it_is_told():
    connector = MODELS.build(dict(
        type="KDOpsMGDConnector", student_channels=4, teacher_channels=4, lambda_mgd=0.65, mask_on_channel=False))
    torch.nn.init.zeros_(connector.generation[0].bias)
    torch.nn.init.dirac_(connector.generation[0].weight)
    torch.nn.init.zeros_(connector.generation[2].bias)
    torch.nn.init.dirac_(connector.generation[2].weight)
    kept = (connector(torch.ones(4, 4, 100, 100)) != 0).double()
    assert (kept == kept[:, :1]).all(), "a position is masked in all channels or in none"
    draws = 4 * 100 * 100
    assert abs(kept[:, 0].mean() - 0.35) < 4 * (0.35 * 0.65 / draws) ** 0.5


def test_names_are_taken_over_on_request_only():
    stock = {name: registry.module_dict[name] for name, (registry, _) in STOCK_NAMES.items()}
    assert all(cls.__module__.startswith("mmrazor.") for cls in stock.values())
    try:
        assert take_over(["PKDLoss"]) == ("PKDLoss",)
        assert type(MODELS.build(dict(type="PKDLoss"))).__name__ == "KDOpsPKDLoss"
        assert MODELS.module_dict["MGDLoss"] is stock["MGDLoss"]
        assert set(take_over()) == set(STOCK_NAMES) - {"PKDLoss"}
        assert HOOKS.build(dict(type="mmrazor.StopDistillHook", detach_epoch=280)).stop_epoch == 280
    finally:
        give_back()
    assert {name: registry.module_dict[name] for name, (registry, _) in STOCK_NAMES.items()} == stock
    with pytest.raises(ValueError, match="take_over: names must be among"):
        take_over(["FBKDLoss"])


def distill_config(name):
    """A distillation config of MMRazor for MMDetection, unmodified but for the downloads."""
    cfg = Config.fromfile(os.path.join(DISTILL_CONFIGS, name))
    cfg.model.teacher_ckpt = None
    for part in (cfg.model.architecture, cfg.model.teacher):
        if part.get("pretrained"):
            part.pretrained = False
    return cfg


def one_step(cfg):
    """Build from a fixed seed, take one optimizer step; returns the model and the losses before and after it."""
    model = recipes.build(cfg.model, scope="mmdet")
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    logs = []
    for _ in range(2):
        data = demo_mm_inputs(2, [[3, 128, 128]] * 2, num_classes=80)
        torch.manual_seed(0)
        logs.append({name: float(value) for name, value in model.train_step(data, optim_wrapper).items()})
    return model, logs


@pytest.mark.parametrize("name", [
    "cwd/cwd_fpn_retina_r101_retina_r50_1x_coco.py",
    "pkd/pkd_fpn_mask-rcnn_swin_retina_r50_2x_coco.py",
])
def test_stock_configs_step_the_same_with_names_taken_over(name, stock_names):
    model, logs = one_step(distill_config(name))
    assert all(type(loss).__name__.startswith("KDOps") for loss in model.distiller.distill_losses.values())
    give_back()
    _, expected = one_step(distill_config(name))
    assert set(logs[0]) == set(expected[0]) and sum(key.startswith("distill.") for key in logs[0]) >= 4
    for key, value in expected[0].items():
        assert logs[0][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert any(logs[1][key] != logs[0][key] for key in logs[0]), "the step changed nothing"


def test_stock_mgd_config_steps_with_names_taken_over(stock_names):
    cfg = distill_config("mgd/mgd_fpn_retina_x101_retina_r50_2x_coco.py")
    model, logs = one_step(cfg)
    assert {type(c).__name__ for c in model.distiller.connectors.values()} == {"KDOpsMGDConnector"}
    assert {type(c).__name__ for c in model.distiller.distill_losses.values()} == {"KDOpsMGDLoss"}
    names = {name.split(".", 3)[-1] for name in model.state_dict() if name.startswith("distiller.connectors.")}
    assert names == {"generation.0.weight", "generation.0.bias", "generation.2.weight", "generation.2.bias"}
    for step in logs:
        assert all(step[f"distill.loss_mgd_fpn{level}"] > 0 for level in range(5))
