"""MMYOLO's four RTMDet distillation configs give the same training with kdops as with stock MMRazor.

In float32 over the recipe's first steps (its AdamW, its warm-up). Further on no two float32 runs that round
differently stay together: a randomly initialised network and Adam's division by small gradients magnify a rounding,
in the deepest student (l) from the second step on. So the full learning rate, and the deepest student, are compared in
float64, where what is left of that is far below the tolerance.
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
DISTILL = ("distill.loss_fpn0", "distill.loss_fpn1", "distill.loss_fpn2")
CONNECTORS = [f"distiller.connectors.fpn{i}_s.conv_module.conv.weight" for i in range(3)]

SCOPE = "mmrazor"


def stock(cfg):
    return recipes.build(cfg.model)


def taken_over(cfg):
    take_over()
    try:
        model = recipes.build(cfg.model)
    finally:
        give_back()
    assert {type(loss).__name__ for loss in model.distiller.distill_losses.values()} == {"KDOpsChannelWiseDivergence"}
    return model


def fused(cfg):
    cfg, report = fuse(cfg)
    assert report.fused == ["loss_fpn0", "loss_fpn1", "loss_fpn2"] and not report.left
    model = recipes.build(cfg.model)
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


@pytest.mark.parametrize("pair, steps", [*((pair, 3) for pair in recipes.PAIRS[:3]), (recipes.PAIRS[3], 1)])
def test_first_steps_of_the_recipe(pair, steps):
    cfg = recipes.stock_config(pair)
    expected_model = stock(cfg)
    expected_gradients = recipes.gradients(expected_model, SIZE)
    expected_logs = recipes.train(expected_model, cfg, SIZE, steps)
    for build in (taken_over, fused):
        model = build(cfg)
        gradients = recipes.gradients(model, SIZE)
        assert set(gradients) == set(expected_gradients)
        for name in CONNECTORS:
            error = (gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()
            assert error <= 1e-5, f"gradient of {name}: relative error {error:.2e}"
        logs = recipes.train(model, cfg, SIZE, steps)
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
