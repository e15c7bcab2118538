"""The published formulas, written out from the released systems' definitions, against the fused losses."""

import pytest
import torch
import torch.nn.functional as F

import kdops
from kdops.testing import relative_error


def channel_wise_divergence(preds_S, preds_T, tau, loss_weight):
    """MMRazor's ChannelWiseDivergence."""
    n, c, h, w = preds_S.shape
    p_t = F.softmax(preds_T.reshape(-1, h * w) / tau, dim=1)
    log_t = F.log_softmax(preds_T.reshape(-1, h * w) / tau, dim=1)
    log_s = F.log_softmax(preds_S.reshape(-1, h * w) / tau, dim=1)
    return loss_weight * torch.sum(p_t * log_t - p_t * log_s) * tau**2 / (c * n)


def batch_norm(channels):
    """The norm_cfg of the RTMDet distillation configs."""
    return torch.nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def pkd_norm(x):
    """PKD's normalisation: unbiased deviation over N, H and W, 1e-6 added to it."""
    flat = x.transpose(0, 1).reshape(x.shape[1], -1)
    return (x - flat.mean(1).view(1, -1, 1, 1)) / (flat.std(1).view(1, -1, 1, 1) + 1e-6)


def pair(*shape, dtype=torch.float64, mean=0.0):
    generator = torch.Generator().manual_seed(1)
    student = (torch.randn(shape, generator=generator) + mean).to(dtype).requires_grad_()
    return student, (torch.randn(shape, generator=generator) * 1.5 - mean).to(dtype)


def assert_equal(ours, theirs, student, budget=1e-10):
    assert relative_error(ours, theirs) < budget
    (got,), (expected,) = torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student)
    assert relative_error(got, expected) < budget


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_mmrazor_channel_wise_divergence(backend, tau):
    student, teacher = pair(2, 6, 9, 11)
    ours = kdops.CWDLoss(tau=tau, loss_weight=5.0, backend=backend)(student, teacher)
    assert_equal(ours, channel_wise_divergence(student, teacher, tau, 5.0), student)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rtmdet_connectors_and_divergence(backend):
    """1x1 convolution, BatchNorm without parameters on both sides, then CWD."""
    student, teacher = pair(3, 8, 10, 12)
    connector = torch.nn.Conv2d(8, 8, 1, bias=False).double()
    aligned = connector(student)
    theirs = channel_wise_divergence(batch_norm(8)(aligned), batch_norm(8)(teacher), 1.0, 1.0)
    assert_equal(kdops.cwd_loss(connector(student), teacher, norm="batch", backend=backend), theirs, student)
    ours = kdops.cwd_loss(connector(student), teacher, norm="batch", backend=backend)
    theirs = channel_wise_divergence(batch_norm(8)(connector(student)), batch_norm(8)(teacher), 1.0, 1.0)
    assert_equal(ours, theirs, connector.weight)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_mmrazor_pkd(backend):
    students, teachers = zip(*(pair(2, 5, size, size + 1, mean=3.0) for size in (8, 4, 2)))
    theirs = 6.0 * sum(F.mse_loss(pkd_norm(s), pkd_norm(t)) / 2 for s, t in zip(students, teachers))
    ours = kdops.PKDLoss(loss_weight=6.0, backend=backend)(students, teachers)
    for student in students:
        (got,) = torch.autograd.grad(ours, student, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs, student, retain_graph=True)
        assert relative_error(got, expected) < 1e-10
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_mmrazor_pkd_resize(backend, resize):
    student, _ = pair(2, 5, 8, 12)
    _, teacher = pair(2, 5, 5, 7)

    def to(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    s, t = (to(student, teacher), teacher) if resize == "student" else (student, to(teacher, student))
    assert_equal(
        kdops.pkd_loss(student, teacher, resize=resize, backend=backend),
        F.mse_loss(pkd_norm(s), pkd_norm(t)) / 2,
        student,
    )


def test_resize_leaves_equal_sizes_alone():
    student, teacher = pair(2, 5, 8, 12)
    assert torch.equal(kdops.pkd_loss(student, teacher, resize="student"), kdops.pkd_loss(student, teacher))


def test_pkd_is_one_minus_pearson():
    """loss = (M-1)/M * (1 - mean correlation), up to eps."""
    student, teacher = pair(2, 5, 8, 12)
    rows = [x.detach().transpose(0, 1).reshape(5, -1) for x in (student, teacher)]
    correlation = torch.stack([torch.corrcoef(torch.stack(both))[0, 1] for both in zip(*rows)]).mean()
    m = rows[0].shape[1]
    assert relative_error(kdops.pkd_loss(student, teacher, eps=0.0), (m - 1) / m * (1 - correlation)) < 1e-10


def test_two_conventions_differ_where_the_deviation_is_small():
    student, teacher = pair(2, 4, 8, 8)
    student, teacher = student * 0.01, teacher * 0.01
    batch, pkd = (kdops.cwd_loss(student, teacher, norm=norm) for norm in ("batch", "pkd"))
    assert abs(batch - pkd) / pkd > 0.01


@pytest.mark.parametrize("loss", [kdops.cwd_loss, kdops.pkd_loss])
def test_reductions_belong_together(loss):
    student, teacher = pair(3, 5, 6, 7)
    none = loss(student, teacher, reduction="none")
    assert none.shape == ((3, 5) if loss is kdops.cwd_loss else (5,))
    assert relative_error(none.mean(), loss(student, teacher)) < 1e-12
    assert relative_error(none.sum(), loss(student, teacher, reduction="sum")) < 1e-12
    levels = loss([student, student], [teacher, teacher], reduction="none")
    assert isinstance(levels, list) and all(torch.equal(level, none) for level in levels)


@pytest.mark.parametrize("loss", [kdops.cwd_loss, kdops.pkd_loss])
def test_levels_are_summed(loss):
    student, teacher = zip(*(pair(2, c, 6, 7) for c in (3, 5)))
    separately = sum(loss(s, t) for s, t in zip(student, teacher))
    assert relative_error(loss(student, teacher), separately) < 1e-12


@pytest.mark.parametrize("loss", [kdops.cwd_loss, kdops.pkd_loss])
def test_levels_may_be_any_iterable(loss):
    student, teacher = zip(*(pair(2, c, 6, 7) for c in (3, 5)))
    expected = loss(student, teacher)
    assert torch.equal(loss((s for s in student), map(torch.clone, teacher)), expected)
    assert torch.equal(loss(dict(enumerate(student)).values(), list(teacher)), expected)


@pytest.mark.parametrize("module", [kdops.CWDLoss, kdops.PKDLoss])
def test_module_is_its_function(module):
    student, teacher = pair(2, 3, 4, 5, dtype=torch.float32)
    function = kdops.cwd_loss if module is kdops.CWDLoss else kdops.pkd_loss
    options = {"norm": "batch", "eps": 1e-3, "loss_weight": 2.0, "reduction": "sum"}
    made = module(**options)
    assert torch.equal(made(preds_S=student, preds_T=teacher), function(student, teacher, **options))
    assert "loss_weight=2.0" in repr(made) and not list(made.parameters())
