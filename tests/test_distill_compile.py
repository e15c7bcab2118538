"""A student under torch.compile, compiled for real: no graph break, and the same numbers as without it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from distill_networks import LAYERS, gradients, images, pair, targets
from torch import nn

from kdops import CWDLoss
from kdops.distill import DistilledStudent, Distiller, Tap


def _distiller(student: nn.Module, teacher: nn.Module) -> Distiller:
    taps = [Tap(layer, loss=CWDLoss(norm="batch"), align=(6, 10)) for layer in LAYERS]
    return Distiller(student, teacher, taps)


def _step(call, distiller: Distiller, seed: int) -> float:
    loss = call(images(seed=seed), targets(seed=seed))["loss_box"] + distiller.loss()
    loss.backward()
    return loss.item()


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_compiled_student_gives_the_same_numbers_and_no_graph_break(wrapped_first):
    student, teacher = pair()
    plain = copy.deepcopy(student)
    reference = _distiller(plain, teacher)
    if wrapped_first:
        call = torch.compile(student, fullgraph=True)
        distiller = _distiller(call, teacher)
    else:
        distiller = _distiller(student, teacher)
        call = torch.compile(student, fullgraph=True)
    assert distiller.student is student
    distiller.taps.load_state_dict(reference.taps.state_dict())
    for seed in range(3):
        a, b = _step(call, distiller, seed), _step(plain, reference, seed)
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(gradients(student, distiller), gradients(plain, reference)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        call.eval()
        torch.testing.assert_close(call(images()), plain.eval()(images()))


def test_compiled_student_after_the_stop_is_the_plain_one_and_is_compiled_once_more_at_most():
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(student, backend=counter, fullgraph=True)
    for seed in range(3):
        _step(call, distiller, seed)
    assert counter.frame_count == 1
    distiller.stop()
    for seed in range(3):
        _step(call, distiller, seed)
    assert counter.frame_count == 2
    assert not student.stage._forward_hooks


def test_compiled_wrapper_and_compiled_teacher():
    student, teacher = pair()
    reference = DistilledStudent(_distiller(copy.deepcopy(student), copy.deepcopy(teacher)))
    model = DistilledStudent(_distiller(student, torch.compile(teacher, backend="eager")))
    model.load_state_dict(reference.state_dict())
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        a, b = compiled(images(seed=seed), targets()), reference(images(seed=seed), targets())
        assert a.distill.item() == pytest.approx(b.distill.item(), rel=1e-5) and a.distill > 0
        (a.distill + a.student["loss_box"]).backward()
        (b.distill + b.student["loss_box"]).backward()
    for a, b in zip(gradients(model), gradients(reference)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
