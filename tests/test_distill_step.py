"""One training step with a Distiller: the value, the gradients, and what the teacher is put through."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from distill_networks import (
    LAYERS,
    Detector,
    cwd_batch,
    cwd_plain,
    gradients,
    images,
    maps_of,
    pair,
    targets,
    teacher_maps,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kdops.distill._terms as terms_module
from kdops import CWDLoss, MGDLoss, PKDLoss, cwd_loss
from kdops.distill import Distiller, Tap


def _taps(widths: tuple[int, int] = (6, 10), **kwargs) -> list[Tap]:
    return [Tap(layer, loss=CWDLoss(norm="batch"), align=widths, **kwargs) for layer in LAYERS]


def _oracle(student: nn.Module, teacher: nn.Module, distiller: Distiller, x: Tensor) -> Tensor:
    """The loss through copies of student and aligns, whose gradients are then compared."""
    aligns = [distiller.taps.align[key] for key in ("0", "1")]
    s = [align(m) for align, m in zip(aligns, maps_of(student, LAYERS, x))]
    return sum(cwd_batch(a, b) for a, b in zip(s, teacher_maps(teacher, LAYERS, x)))


def test_value_and_gradients_equal_the_eager_formula():
    student, teacher = pair(drop=True)
    distiller = Distiller(student, teacher, _taps())
    twin = copy.deepcopy(distiller)
    x = images()

    student(x)
    result = distiller.loss()
    (result + 0.0).backward()
    expected = _oracle(twin.student, teacher, twin, x)
    expected.backward()

    assert result.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(result.terms) == ["neck.out.0+neck.out.1"]
    got, wanted = gradients(student, distiller), gradients(twin.student, twin)
    assert len(got) == len(wanted) > 6
    for g, w in zip(got, wanted):
        assert g.norm() > 0
        torch.testing.assert_close(g, w, rtol=2e-4, atol=1e-7)


def test_result_adds_to_the_task_loss_from_both_sides():
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    task = student(images(), targets())["loss_box"]
    result = distiller.loss()
    assert (task + result).item() == pytest.approx((task + result.total).item())
    assert (result + task).item() == pytest.approx((task + result.total).item())
    assert sum([task, result]).requires_grad
    assert not result.log["neck.out.0+neck.out.1"].requires_grad


@pytest.mark.parametrize("split", [False, True])
def test_taps_with_the_same_loss_and_options_share_one_call(monkeypatch, split):
    calls = []

    @functools.wraps(cwd_loss)
    def counted(student, teacher, **options):
        calls.append((len(student), options["tau"]))
        return cwd_loss(student, teacher, **options)

    monkeypatch.setitem(terms_module._MULTI_LEVEL, CWDLoss, counted)
    student, teacher = pair()
    taps = [
        Tap("neck.out.0", loss=CWDLoss(norm="batch", tau=2.0), align=(6, 10)),
        Tap("neck.out.1", loss=CWDLoss(norm="batch", tau=2.0), align=(6, 10), name="p4"),
        Tap("stage", loss=CWDLoss(norm="batch", tau=2.0), align=(6, 10), weight=3.0),
        Tap("stage", loss=CWDLoss(norm="batch", tau=4.0), align=(6, 10), name="hot"),
        Tap("stage", loss=PKDLoss(), align=(6, 10), name="pkd"),
    ]
    distiller = Distiller(student, teacher, taps, split_terms=split)
    x = images()
    student(x)
    terms = distiller.loss().terms

    assert calls == [(2, 2.0), (1, 2.0), (1, 4.0)]
    first = ["neck.out.0", "p4"] if split else ["neck.out.0+p4"]
    assert list(terms) == [*first, "stage", "hot", "pkd"]
    aligned = [distiller.taps.align[str(i)](m) for i, m in enumerate(maps_of(student, (*LAYERS, "stage"), x))]
    wanted = [cwd_batch(s, t, 2.0) for s, t in zip(aligned, teacher_maps(teacher, (*LAYERS, "stage"), x))]
    assert sum(terms[name] for name in first).item() == pytest.approx(sum(wanted[:2]).item(), rel=1e-4)
    if split:
        assert terms["p4"].item() == pytest.approx(wanted[1].item(), rel=1e-4)
    assert terms["stage"].item() == pytest.approx(3 * wanted[2].item(), rel=1e-4)


def test_kdops_functions_and_partials_are_grouped_with_equal_options():
    student, teacher = pair(6, 6)
    hot = functools.partial(cwd_loss, tau=2.0)
    taps = [
        Tap("stage", loss=hot),
        Tap("neck.out.0", loss=functools.partial(cwd_loss, tau=2.0)),
        Tap("neck.out.1", loss=cwd_loss),
    ]
    distiller = Distiller(student, teacher, taps)
    student(images())
    assert list(distiller.loss().terms) == ["stage+neck.out.0", "neck.out.1"]


def test_any_module_of_two_arguments_is_a_loss():
    student, teacher = pair(6, 6)
    distiller = Distiller(student, teacher, [Tap("stage", loss=nn.MSELoss(), weight=0.5)], weight=4.0)
    x = images()
    student(x)
    (s,), (t,) = maps_of(copy.deepcopy(student), ("stage",), x), teacher_maps(teacher, ("stage",), x)
    assert distiller.loss().total.item() == pytest.approx(2 * (s - t).square().mean().item(), rel=1e-5)


def test_mgd_has_its_published_value_and_all_its_parameters_are_the_distillers():
    student, teacher = pair()
    mgd = MGDLoss(6, 10, alpha_mgd=1e-2, lambda_mgd=0.0)
    distiller = Distiller(student, teacher, [Tap("stage", loss=mgd)])
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in mgd.parameters()}
    assert "taps.loss.0.generation.2.bias" in distiller.state_dict()
    x = images()
    student(x)
    (s,), (t,) = maps_of(copy.deepcopy(student), ("stage",), x), teacher_maps(teacher, ("stage",), x)
    wanted = (mgd.generation(mgd.align(s)) - t).square().sum() / 4 * 1e-2
    assert distiller.loss().total.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_mgd_is_trained_with_the_student():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [Tap("stage", loss=MGDLoss(6, 10, alpha_mgd=1e-2))])
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=1e-2)
    values = []
    for _ in range(12):
        student(images())
        loss = distiller.loss()
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad.abs().sum() > 0 for p in distiller.parameters())
        optimizer.step()
        values.append(loss.total.item())
    assert values[-1] < 0.8 * values[0]


def test_teacher_is_frozen_in_eval_throughout_and_without_gradients():
    student, teacher = pair(drop=True)
    teacher.train()
    distiller = Distiller(student, teacher, _taps())
    seen = []
    teacher.stem.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    values = []
    for _ in range(3):
        teacher.train()
        student(images())
        values.append(distiller.loss().total.item())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert seen == [False] * 3
    assert values[0] == values[1] == values[2], "dropout or drop-path was active"


def test_teacher_runs_no_deeper_than_its_last_tapped_layer():
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    runs = []
    for network in (student, teacher):
        network.head.register_forward_hook(lambda *_, network=network: runs.append(network))
    for _ in range(3):
        student(images())
        distiller.loss()
    assert runs.count(teacher) == 2, "only the first, checking run may reach the head"
    assert runs.count(student) == 6


def test_teacher_gets_the_students_arguments_or_is_run_by_a_function():
    class Strict(Detector):
        def forward(self, images, targets=None):
            assert targets is not None
            self.got = (images, targets)
            return super().forward(images, targets)

    torch.manual_seed(0)
    student, teacher = Detector(6), Strict(10)
    x, y = images(), targets()
    distiller = Distiller(student, teacher, _taps())
    student(x, targets=y)
    distiller.loss()
    assert teacher.got[0] is x and teacher.got[1] is y

    student = Detector(6)
    distiller = Distiller(
        student, teacher, _taps(), run_teacher=lambda net, images, targets: net(images=2 * images, targets=targets)
    )
    student(x, targets=y)
    distiller.loss()
    assert torch.equal(teacher.got[0], 2 * x)


@pytest.mark.parametrize("inside", [True, False])
def test_teacher_runs_in_the_students_autocast_state(inside):
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    seen = []
    teacher.neck.out[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        student(images())
        result = distiller.loss() if inside else None
    result = result or distiller.loss()
    student(images())
    with torch.autocast("cpu", torch.bfloat16):
        distiller.loss()
    assert seen == [torch.bfloat16, torch.float32]
    assert result.total.dtype == torch.float32
    result.total.backward()
    assert distiller.taps.align["0"].weight.grad.abs().sum() > 0


def test_features_are_released_after_each_step():
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    maps = []
    for network in (student, teacher):
        network.neck.out[0].register_forward_hook(lambda _m, _a, out: maps.append(weakref.ref(out)))
    x = images()
    batch = weakref.ref(x)
    student(x)
    result = distiller.loss()
    assert len(maps) == 2 and maps[0]() is not None
    result.total.backward()
    del result, x
    gc.collect()
    assert [m() for m in maps] == [None, None]
    assert batch() is None


def test_evaluation_records_nothing():
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    with torch.no_grad():
        student(images())
    student.eval()
    student(images())
    student.train()
    student(images())
    assert distiller.loss().total > 0


def test_gradient_accumulation_sums_the_gradients_of_its_parts():
    student, teacher = pair()
    student.stem[1].training = False
    distiller = Distiller(student, teacher, [Tap(layer, loss=CWDLoss(), align=(6, 10)) for layer in LAYERS])
    x = images()
    for part in x.chunk(2):
        student(part)
        (distiller.loss().total / 2).backward()
    accumulated = gradients(student, distiller)
    student.zero_grad()
    distiller.zero_grad()
    student(x)
    distiller.loss().total.backward()
    for a, b in zip(accumulated, gradients(student, distiller)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


class _Checkpointed(nn.Module):
    def __init__(self, inner: Detector, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing_gives_the_same_gradients_step_after_step(whole):
    plain, teacher = pair()
    inner = copy.deepcopy(plain)
    reference = Distiller(plain, teacher, _taps())
    prefix = "" if whole else "inner."
    student = inner if whole else _Checkpointed(inner, reentrant=False)
    taps = [Tap(prefix + layer, layer, loss=CWDLoss(norm="batch"), align=(6, 10)) for layer in LAYERS]
    distiller = Distiller(student, teacher, taps)
    distiller.taps.load_state_dict(reference.taps.state_dict())
    for _ in range(2):
        plain(images())
        expected = reference.loss()
        expected.total.backward()
        if whole:
            checkpoint(student, images(), use_reentrant=False)
        else:
            student(images())
        result = distiller.loss()
        result.total.backward()
        torch.testing.assert_close(result.total, expected.total)
        for a, b in zip(gradients(inner, distiller), gradients(plain, reference)):
            torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_is_refused_because_the_map_has_no_gradient():
    inner, teacher = pair()
    student = _Checkpointed(inner, reentrant=True)
    distiller = Distiller(student, teacher, [Tap("inner.stage", "stage", loss=CWDLoss(), align=(6, 10))])
    student(images().requires_grad_())
    with pytest.raises(RuntimeError, match=r"student layer 'inner.stage' carries no gradient.*use_reentrant=True"):
        distiller.loss()


def test_two_teachers_at_once_are_two_distillers():
    student, first = pair()
    second = Detector(8)
    one = Distiller(student, first, [Tap("stage", loss=CWDLoss(), align=(6, 10))])
    two = Distiller(student, second, [Tap("stage", loss=CWDLoss(), align=(6, 8))])
    x = images()
    student(x)
    total = one.loss() + two.loss().total
    (s,) = maps_of(copy.deepcopy(student), ("stage",), x)
    wanted = [
        cwd_plain(d.taps.align["0"](s), teacher_maps(t, ("stage",), x)[0]) for d, t in ((one, first), (two, second))
    ]
    assert total.item() == pytest.approx(sum(wanted).item(), rel=1e-4)


def test_a_distiller_that_no_optimizer_trains_is_reported():
    student, teacher = pair()
    distiller = Distiller(student, teacher, _taps())
    with pytest.warns(UserWarning, match="no optimizer has changed the align layers"):
        for _ in range(52):
            student(images(2, 8))
            distiller.loss().total.backward()
