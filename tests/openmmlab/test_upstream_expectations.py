"""What MMRazor's own tests expect of the names that kdops takes over, of kdops behind those names."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from kdops.integrations.mmrazor import KDOpsDistiller
from mmengine.config import ConfigDict
from mmrazor.registry import HOOKS, MODELS
from torch import nn

SCOPE = "mmrazor"

pytestmark = pytest.mark.usefixtures("stock_names")


def build(kind, **options):
    made = MODELS.build(dict(type=kind, **options))
    assert type(made).__name__ == "KDOps" + kind
    return made


def feature(*shape):
    return torch.rand(shape or (2, 256, 4, 4))


def test_stop_hook_tells_any_model_that_has_the_flag():
    """A runner of which only the epoch and the model's flag are real."""
    hook = HOOKS.build(dict(type="StopDistillHook", stop_epoch=5))
    assert type(hook).__name__ == "KDOpsStopDistillHook"
    runner = Mock()
    runner.model.distillation_stopped = False
    told = []
    for runner.epoch in range(10):
        hook.before_train_epoch(runner)
        told.append(runner.model.distillation_stopped)
    assert told == [False] * 5 + [True] * 5


def test_stop_hook_takes_its_epoch_by_position():
    assert HOOKS.get("StopDistillHook")(5).stop_epoch == 5


def test_pkd_of_one_level_is_between_0_and_1():
    loss = build("PKDLoss", loss_weight=1.0)(feature(), feature())
    assert loss.numel() == 1 and 0 <= loss <= 1


@pytest.mark.parametrize("kind", [tuple, list, iter])
def test_pkd_takes_its_levels_from_any_iterable(kind):
    students, teachers = ([feature() for _ in range(4)] for _ in range(2))
    pkd = build("PKDLoss", loss_weight=1.0)
    loss = pkd(kind(students), kind(teachers))
    assert loss.numel() == 1 and 0 <= loss <= 4
    torch.testing.assert_close(loss, sum(map(pkd, students, teachers)))
    generated = pkd((level for level in students), (level for level in teachers))
    assert torch.equal(generated, loss)


@pytest.mark.parametrize("resize_stu", [True, False])
def test_pkd_resizes_either_side(resize_stu):
    loss = build("PKDLoss", loss_weight=1.0, resize_stu=resize_stu)(feature(2, 256, 2, 2), feature())
    assert loss.numel() == 1 and 0 <= loss <= 1


@pytest.mark.parametrize(
    "kind, options",
    [
        ("MGDLoss", dict(alpha_mgd=2e-5)),
        ("ChannelWiseDivergence", dict(tau=1.0, loss_weight=3)),
    ],
)
def test_losses_of_maps_are_one_number(kind, options):
    loss = build(kind, **options)
    assert loss(feature(), feature()).numel() == 1
    same = feature(5, 2, 3, 3)
    assert loss(same, same) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mask_on_channel", [False, True])
@pytest.mark.parametrize("teacher_channels", [16, 32])
def test_mgd_connector_gives_maps_as_wide_as_the_teachers(mask_on_channel, teacher_channels):
    connector = build(
        "MGDConnector",
        student_channels=16,
        teacher_channels=teacher_channels,
        lambda_mgd=0.65,
        mask_on_channel=mask_on_channel,
    )
    assert connector.forward_train(feature(1, 16, 8, 8)).shape == (1, teacher_channels, 8, 8)


@pytest.fixture
def toy_loss():
    class ToyLoss(nn.Module):
        def forward(self, arg1, arg2):
            return arg1 + arg2

    MODELS.register_module(module=ToyLoss)
    yield
    MODELS.module_dict.pop("ToyLoss")


def distiller(**changes):
    """A distiller of one toy loss, with some of its entries (``a.b`` for nested ones) set otherwise."""
    recorders = dict(conv=dict(type="ModuleOutputs", source="conv"))
    cfg = ConfigDict(
        student_recorders=recorders,
        teacher_recorders=recorders,
        distill_losses=dict(loss_toy=dict(type="ToyLoss")),
        loss_forward_mappings=dict(
            loss_toy=dict(arg1=dict(from_student=True, recorder="conv"), arg2=dict(from_student=False, recorder="conv"))
        ),
    )
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = cfg
        for name in outer:
            target = target[name]
        target[last] = copy.deepcopy(value)
    return MODELS.build(dict(type="KDOpsDistiller", **cfg))


def test_distiller_builds_what_is_well_formed(toy_loss):
    assert isinstance(distiller(), KDOpsDistiller)
    assert set(distiller(loss_forward_mappings=None).distill_losses) == {"loss_toy"}
    assert not distiller(loss_forward_mappings=None, distill_losses=None).distill_losses
    norm = dict(type="BN", affine=False, track_running_stats=False)
    chain = [
        dict(type="ConvModuleConnector", in_channel=3, out_channel=4, act_cfg=None),
        dict(type="NormConnector", norm_cfg=norm, in_channels=4),
    ]
    chained = distiller(connectors=dict(s=chain), loss_forward_mappings__loss_toy__arg1__connector="s")
    assert isinstance(chained.connectors["s"], nn.Sequential)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(distill_losses=None), AssertionError, '"loss_toy" is not in distill'),
        (dict(loss_forward_mappings=["A"]), TypeError, "loss_forward_mappings should be"),
        (dict(loss_forward_mappings__loss_toy=[]), TypeError, "Each item of loss_forward_mappings should be"),
        (dict(loss_forward_mappings__loss_toy__arg1__from_student=""), TypeError, "from_student should be a bool"),
    ],
    ids=["no losses", "no dict", "no dict of a loss", "no bool"],
)
def test_distiller_refuses_what_mmrazors_refuses_in_its_words(toy_loss, changes, error, message):
    with pytest.raises(error, match=message):
        distiller(**changes)


def test_distiller_warns_of_a_loss_that_does_not_count(toy_loss):
    mapping = dict(arg1=dict(from_student=True, recorder="conv"), arg2=dict(from_student=False, recorder="conv"))
    with pytest.warns(UserWarning, match="If toy is a"):
        distiller(distill_losses=dict(toy=dict(type="ToyLoss")), loss_forward_mappings=dict(toy=mapping))
