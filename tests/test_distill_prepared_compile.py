"""A teacher compiled for real: taps inside the compiled parts, sizes that change, memory that is given back."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from distill_networks import teacher_maps
from teacher_networks import Branching, Student, Teacher, block, settle
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kdops import PKDLoss
from kdops.distill import Distiller, Tap, TeacherOptions
from kdops.distill._compiling import _kept_by_pytorch

COMPILED = TeacherOptions(compile=True)
LAYERS = ("stem", "middle.1", "out")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _teacher(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return settle(Teacher(middle or nn.Sequential(block(8, 8), block(8, 8))))


def _distiller(student: nn.Module, teacher: nn.Module, layers=LAYERS, options=COMPILED, **kwargs) -> Distiller:
    taps = [Tap("layer", layer, loss=PKDLoss(), name=layer) for layer in layers]
    return Distiller(student, teacher, taps, teacher_options=options, **kwargs)


def _images(height: int = 16, width: int | None = None, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(n, 3, height, width or height, generator=generator)


def _step(distiller: Distiller, x: Tensor) -> dict[str, Tensor]:
    """The maps that the losses get, after a step as a trainer does it."""
    seen = {}
    handle = distiller.taps.register_forward_pre_hook(lambda _, args: seen.update(args[1]))
    distiller.student(x)
    distiller.loss().total.backward()
    handle.remove()
    return {str(place): feature for place, feature in seen.items()}


def _check(distiller: Distiller, teacher: nn.Module, x: Tensor, layers=LAYERS) -> None:
    found = _step(distiller, x)
    for layer, expected in zip(layers, teacher_maps(teacher, layers, x)):
        assert (found[layer] - expected).norm() <= 1e-5 * expected.norm(), layer


def _compiled_frames() -> int:
    return counters["stats"]["unique_graphs"]


def test_whole_teacher_is_one_graph_and_is_not_compiled_for_every_size():
    teacher = _teacher()
    distiller = _distiller(Student(), teacher)
    _check(distiller, teacher, _images())
    assert distiller.teacher_report.compiled == ["(all)"]
    assert _compiled_frames() == 1
    assert not counters["graph_break"]
    for size in (16, 24, 32, 40, 48, 56, 64, 72, 80, 88):
        _check(distiller, teacher, _images(size))
    assert _compiled_frames() == 2, "once for the first size, once for all"
    for size in (16, 24, 40):
        _check(distiller, teacher, _images(size, 2 * size, n=3))
    assert _compiled_frames() <= 4


def test_parts_of_a_teacher_that_is_no_graph(caplog):
    teacher = _teacher(Branching(8))
    teacher.stem = settle(nn.Sequential(block(3, 8), block(8, 8)))
    teacher.middle.block = settle(nn.Sequential(block(8, 8), block(8, 8)))
    student, layers = Student(), ("stem", "middle.block.1")
    with caplog.at_level(logging.INFO, "kdops"):
        distiller = _distiller(student, teacher, layers, TeacherOptions(compile="auto"))
        _check(distiller, teacher, _images(), layers)
    report = distiller.teacher_report
    assert report.compiled == ["stem", "middle.block"]
    assert list(report.not_compiled) == ["(all)", "middle"]
    assert "'middle' is not compiled" in caplog.text
    ran = []
    distiller.teacher.out.register_forward_hook(lambda *_: ran.append(1))
    _check(distiller, teacher, _images(), layers)
    assert not ran, "it goes no deeper than its last tapped layer"
    assert not any("forward" in vars(module) for module in distiller.teacher.modules())


def packed() -> int:
    """How many weights are frozen, in the form that the CPU's library computes with."""
    gc.collect()
    return sum(type(o) is Tensor and o.is_mkldnn for o in gc.get_objects())


def test_memory_is_given_back_at_the_stop():
    before = packed()
    distiller = _distiller(Student(), lambda: _teacher(nn.Conv2d(8, 8, 3, padding=1)), ("out",))
    _step(distiller, _images())
    weights = [weakref.ref(t) for t in distiller.teacher.parameters()]
    freezes = _kept_by_pytorch() is not None
    assert (packed() > before) == freezes
    distiller.stop()
    assert packed() == before
    assert not any(weight() is not None for weight in weights)


def test_moved_teacher_is_compiled_anew():
    teacher = _teacher(nn.Identity())
    distiller = _distiller(Student(), teacher, ("out",))
    before = packed()
    _check(distiller, teacher, _images(), ("out",))
    distiller.to(torch.float64)
    assert packed() == before, "what was frozen for the old weights is held"
    distiller.student.to(torch.float64)
    teacher.to(torch.float64)
    _check(distiller, teacher, _images().double(), ("out",))
    assert distiller.teacher.out.weight.dtype == torch.float64


def test_run_teacher_and_compiled_student():
    """The teacher's part runs by a function of the user's own, as an extractor of features does."""
    teacher = _teacher(block(8, 8))
    student = Student()
    distiller = _distiller(student, teacher, ("middle",), run_teacher=_features)
    call = torch.compile(student, backend="eager", fullgraph=True)
    for _ in range(2):
        call(_images())
        value = distiller.loss().total
    assert distiller.teacher_report.compiled == ["(all)"]
    (expected,) = teacher_maps(teacher, ("middle",), _images())
    torch.testing.assert_close(value, PKDLoss()(student(_images()), expected), rtol=1e-5, atol=0)


def _features(teacher: nn.Module, x: Tensor) -> None:
    teacher.middle(teacher.stem(x))


def test_without_a_compiler_auto_goes_on_and_true_is_refused(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    teacher = _teacher()
    with caplog.at_level(logging.WARNING, "kdops"):
        distiller = _distiller(Student(), teacher, options=TeacherOptions())
        _check(distiller, teacher, _images())
    assert distiller.teacher_report.compiled == []
    assert "no part of the teacher can be compiled" in caplog.text and "no working C++ compiler" in caplog.text
    distiller = _distiller(Student(), teacher)
    distiller.student(_images())
    with pytest.raises(RuntimeError, match=r"no part of the teacher can be compiled.*no working C\+\+ compiler"):
        distiller.loss()


def test_part_that_fails_later_goes_on_without_the_compiler(caplog):
    teacher = _teacher(nn.Identity())
    distiller = _distiller(Student(), teacher, ("out",))
    _check(distiller, teacher, _images(), ("out",))
    with torch._dynamo.config.patch(**{_limit(): 1}), caplog.at_level(logging.INFO, "kdops"):
        _check(distiller, teacher, _images(20, 28, n=3), ("out",))
        assert "'(all)' is not compiled" in caplog.text
        caplog.clear()
        _check(distiller, teacher, _images(20, 28, n=3), ("out",))
        assert not caplog.records, "said once"


def _limit() -> str:
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
