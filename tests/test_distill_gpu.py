"""The Distiller on a GPU: mixed precision with a scaler, networks on two devices, and the teacher's memory."""

from __future__ import annotations

import gc

import pytest
import torch
from distill_networks import LAYERS, Detector, images, maps_of, pair, targets, teacher_maps

from kdops import CWDLoss
from kdops.distill import Distiller, StopDistillation, Tap

pytestmark = pytest.mark.gpu


def _taps(width: int = 10) -> list[Tap]:
    return [Tap(layer, loss=CWDLoss(norm="batch"), align=(6, width)) for layer in LAYERS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler_is_near_full_precision(dtype):
    student, teacher = pair()
    student.cuda()
    distiller = Distiller(student, teacher, _taps()).to("cuda")
    x, y = images().cuda(), targets().cuda()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    with torch.autocast("cuda", dtype):
        task = student(x, y)["loss_box"]
    loss = task + distiller.loss()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    halved = [p.grad.clone() for p in distiller.parameters()]
    optimizer.zero_grad()
    student(x, y)
    full = distiller.loss()
    full.total.backward()
    assert loss.item() - task.item() == pytest.approx(full.total.item(), rel=3e-2)
    for a, b in zip(halved, (p.grad for p in distiller.parameters())):
        assert b.norm() > 0 and (a - b).norm() / b.norm() < 0.1


def test_networks_on_two_devices_are_refused_and_to_mends_it():
    student, teacher = pair()
    student.cuda()
    distiller = Distiller(student, teacher, _taps())
    assert {p.device.type for p in distiller.parameters()} == {"cuda"}
    student(images().cuda())
    with pytest.raises(
        ValueError, match=r"the teacher is on cpu, but the student's maps are on cuda:0; .*to\('cuda:0'\)"
    ):
        distiller.loss()
    distiller.to("cuda")
    student(images().cuda())
    s = [distiller.taps.align[str(i)](m) for i, m in enumerate(maps_of(student, LAYERS, images().cuda()))]
    distiller.clear()
    student(images().cuda())
    t = teacher_maps(teacher, LAYERS, images().cuda())
    assert distiller.loss().total.item() == pytest.approx(
        CWDLoss(norm="batch", backend="reference")(s, t).item(), rel=1e-4
    )


def test_the_teachers_device_memory_is_free_after_the_stop():
    student = Detector(6).cuda()

    def load() -> Detector:
        return Detector(512)

    gc.collect()
    before = torch.cuda.memory_allocated()
    distiller = Distiller(student, load, _taps(512), stop=StopDistillation(step=1))
    teacher_bytes = sum(p.numel() * p.element_size() for p in distiller.teacher.parameters())
    assert torch.cuda.memory_allocated() - before >= teacher_bytes > 2**24
    student(images().cuda())
    distiller.loss().total.backward()
    student.zero_grad()
    distiller.step()
    gc.collect()
    aligns = sum(p.numel() * p.element_size() for p in distiller.parameters())
    assert torch.cuda.memory_allocated() - before < aligns + 2**20
