"""KDOpsFuseHook in real runs of mmengine's Runner."""
from __future__ import annotations

import copy
from pathlib import Path

import kdops.integrations.mmengine.trusted_checkpoints  # noqa: F401  (to resume)
import pytest
import recipes
import torch
import toys
from kdops.integrations.mmrazor import fuse
from kdops.integrations.mmrazor.fuse import fuse_in_place
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmrazor.registry import MODELS

FUSE = dict(type="mmrazor.KDOpsFuseHook")
CONNECTOR = "distiller.connectors.feat_s.conv_module.conv.weight"

SCOPE = "mmrazor"


class Watch(Hook):
    """Notes losses, and the gradient of every parameter, step by step."""

    priority = "LOWEST"

    def __init__(self):
        self.losses, self.gradients = [], []

    def before_train(self, runner):
        self.distiller = copy.deepcopy(runner.model.distiller)
        for name, parameter in runner.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name: self.gradients.append((name, grad.clone())))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: value.detach().clone() for name, value in outputs.items()})


def run(work_dir, hooks, **options):
    watch = Watch()
    runner = toys.runner(work_dir, [*hooks, watch], log_level="INFO", optim_wrapper=toys.SGD, **options)
    runner.train()
    return runner, watch


def log_of(runner):
    return "".join(path.read_text() for path in Path(runner.work_dir).glob("*/*.log"))


def batch_norms(module):
    return [name for name, child in module.named_modules() if isinstance(child, torch.nn.BatchNorm2d)]


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_is_the_stock_run(tmp_path):
    expected_runner, expected = run(tmp_path / "stock", [])
    runner, watch = run(tmp_path / "fused", [FUSE])
    assert len(watch.losses) == len(expected.losses) == 8
    for got, want in zip(watch.losses, expected.losses):
        assert want["distill.loss_feat"] > 1e-3
        assert_same(got, want)
    names = {name for name, _ in expected.gradients}
    assert CONNECTOR in names and len(watch.gradients) == len(expected.gradients) == 8 * len(names)
    for step in range(8):
        part = slice(step * len(names), (step + 1) * len(names))
        assert_same(dict(watch.gradients[part]), dict(expected.gradients[part]))
    assert_same(runner.model.state_dict(), expected_runner.model.state_dict())
    assert "fused normalisation and CWD of loss_feat" in log_of(runner)


def test_nothing_of_the_norms_is_left_and_the_connector_learns(tmp_path):
    runner, watch = run(tmp_path, [FUSE], epochs=1)
    average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    for model in (runner.model, average):
        assert not batch_norms(model.distiller) and batch_norms(model.architecture)
        assert list(model.distiller.connectors) == ["feat_s"]
    weight = runner.model.get_parameter(CONNECTOR)
    held = [parameter for group in runner.optim_wrapper.optimizer.param_groups for parameter in group["params"]]
    assert any(parameter is weight for parameter in held)
    assert (weight - watch.distiller.connectors["feat_s"].conv_module.conv.weight).abs().max() > 1e-4
    assert runner.model.distiller.connectors["feat_s"].conv_module.conv.bias is None


@pytest.mark.parametrize("before, after", [([], [FUSE]), ([FUSE], [])], ids=["taken up", "laid down"])
def test_resume_with_and_without(tmp_path, before, after):
    evaluate = dict(type="mmrazor.KDOpsTeacherEvalHook")  # no dropout: the teacher draws nothing
    whole, _ = run(tmp_path / "whole", [*before, evaluate])
    checkpoint = str(tmp_path / "whole" / "epoch_2.pth")
    again, watch = run(tmp_path / "again", [*after, evaluate], resume=True, load_from=checkpoint)
    assert len(watch.losses) == 4 and bool(after) != bool(batch_norms(again.model.distiller))
    assert_same(again.model.state_dict(), whole.model.state_dict())


def algorithm(**student):
    model = toys.algorithm()
    model["distiller"]["connectors"]["feat_s"].update(student)
    return model


def test_says_what_it_left(tmp_path):
    runner, watch = run(tmp_path, [FUSE], model=algorithm(act_cfg=dict(type="ReLU")), epochs=1)
    assert "kdops: fused normalisation and CWD of no loss" in log_of(runner)
    assert "kdops: left loss_feat: the student's connector has an activation" in log_of(runner)
    assert len(batch_norms(watch.distiller)) == 2 and watch.losses[0]["distill.loss_feat"] > 1e-3


def test_leaves_synchronised_norms():
    model = MODELS.build(toys.algorithm())
    synchronised = convert_sync_batchnorm(model)
    connectors = dict(synchronised.distiller.connectors)
    report = fuse_in_place(synchronised.distiller, toys.algorithm())
    assert not report.fused and "is SyncBN, not one of" in report.left["loss_feat"]
    assert dict(synchronised.distiller.connectors) == connectors


def test_rtmdet_becomes_what_its_fused_config_builds():
    cfg = recipes.stock_config(recipes.PAIRS[0])
    model, expected = recipes.build(cfg.model), recipes.build(fuse(cfg)[0].model)
    with DefaultScope.overwrite_default_scope("mmyolo"):
        assert fuse_in_place(model.distiller, cfg).fused == ["loss_fpn0", "loss_fpn1", "loss_fpn2"]
    assert str(model.distiller) == str(expected.distiller)
    logs = [recipes.train(network, cfg, 128, steps=2) for network in (model, expected)]
    for got, want in zip(*logs):
        assert_same(got, want)


def test_draws_no_random_number():
    model = MODELS.build(toys.algorithm())
    state = torch.get_rng_state()
    assert fuse_in_place(model.distiller, dict(model=toys.algorithm())).fused == ["loss_feat"]
    assert torch.equal(torch.get_rng_state(), state)


def test_by_a_command_line_option_and_once(tmp_path):
    cfg = Config(dict(
        model=toys.algorithm(), work_dir=str(tmp_path), train_dataloader=toys.LOADER, optim_wrapper=toys.SGD,
        train_cfg=dict(by_epoch=True, max_epochs=1), default_hooks=dict(logger=dict(type="LoggerHook", interval=1))))
    cfg.merge_from_dict({"default_hooks.fuse.type": FUSE["type"]})
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert not batch_norms(runner.model.distiller)
    runner.call_hook("before_run")  # as when the Runner validates after it has trained
    assert log_of(runner).count("fused normalisation") == 1


def test_leaves_a_distiller_that_fuses_itself(tmp_path):
    model = toys.algorithm()
    model["distiller"]["type"] = "KDOpsDistiller"
    runner, watch = run(tmp_path, [FUSE], model=model, epochs=1)
    assert "a KDOpsDistiller is fused already" in log_of(runner)
    assert not batch_norms(watch.distiller) and watch.losses[0]["distill.loss_feat"] > 1e-3


def test_refuses(tmp_path):
    with pytest.raises(TypeError, match="with a ConfigurableDistiller, got ToyDetector"):
        run(tmp_path / "plain", [FUSE], model=toys.algorithm()["architecture"])
    runner = toys.runner(tmp_path / "built", [FUSE])
    runner.cfg = Config()  # as of Runner(model=...)
    with pytest.raises(TypeError, match="must be built from a config with a model"):
        runner.train()
    with pytest.raises(ValueError, match="must have the connectors of its config"):
        fuse_in_place(MODELS.build(toys.algorithm()).distiller, dict(distill_losses={}))
