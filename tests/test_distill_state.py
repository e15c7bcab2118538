"""State of a Distiller: what is in a checkpoint, copies, pickles, devices and modes, resuming."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from distill_networks import LAYERS, Detector, images, pair, targets
from torch import nn

from kdops import CWDLoss
from kdops.distill import CosineWeight, DistilledOutput, DistilledStudent, Distiller, StopDistillation, Tap


def _distiller(student: nn.Module, teacher: nn.Module, align=(6, 10), **kwargs) -> Distiller:
    taps = [Tap(layer, loss=CWDLoss(norm="batch"), align=align) for layer in LAYERS]
    return Distiller(student, teacher, taps, **kwargs)


def _train(student: nn.Module, distiller: Distiller, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    values = []
    for step in steps:
        loss = student(images(seed=step), targets(seed=step))["loss_box"] + distiller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distiller.step()
        values.append(loss.item())
    return values


def _optimizer(student: nn.Module, distiller: Distiller) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-2)


def test_teacher_and_student_are_in_no_state_dict_and_no_parameters():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    model = DistilledStudent(distiller)
    assert list(distiller.state_dict()) == ["_extra_state", "taps.align.0.weight", "taps.align.1.weight"]
    assert [p.shape for p in distiller.parameters()] == [(10, 6, 1, 1)] * 2
    assert len(list(model.parameters())) == len(list(student.parameters())) + 2
    own = {id(t) for t in teacher.state_dict(keep_vars=True).values()}
    held = [*model.state_dict(keep_vars=True).values(), *model.parameters(), *model.buffers(), *distiller.buffers()]
    assert own and not own & {id(t) for t in held}
    assert not any(module is teacher for module in model.modules())
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "distiller"}
    Detector(6).load_state_dict(student.state_dict())


def test_copy_for_an_average_takes_the_student_along_and_shares_the_teacher():
    student, teacher = pair()
    model = DistilledStudent(_distiller(student, teacher))
    average = torch.optim.swa_utils.AveragedModel(model)
    twin = average.module
    assert twin.distiller.student is twin.student is not student
    assert twin.distiller.teacher is teacher
    assert twin.distiller.taps.align["0"].weight is not model.distiller.taps.align["0"].weight
    both = [model(images()), twin(images())]
    assert both[0].distill.item() == both[1].distill.item() > 0
    twin.to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}, "a copy must not move the shared teacher"
    twin.eval()
    with torch.no_grad():
        assert isinstance(average(images().double()), torch.Tensor)


def test_copy_of_the_student_alone_is_a_plain_student():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    before = gc_count(Detector)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        twin(images())
        with pytest.raises(RuntimeError, match="has not been run"):
            distiller.loss()
    assert gc_count(Detector) <= before + 2, "the teacher was copied along"
    student(images())
    assert distiller.loss().total > 0


def gc_count(kind: type) -> int:
    gc.collect()
    return sum(type(o) is kind for o in gc.get_objects())


def test_pickle_holds_all_that_is_needed_to_go_on():
    student, teacher = pair()
    model = DistilledStudent(_distiller(student, teacher, weight=CosineWeight(steps=10)))
    model.distiller.step()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert twin.distiller.student is twin.student
    assert twin.distiller.teacher is not teacher
    assert twin.distiller.progress == (1, 0)
    a, b = model(images()), twin(images())
    assert isinstance(b, DistilledOutput)
    assert a.distill.item() == b.distill.item() > 0
    b.distill.backward()
    assert twin.distiller.taps.align["0"].weight.grad.abs().sum() > 0
    assert twin.student.stage.weight.grad.abs().sum() > 0


def test_to_moves_aligns_and_teacher():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    distiller.to(torch.float64)
    student.to(torch.float64)
    assert {p.dtype for p in [*teacher.parameters(), *distiller.parameters()]} == {torch.float64}
    student(images().double())
    assert distiller.loss().total.dtype == torch.float64
    distiller.to("meta")
    assert {p.device.type for p in [*teacher.parameters(), *distiller.parameters()]} == {"meta"}
    assert {p.device.type for p in student.parameters()} == {"cpu"}


def test_aligns_are_made_where_the_student_is():
    student, teacher = pair()
    student.to(torch.float64)
    distiller = _distiller(student, teacher.to(torch.float64), align=True).build(images().double())
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert distiller.to(torch.float32).taps.align["0"].weight.dtype == torch.float32


def test_teacher_from_a_function_is_moved_to_the_student_and_nobody_else_keeps_it():
    student, _ = pair()
    made = []

    def load() -> nn.Module:
        teacher = Detector(10)
        made.append(weakref.ref(teacher))
        return teacher

    distiller = _distiller(student, load)
    student(images())
    assert distiller.loss().total > 0
    assert made[0]() is distiller.teacher
    distiller.stop()
    gc.collect()
    assert made[0]() is None


def test_train_and_eval_of_the_wrapper():
    student, teacher = pair()
    model = DistilledStudent(_distiller(student, teacher))
    out = model(images(), targets())
    assert isinstance(out, DistilledOutput) and list(out.student) == ["loss_box"]
    assert out.terms and out.distill.item() == pytest.approx(sum(out.terms.values()).item())
    model.eval()
    assert torch.equal(model(images()), student(images()))
    model.train()
    assert student.training and not teacher.training
    with torch.no_grad():
        assert isinstance(model(images()), torch.Tensor)


@pytest.mark.parametrize("align", [(6, 10), True])
def test_resumed_run_equals_an_unbroken_one(align):
    def start():
        student, teacher = pair()
        distiller = _distiller(student, teacher, align, weight=CosineWeight(1.0, 0.1, steps=6))
        return student, (distiller.build(images()) if align is True else distiller)

    student, distiller = start()
    optimizer = _optimizer(student, distiller)
    _train(student, distiller, optimizer, range(3))
    saved = io.BytesIO()
    parts = {"student": student, "distiller": distiller, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, saved)
    unbroken = _train(student, distiller, optimizer, range(3, 6))

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    torch.manual_seed(99)
    student = Detector(6)
    _, teacher = pair()
    distiller = _distiller(student, teacher, align, weight=CosineWeight(1.0, 0.1, steps=6))
    student.load_state_dict(state["student"])
    distiller.load_state_dict(state["distiller"])
    optimizer = _optimizer(student, distiller)
    optimizer.load_state_dict(state["optimizer"])
    assert distiller.progress == (3, 0)
    assert _train(student, distiller, optimizer, range(3, 6)) == unbroken


def test_optimizer_may_be_bound_before_the_widths_are_known():
    student, teacher = pair()
    distiller = _distiller(student, teacher, True)
    takes_names = torch.torch_version.TorchVersion(torch.__version__) >= (2, 6)
    parameters = student.named_parameters() if takes_names else student.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    distiller.bind(optimizer)
    count = len(list(student.parameters()))
    before = None
    for step in range(2):
        student(images(seed=step))
        distiller.loss().total.backward()
        before = before if before is not None else distiller.taps.align["0"].weight.detach().clone()
        optimizer.step()
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == count + 2
    assert not torch.equal(before, distiller.taps.align["0"].weight)
    distiller.bind(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == count + 2


def test_forgotten_distiller_leaves_no_hooks():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    hooked = [student, *(student.get_submodule(layer) for layer in LAYERS), teacher.get_submodule(LAYERS[0])]
    assert all(module._forward_hooks for module in hooked)
    del distiller
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked)


def test_state_of_an_ended_distillation_is_refused_the_other_way_round():
    student, teacher = pair()
    state = _distiller(student, teacher).state_dict()
    ended = _distiller(student, teacher, stop=StopDistillation(step=0))
    ended.set_epoch(0)
    assert ended.stopped
    with pytest.raises(RuntimeError, match="its teacher is gone; load into a new Distiller"):
        ended.load_state_dict(state)
