"""Weights over training, and the end of distillation."""

from __future__ import annotations

import gc
import math
import time
import weakref

import pytest
import torch
from distill_networks import LAYERS, Detector, images, pair, targets
from torch import nn

from kdops import CWDLoss, PKDLoss
from kdops.distill import (
    ConstantWeight,
    CosineWeight,
    DistilledStudent,
    Distiller,
    LinearWeight,
    StopDistillation,
    Tap,
    WarmupWeight,
)


def _distiller(student: nn.Module, teacher, **kwargs) -> Distiller:
    taps = [Tap(layer, loss=CWDLoss(norm="batch"), align=(6, 10)) for layer in LAYERS]
    return Distiller(student, teacher, taps, **kwargs)


def test_cosine_is_the_published_form():
    damo = CosineWeight(1.0, 0.1, steps=300)
    for it in (0, 1, 75, 150, 299, 300):
        assert damo(it, 0) == pytest.approx(((1 - math.cos(math.pi * it / 300)) / 2) * (0.1 - 1) + 1, abs=1e-15)
    assert (damo(0, 0), damo(150, 0), damo(300, 0), damo(999, 0)) == pytest.approx((1.0, 0.55, 0.1, 0.1))
    yolov6 = CosineWeight(1.0, 0.01, epochs=10)
    assert (yolov6(12345, 0), yolov6(0, 5), yolov6(0, 10)) == pytest.approx((1.0, 0.505, 0.01))


def test_linear_constant_and_warmup():
    assert [LinearWeight(2.0, 0.0, steps=4)(i, 0) for i in range(6)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert ConstantWeight(0.3)(7, 8) == 0.3
    assert [WarmupWeight(2.0, steps=4)(i, 0) for i in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert WarmupWeight(LinearWeight(1.0, 0.0, epochs=2), steps=2)(0, 1) == pytest.approx(0.25)


def test_weights_of_taps_and_of_the_distiller_follow_the_steps():
    student, teacher = pair()
    taps = [
        Tap("stage", loss=CWDLoss(), align=(6, 10), weight=LinearWeight(1.0, 0.0, steps=2), name="fused"),
        Tap("stage", loss=lambda s, t: PKDLoss()(s, t), align=(6, 10), name="plain"),
    ]
    distiller = Distiller(student, teacher, taps, weight=lambda step, epoch: 10.0 * (epoch + 1))
    values = []
    for step in range(4):
        distiller.set_epoch(step // 2)
        student(images())
        values.append({name: term.item() for name, term in distiller.loss().terms.items()})
        distiller.step()
    fused, plain = values[0]["fused"], values[0]["plain"]
    assert fused > 0 and plain > 0
    assert [v["fused"] for v in values] == pytest.approx([fused, fused / 2, 0, 0], rel=1e-5)
    assert [v["plain"] for v in values] == pytest.approx([plain, plain, 2 * plain, 2 * plain], rel=1e-5)


@pytest.mark.parametrize(("stop", "steps_distilled"), [({"step": 3}, 3), ({"epoch": 2}, 4)])
def test_stop_comes_at_its_step_or_epoch_and_calls_back_once(stop, steps_distilled):
    student, teacher = pair()
    calls = []
    distiller = _distiller(student, teacher, stop=StopDistillation(**stop, callback=calls.append))
    distilled = 0
    for epoch in range(4):
        distiller.set_epoch(epoch)
        for _ in range(2):
            student(images())
            loss = distiller.loss()
            distilled += bool(loss.terms)
            assert bool(loss.terms) == (loss.total.item() > 0) != distiller.stopped
            distiller.step()
    assert distilled == steps_distilled
    assert calls == [distiller]


def test_stop_drops_hooks_gradients_optimizer_state_and_the_teachers_memory():
    student, teacher = pair()
    distiller = _distiller(student, teacher, stop=StopDistillation(epoch=1))
    model = DistilledStudent(distiller)
    copy_for_average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-3)
    distiller.bind(optimizer)
    task = model(images(), targets())
    (task.student["loss_box"] + task.distill).backward()
    optimizer.step()
    aligns = list(distiller.parameters())
    assert all(a.grad is not None and a in optimizer.state for a in aligns)
    gone = [weakref.ref(teacher), *(weakref.ref(p) for p in teacher.parameters())]
    del teacher, task
    gc.collect()
    assert all(ref() is not None for ref in gone)

    distiller.set_epoch(1)
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert all(a.grad is None and a not in optimizer.state for a in aligns)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    frozen = [a.detach().clone() for a in aligns]
    out = model(images(), targets())
    assert out.terms == {} and out.distill.item() == 0
    (out.student["loss_box"] + out.distill).backward()
    optimizer.step()
    assert all(torch.equal(a, f) and a.grad is None for a, f in zip(aligns, frozen))
    with pytest.raises(RuntimeError, match="the teacher is gone"):
        copy_for_average.module(images())


def test_a_step_after_the_stop_costs_what_a_plain_step_costs():
    torch.manual_seed(0)
    student, plain = Detector(24), Detector(24)
    distiller = Distiller(student, Detector(128), [Tap("stage", loss=CWDLoss(), align=(24, 128))])
    x, y = images(4, 64), targets()

    def step(network: nn.Module, distilled: bool) -> float:
        started = time.process_time()
        loss = network(x, y)["loss_box"]
        if distilled:
            loss = loss + distiller.loss()
        loss.backward()
        network.zero_grad()
        return time.process_time() - started

    def interleaved() -> float:
        times = [(step(plain, False), step(student, True)) for _ in range(30)]
        plains, others = zip(*times)
        return min(others) / min(plains)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would be counted as work
    try:
        during = interleaved()
        distiller.stop()
        after = interleaved()
    finally:
        torch.set_num_threads(threads)
    assert during > 1.3, "the teacher's forward must be visible for the comparison to mean something"
    assert after < 1.1


@pytest.mark.parametrize("by", [{"epoch": 1}, {"step": 2}])
def test_stop_survives_a_resume_and_changes_the_data_again(by):
    student, teacher = pair()
    distiller = _distiller(student, teacher, stop=StopDistillation(**by))
    for _ in range(2):
        distiller.step()
    distiller.set_epoch(1)
    assert distiller.stopped
    state = distiller.state_dict()

    student, teacher = pair()
    mosaic = {"on": True}
    resumed = _distiller(student, teacher, stop=StopDistillation(**by, callback=lambda _: mosaic.update(on=False)))
    assert mosaic["on"] and not resumed.stopped
    resumed.load_state_dict(state)
    assert resumed.stopped and resumed.teacher is None and not mosaic["on"]
    student(images())
    assert resumed.loss().terms == {}
    assert resumed.progress == (2, 1)


def test_stop_by_hand_survives_a_resume_too():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    distiller.stop()
    distiller.stop()
    resumed = _distiller(*pair())
    resumed.load_state_dict(distiller.state_dict())
    assert resumed.stopped
