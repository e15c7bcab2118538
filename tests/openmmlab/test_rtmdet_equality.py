"""MMYOLO's four RTMDet distillation configs give the same training with kdops as with stock MMRazor.

In float32 over the first three steps of the recipe (its AdamW, its warm-up), and in float64 at the full learning rate.

All start from a box head that predicts boxes with an extent, as any trained one does. A fresh head's boxes have next to
none, and their GIoU magnifies a rounding: in the deepest student (l), moving the weights of the first convolution by an
ulp was seen to move stock MMRazor's own box loss by 2e-4 within these three steps, but by 4e-6 from boxes with an
extent. At the full learning rate no two float32 runs that round differently stay together, as Adam divides by gradients
that are nothing but rounding; in float64 what is left of that is far below the tolerance.
"""
from __future__ import annotations

import pytest
import recipes
import torch
from kdops.integrations.mmrazor import fuse, give_back, take_over
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import set_random_seed

SIZE = 128
FLOAT32_SIZE = 192  # more positions for BatchNorm's statistics
BOX_EXTENT = 3.0  # from a position to every side of its box, in strides
DISTILL = ("distill.loss_fpn0", "distill.loss_fpn1", "distill.loss_fpn2")
CONNECTORS = [f"distiller.connectors.fpn{i}_s.conv_module.conv.weight" for i in range(3)]

SCOPE = "mmrazor"


def with_extent(model):
    with torch.no_grad():
        for convolution in model.architecture.bbox_head.head_module.rtm_reg:
            convolution.bias.fill_(BOX_EXTENT)
    return model


def stock(cfg):
    return with_extent(recipes.build(cfg.model))


def taken_over(cfg):
    take_over()
    try:
        model = with_extent(recipes.build(cfg.model))
    finally:
        give_back()
    assert {type(loss).__name__ for loss in model.distiller.distill_losses.values()} == {"KDOpsChannelWiseDivergence"}
    return model


def fused(cfg):
    cfg, report = fuse(cfg)
    assert report.fused == ["loss_fpn0", "loss_fpn1", "loss_fpn2"] and not report.left
    model = with_extent(recipes.build(cfg.model))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.distiller.modules())
    return model


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(model, logs, expected_model, expected_logs, tolerance):
    for step, (got, expected) in enumerate(zip(logs, expected_logs)):
        assert set(got) == set(expected)
        for name in DISTILL:
            assert expected[name] > 0.01, f"{name} is silently zero in step {step}"
        for name in expected:
            torch.testing.assert_close(
                got[name], expected[name], rtol=tolerance, atol=tolerance,
                msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}")
    assert set(model.state_dict()) == set(expected_model.state_dict())
    expected = snapshot(expected_model)
    for name, parameter in snapshot(model).items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pair", recipes.PAIRS)
def test_first_steps_of_the_recipe(pair):
    cfg = recipes.stock_config(pair)
    expected_model = stock(cfg)
    expected_gradients = recipes.gradients(expected_model, FLOAT32_SIZE)
    expected_logs = recipes.train(expected_model, cfg, FLOAT32_SIZE)
    for build in (taken_over, fused):
        model = build(cfg)
        gradients = recipes.gradients(model, FLOAT32_SIZE)
        assert set(gradients) == set(expected_gradients)
        for name in CONNECTORS:
            error = (gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()
            assert error <= 1e-5, f"gradient of {name}: relative error {error:.2e}"
        logs = recipes.train(model, cfg, FLOAT32_SIZE)
        assert_same(model, logs, expected_model, expected_logs, tolerance=1e-5)


@pytest.mark.parametrize("pair", recipes.PAIRS)
def test_full_learning_rate(pair):
    cfg = recipes.stock_config(pair)
    expected_model = stock(cfg).double()
    before = snapshot(expected_model)
    expected_logs = recipes.train(expected_model, cfg, SIZE, warm_up=False)
    for build in (taken_over, fused):
        model = build(cfg).double()
        logs = recipes.train(model, cfg, SIZE, warm_up=False)
        assert_same(model, logs, expected_model, expected_logs, tolerance=1e-8)
    for name in CONNECTORS:
        moved = (snapshot(expected_model)[name] - before[name]).abs().max()
        assert moved > cfg.optim_wrapper.optimizer.lr, f"{name} moved by {moved}: the comparison would prove nothing"


def test_automatic_mixed_precision(monkeypatch):
    """bfloat16 through mmengine's AmpOptimWrapper: the fused loss is the maps' own, stock's is off by its rounding."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)  # on the CPU it has bfloat16 alone
    cfg = recipes.stock_config(recipes.PAIRS[0])
    cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16")
    losses, states = [], []
    for build in (stock, fused):
        model = build(cfg)
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        connectors = [model.distiller.connectors[f"fpn{level}_s"].conv_module.conv for level in range(3)]
        weights = [connector.weight.detach().clone() for connector in connectors]
        set_random_seed(0)
        losses.append(model.train_step(recipes.batch(SIZE, 0), optim_wrapper))
        states.append(snapshot(model))
    for level in range(3):
        student = model.distiller.student_recorders.get_recorder(f"fpn{level}").get_record_data()
        teacher = model.distiller.teacher_recorders.get_recorder(f"fpn{level}").get_record_data()
        assert student.dtype == teacher.dtype == torch.bfloat16
        aligned = torch.nn.functional.conv2d(student.detach(), weights[level].bfloat16())
        rows = [
            torch.nn.functional.batch_norm(x.double(), None, None, training=True).flatten(2).log_softmax(2)
            for x in (aligned, teacher)
        ]
        oracle = (rows[1].exp() * (rows[1] - rows[0])).sum(2).mean()
        stock_loss, our_loss = (float(log[f"distill.loss_fpn{level}"]) for log in losses)
        assert our_loss == pytest.approx(float(oracle), rel=1e-5)
        # MMRazor's chain rounds the normalised maps, the softmax and the sum itself to bfloat16.
        assert abs(our_loss - float(oracle)) < abs(stock_loss - float(oracle)) < 0.05 * float(oracle)
    lr = cfg.optim_wrapper.optimizer.lr
    for name in CONNECTORS:  # Adam's first step is lr * sign(gradient): few signs may differ
        assert ((states[0][name] - states[1][name]).abs() < lr / 100).double().mean() > 0.95
