"""A prepared teacher in copies, pickles and state dicts, at the stop, before the next teacher, and in two processes."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_networks import LAYERS, Detector, images, pair, targets
from teacher_networks import settle
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdops import CWDLoss
from kdops.distill import (
    DistilledStudent,
    Distiller,
    ProgressiveDistillation,
    Stage,
    StopDistillation,
    Tap,
    TeacherOptions,
)

FOLD = TeacherOptions(compile=False)


def _taps() -> list[Tap]:
    return [Tap(layer, loss=CWDLoss(norm="batch"), align=(6, 10)) for layer in LAYERS]


def _distiller(student: nn.Module, teacher, options: TeacherOptions | None = FOLD, **kwargs) -> Distiller:
    torch.manual_seed(7)
    return Distiller(student, teacher, _taps(), teacher_options=options, **kwargs)


def _settled_pair() -> tuple[Detector, Detector]:
    student, teacher = pair()
    return student, settle(teacher)


def test_state_dict_is_that_of_a_run_without_preparing():
    student, teacher = _settled_pair()
    plain, distiller = _distiller(student, copy.deepcopy(teacher), None), _distiller(student, teacher)
    student(images())
    assert distiller.loss().total.item() == pytest.approx(plain.loss().total.item(), rel=1e-5)
    assert distiller.teacher_report.folded == ["stem.0"]
    assert list(distiller.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(distiller.state_dict())
    distiller.load_state_dict(plain.state_dict())
    assert not any(module is distiller.teacher for module in distiller.modules())


def test_copy_shares_the_prepared_teacher():
    student, teacher = _settled_pair()
    model = DistilledStudent(_distiller(student, teacher))
    model(images())
    twin = copy.deepcopy(model)
    assert twin.distiller.teacher is model.distiller.teacher is not teacher
    assert twin(images()).distill.item() == model(images()).distill.item() > 0
    twin.to(torch.float64)
    assert {p.dtype for p in model.distiller.teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [FOLD, TeacherOptions(dtype=torch.bfloat16, compile=False)])
@pytest.mark.parametrize("before", [True, False])
def test_pickle_before_and_after_the_first_batch(options, before):
    student, teacher = _settled_pair()
    model = DistilledStudent(_distiller(student, teacher, options))
    if not before:
        model(images())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert (twin.distiller.teacher_report is None) == before
    assert twin(images()).distill.item() == model(images()).distill.item() > 0
    assert isinstance(twin.distiller.teacher.stem[1], nn.Identity)


def test_to_moves_the_prepared_teacher_and_not_the_given_one():
    student, teacher = _settled_pair()
    distiller = _distiller(student, teacher)
    student(images())
    distiller.loss()
    distiller.to(torch.float64)
    student.to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    student(images().double())
    assert distiller.loss().total.dtype == torch.float64


def test_stop_lets_go_of_everything():
    student, _ = _settled_pair()
    made = []

    def load() -> nn.Module:
        teacher = settle(Detector(10))
        made.append(weakref.ref(teacher))
        return teacher

    distiller = _distiller(student, load, stop=StopDistillation(step=1))
    gc.collect()
    assert made[0]() is None, "only a copy on its memory is held"
    student(images())
    distiller.loss()
    weights = [weakref.ref(p) for p in distiller.teacher.parameters()]
    distiller.step()
    assert distiller.stopped and distiller.teacher is None
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert pickle_round(distiller).stopped


def pickle_round(distiller: Distiller) -> Distiller:
    buffer = io.BytesIO()
    torch.save(distiller, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_change_of_teachers():
    student, first = _settled_pair()
    second = settle(Detector(10), seed=1)
    runs = {}
    for options in (None, FOLD):
        torch.manual_seed(7)
        twin = copy.deepcopy(student)
        stages = [Stage(copy.deepcopy(teacher), _taps(), steps=2) for teacher in (first, second)]
        distiller = ProgressiveDistillation(twin, stages, teacher_options=options)
        optimizer = torch.optim.SGD([*twin.parameters(), *distiller.parameters()], lr=0.05)
        distiller.bind(optimizer)
        values, reports = [], []
        while not distiller.stopped:
            optimizer.zero_grad()
            loss = twin(images(seed=len(values)), targets())["loss_box"] + distiller.loss()
            loss.backward()
            optimizer.step()
            reports.append(distiller.distiller.teacher_report)
            distiller.step()
            values.append(loss.item())
        runs[options] = values
    assert len(runs[FOLD]) == 4
    assert runs[FOLD] == pytest.approx(runs[None], rel=1e-5)
    assert reports[0] is reports[1] and reports[2] is reports[3] and reports[0] is not reports[2]
    assert all(report.folded == ["stem.0"] for report in reports)


def _train(rank: int, world: int, options: TeacherOptions | None, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = Detector(6), settle(Detector(10))
    student.stem[1] = nn.GroupNorm(2, 6)  # no statistics over the batch, which the processes share
    torch.manual_seed(seed)
    model = DistilledStudent(Distiller(student, teacher, _losses(), teacher_options=options))
    call = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        out = call(images(8, seed=step)[part], targets(8, seed=step)[part])
        optimizer.zero_grad()
        (out.student["loss_box"] + out.distill).backward()
        optimizer.step()
        model.distiller.step()
    assert (model.distiller.teacher_report is None) == (options is None)
    return model.state_dict()


def _losses() -> list[Tap]:
    """Without statistics over the batch, which the processes share."""
    return [Tap(layer, loss=CWDLoss(norm=None, tau=2.0), align=(6, 10)) for layer in LAYERS]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_train(rank, 2, FOLD, seed=rank), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_give_the_parameters_of_one_without_preparing():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2))
    expected = _train(0, 1, None, seed=0)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def test_torchvision_detector_changes_no_loss():
    """The demo's networks: FCOS on a ResNet with an FPN, whose forward is no graph."""
    models = pytest.importorskip("kdops.integrations.pytorch.demo.models", reason="needs torchvision")
    torch.manual_seed(0)
    big = settle(models.build_detector(models.DetectorConfig("fcos", "resnet18", 64, 5, 96)))
    small = models.build_detector(models.DetectorConfig("fcos", "slim10", 32, 5, 96)).train()
    align = nn.Conv2d(32, 64, 1)
    taps = [Tap(level, loss=CWDLoss(norm="batch"), align=align) for level in models.FPN_LEVELS]
    plain = Distiller(small, copy.deepcopy(big), taps)
    distiller = Distiller(small, big, taps, teacher_options=FOLD)
    boxes = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        small([torch.rand(3, 96, 96, generator=generator)] * 2, [boxes] * 2)
        assert distiller.loss().total.item() == pytest.approx(plain.loss().total.item(), rel=1e-5)
    assert len(distiller.teacher_report.folded) == 20 and not distiller.teacher_report.left
    assert max(distiller.teacher_report.differences.values()) < 1e-5
