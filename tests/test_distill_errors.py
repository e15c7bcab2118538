"""What a Distiller refuses, and that it says so in words that name the layer, the rule and what came."""

from __future__ import annotations

import re

import pytest
import torch
from distill_networks import Detector, images, pair
from torch import Tensor, nn

from kdops import CWDLoss, PKDLoss
from kdops.distill import CosineWeight, Distiller, LinearWeight, StopDistillation, Tap, WarmupWeight


def _tap(layer: str = "stage", teacher: str | None = None, **kwargs) -> Tap:
    return Tap(layer, teacher, **{"loss": CWDLoss(), "align": (6, 10), **kwargs})


def _refused(tap: Tap, text: str, error: type[Exception], student: nn.Module | None = None, **kwargs) -> None:
    """Run one step with a tap and match the error that it ends in."""
    small, teacher = pair()
    student = student or small
    with pytest.raises(error, match=text):
        distiller = Distiller(student, teacher, [tap], **kwargs)
        student(images())
        distiller.loss()


@pytest.mark.parametrize(
    ("layer", "near"),
    [
        ("neck.outs.0", "did you mean 'neck.out.0'"),
        ("module.neck.out.1", "did you mean 'neck.out.1'"),
        ("out.1", "did you mean 'neck.out.1'"),
        ("xyzzy", "its parts are 'stem', 'stage', 'drop', 'neck', 'head'"),
    ],
)
def test_unknown_layer_names_the_near_ones(layer, near):
    student, teacher = pair()
    with pytest.raises(ValueError, match=f"Distiller: student has no layer '{re.escape(layer)}'; .*({near})"):
        Distiller(student, teacher, [_tap(layer)])
    with pytest.raises(ValueError, match=f"Distiller: teacher has no layer '{re.escape(layer)}'; .*({near})"):
        Distiller(student, teacher, [_tap("stage", layer)])
    student(images())
    assert not student._forward_hooks and not student._forward_pre_hooks, "a refused Distiller left its hooks"


def test_layer_that_did_not_run():
    class Skips(Detector):
        def forward(self, x: Tensor) -> Tensor:
            return self.stage(self.stem(x))

    torch.manual_seed(0)
    text = "Distiller: student layer 'neck.out.0' did not run"
    _refused(_tap("neck.out.0", "stage"), text, RuntimeError, Skips(6))
    teacher = Skips(10)
    student = Detector(6)
    distiller = Distiller(student, teacher, [_tap("neck.out.0")])
    student(images())
    with pytest.raises(RuntimeError, match="Distiller: teacher layer 'neck.out.0' did not run"):
        distiller.loss()


def test_layer_that_ran_twice():
    _refused(_tap("head", "stage", align=(4, 10)), "Distiller: student layer 'head' ran 2 times", RuntimeError)
    _refused(_tap("stage", "head", align=(6, 4)), "Distiller: teacher layer 'head' ran 2 times", RuntimeError)


def test_student_that_ran_twice_or_not_at_all():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [_tap()])
    with pytest.raises(RuntimeError, match="the student has not been run: call it as a module"):
        distiller.loss()
    student.eval()
    student(images())
    with pytest.raises(RuntimeError, match="in training mode.*got student.training=False"):
        distiller.loss()
    student.train()
    student(images())
    student(images())
    with pytest.raises(RuntimeError, match="the student was run 2 times since the last loss.*distiller.clear"):
        distiller.loss()
    student(images())
    distiller.clear()
    student(images())
    assert distiller.loss().total > 0


def test_forward_that_failed_is_not_counted():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [_tap()])
    with pytest.raises(RuntimeError):
        student(images()[:, :2])
    student(images())
    assert distiller.loss().total > 0


def test_loss_asked_for_twice():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [_tap()])
    student(images())
    distiller.loss()
    with pytest.raises(RuntimeError, match="Distiller.loss: asked for twice after one forward of the student"):
        distiller.loss()
    student(images())
    assert distiller.loss().total > 0


@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        ("neck", TypeError, r"student layer 'neck' must give a tensor, got tuple of 2: name one of 'neck\[0\]'"),
        ("neck[2]", ValueError, r"student layer 'neck' has no output \[2\], it gave tuple of 2"),
        ("stage[p3]", ValueError, r"student layer 'stage' has no output \[p3\], it gave Tensor"),
        ("neck[0", ValueError, r"must be written 'name' or 'name\[index\]', got 'neck\[0'"),
        (
            "",
            ValueError,
            r"student layer '' must give a 4-D map \(N, C, H, W\), got 3 dimensions with shape \(4, 4, 80\)",
        ),
    ],
)
def test_output_that_is_no_map(layer, error, text):
    _refused(_tap(layer, "stage"), text, error)


def test_dict_output_lists_its_keys():
    class Pyramid(Detector):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"0": self.stem(x), "p6": self.stage(self.stem(x))}

    text = r"got dict: name one of '0\[0\]', '0\[p6\]'"
    _refused(_tap("0", "stage"), text, TypeError, nn.Sequential(Pyramid(6)))
    student, (_, teacher) = nn.Sequential(Pyramid(6)), pair()
    for layer, source in (("0[0]", "stem"), ("0[p6]", "stage")):
        distiller = Distiller(student, teacher, [_tap(layer, source)])
        student(images())
        assert distiller.loss().total > 0


def test_output_overwritten_in_place():
    text = "student layer 'stem.1': its output was overwritten in place by a later layer"
    student = Detector(6)
    student.stem[2] = nn.ReLU(inplace=True)
    _refused(_tap("stem.1", "stem.2"), text, RuntimeError, student)


def test_output_without_a_gradient():
    student = Detector(6)
    student.stem.requires_grad_(False)
    _refused(_tap("stem"), "the output of student layer 'stem' carries no gradient.*frozen", RuntimeError, student)


@pytest.mark.parametrize(
    ("tap", "text"),
    [
        (
            _tap(align=None),
            r"tap 'stage': student and teacher must have the same number of channels, got 6 and 10: align=True "
            r"\(or align=\(6, 10\)\) puts a 1x1 convolution between them",
        ),
        (_tap(align=(8, 10)), "tap 'stage': align takes 8 channels, but the student's layer gives 6"),
        (_tap(align=(6, 12)), "tap 'stage': .* the same number of channels, got 12 and 10 behind its align layer"),
        (
            _tap("stage", "stem", name="p3"),
            r"tap 'p3': .* must have the same height and width, got \(4, 10, 4, 4\) and \(4, 10, 8, 8\)",
        ),
        (_tap(loss=nn.MSELoss(reduction="sum"), align=None), "tap 'stage': .* the same number of channels"),
        (
            _tap(loss=lambda s, t: s - t),
            r"term 'stage': the loss must return a scalar tensor, got shape \(4, 10, 4, 4\)",
        ),
        (_tap(loss=lambda s, t: 1.0), "term 'stage': the loss must return a scalar tensor, got float"),
    ],
)
def test_maps_and_losses_that_do_not_fit(tap, text):
    _refused(tap, "Distiller: " + text, ValueError)


def test_losses_that_resize_or_take_other_shapes_are_let_through():
    student, teacher = pair()
    free = Tap("stage", "stem", loss=lambda s, t: s.mean() - t.mean(), same_shape=False, name="free")
    resized = Tap("stage", "stem", loss=PKDLoss(resize="student"), align=(6, 10))
    distiller = Distiller(student, teacher, [free, resized])
    student(images())
    assert list(distiller.loss().terms) == ["free", "stage"]


def test_batch_sizes_that_differ():
    text = r"must have the same batch size, got \(4, 10, 4, 4\) and \(2, 10, 4, 4\)"
    _refused(_tap(), text, ValueError, run_teacher=lambda net, x: net(x[:2]))


def test_teacher_on_another_device():
    student, teacher = pair()
    distiller = Distiller(student, teacher.to("meta"), [_tap()])
    student(images())
    with pytest.raises(ValueError, match=r"the teacher is on meta, but the student's maps are on cpu; .*to\('cpu'\)"):
        distiller.loss()


def test_align_on_another_device():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [_tap()])
    distiller.taps.to("meta")
    student(images())
    with pytest.raises(ValueError, match=r"tap 'stage': align is on meta, but the student's maps are on cpu"):
        distiller.loss()


def test_unknown_widths_are_refused_before_an_optimizer_misses_them():
    student, teacher = pair()
    distiller = Distiller(student, teacher, [_tap(align=True, name="p3")])
    text = r"the widths of the align layers of 'p3' are not known.*distiller.build\(first_batch\)"
    with pytest.raises(RuntimeError, match=text):
        list(distiller.parameters())
    student(images())
    with pytest.raises(RuntimeError, match=text):
        distiller.loss()
    distiller.build(images())
    assert [p.shape for p in distiller.parameters()] == [(10, 6, 1, 1)]


def test_build_checks_the_fit_and_leaves_the_student_as_it_was():
    student, teacher = pair(drop=True)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student.stem[1].eval()
    with pytest.raises(ValueError, match="must have the same height and width"):
        Distiller(student, teacher, [_tap("stage", "stem", align=True)]).build(images())
    Distiller(student, teacher, [_tap(align=True)]).build(images())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training and not student.stem[1].training


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda s, t: Distiller(None, t, [_tap()]), TypeError, "student must be a module, got NoneType"),
        (lambda s, t: Distiller(s, "r101.pth", [_tap()]), TypeError, "teacher must be a module or return one, got str"),
        (lambda s, t: Distiller(s, lambda: None, [_tap()]), TypeError, "teacher must be a module or .*, got NoneType"),
        (lambda s, t: Distiller(s, s, [_tap()]), ValueError, "student and teacher must not share parameters"),
        (lambda s, t: Distiller(s, t, "stage"), TypeError, "taps must be a list of Tap, got str"),
        (lambda s, t: Distiller(s, t, []), ValueError, "taps must name at least one pair of layers"),
        (lambda s, t: Distiller(s, t, [_tap(), _tap()]), ValueError, r"its own name, got \['stage'\] more than once"),
        (lambda s, t: Distiller(s, t, [_tap()], run_teacher=1), TypeError, "run_teacher must be a function, got int"),
        (lambda s, t: Distiller(s, t, [_tap()], stop=280), TypeError, "stop must be a StopDistillation, got int"),
        (lambda s, t: Distiller(s, t, [_tap()], weight="1"), TypeError, "Distiller: weight must be a number, got str"),
        (lambda s, t: Tap(0, loss=CWDLoss()), TypeError, "Tap: student must be the name of a layer, got int"),
        (lambda s, t: Tap("a", loss=None), TypeError, "Tap: loss must be a module or a function of two maps, got None"),
        (lambda s, t: Tap("a", loss=CWDLoss), TypeError, "Tap: loss must be a module or a function .*CWDLoss"),
        (lambda s, t: Tap("a", loss=CWDLoss(reduction="none")), ValueError, "got a loss with reduction='none'"),
        (lambda s, t: _tap(align=(6,)), TypeError, r"Tap: align must be None, True, \(student_width, .*got \(6,\)"),
        (lambda s, t: _tap(align=(0, 4)), TypeError, r"Tap: align must be .*got \(0, 4\)"),
        (lambda s, t: _tap(weight=float("nan")), ValueError, "Tap: weight must be finite, got nan"),
        (lambda s, t: StopDistillation(), ValueError, "StopDistillation: give exactly one of epoch and step, got none"),
        (lambda s, t: StopDistillation(epoch=1, step=2), ValueError, "give exactly one of epoch and step"),
        (lambda s, t: StopDistillation(epoch=-1), ValueError, "epoch must be at least 0, got -1"),
        (lambda s, t: StopDistillation(step=1.5), TypeError, "step must be a whole number, got float"),
        (lambda s, t: StopDistillation(step=1, callback=3), TypeError, "callback must be callable, got int"),
        (
            lambda s, t: LinearWeight(1.0, 0.0),
            ValueError,
            "LinearWeight: give exactly one of steps and epochs, got none",
        ),
        (lambda s, t: CosineWeight(steps=0), ValueError, "CosineWeight: steps must be at least 1, got 0"),
        (lambda s, t: WarmupWeight("x"), TypeError, "WarmupWeight: weight must be a number, got str"),
    ],
)
def test_arguments_that_are_refused(make, error, text):
    student, teacher = pair()
    with pytest.raises(error, match=text):
        make(student, teacher)
    assert not student._forward_pre_hooks and not student.stage._forward_hooks, "a refused Distiller left its hooks"
