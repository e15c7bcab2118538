"""Progressive teachers: what carries on between stages, what starts anew, what is freed, and where a resume lands."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
import torch._dynamo.testing
from distill_networks import Detector, gradients, images, targets
from torch import Tensor, nn

from kdops import CWDLoss
from kdops.distill import CosineWeight, DistilledStudent, Distiller, ProgressiveDistillation, Stage, Tap


class _Generator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.generate = nn.Conv2d(6, width, 3, padding=1)

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return (self.generate(preds_S) - preds_T).square().mean()


def _taps(width: int, align=None) -> list[Tap]:
    return [
        Tap("neck.out.0", loss=CWDLoss(norm="batch"), align=align or (6, width)),
        Tap("stage", loss=_Generator(width), name="mgd"),
    ]


class _Loaders:
    """Functions that load teachers, and what was alive when each was called."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.alive: list[list[bool]] = []

    def __call__(self, width: int):
        def load() -> nn.Module:
            self.alive.append([ref() is not None for ref in self.made])
            torch.manual_seed(width)
            teacher = Detector(width)
            self.made.append(weakref.ref(teacher))
            return teacher

        return load


def _start(loaders=None, **kwargs) -> tuple[Detector, ProgressiveDistillation, torch.optim.Optimizer]:
    loaders = loaders or _Loaders()
    torch.manual_seed(0)
    student = Detector(6)
    stages = [
        Stage(loaders(8), _taps(8), epochs=1, weight=CosineWeight(1.0, 0.1, steps=4)),
        Stage(loaders(12), _taps(12), epochs=2, weight=CosineWeight(1.0, 0.1, steps=4)),
        Stage(loaders(10), _taps(10), epochs=1),
    ]
    distiller = ProgressiveDistillation(student, stages, **kwargs)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    distiller.bind(optimizer)
    return student, distiller, optimizer


def _train(student, distiller, optimizer, epochs: range) -> list[float]:
    values = []
    for epoch in epochs:
        distiller.set_epoch(epoch)
        for step in range(2):
            loss = student(images(seed=step), targets())["loss_box"] + distiller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            distiller.step()
            values.append(loss.item())
    return values


def test_stages_follow_the_epochs_and_end():
    seen = []
    student, distiller, optimizer = _start(on_stage=lambda d: seen.append((d.progress, d.stage)))
    widths = []
    for epoch in range(5):
        _train(student, distiller, optimizer, range(epoch, epoch + 1))
        widths.append(None if distiller.stopped else distiller.teacher.stage.out_channels)
    assert widths == [8, 12, 12, 10, None]
    assert seen == [((2, 1), 1), ((6, 3), 2), ((8, 4), 3)]
    student(images())
    assert distiller.loss().terms == {}


def test_between_stages_the_student_carries_on_and_the_rest_starts_anew():
    student, distiller, optimizer = _start()
    count = len(list(student.parameters()))
    _train(student, distiller, optimizer, range(1))
    old = list(distiller.parameters())
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in student.parameters() if p in optimizer.state}
    assert len(old) == 3 and all(p in optimizer.state for p in old) and len(moments) > 6
    distiller.set_epoch(1)

    new = list(distiller.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moment) for p, moment in moments.items())
    assert not {id(p) for p in new} & {id(p) for p in old}
    assert all(p not in optimizer.state for p in [*old, *new])
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in [*student.parameters(), *new]}
    assert len(group["params"]) == count + 3
    before = [p.detach().clone() for p in new]
    _train(student, distiller, optimizer, range(1, 2))
    assert not any(torch.equal(p, b) for p, b in zip(new, before)), "the new ones are trained"


def test_generators_start_anew_even_where_stages_share_their_taps():
    torch.manual_seed(0)
    student, taps = Detector(6), _taps(8)
    first = taps[1].loss.generate.weight.detach().clone()
    stages = [Stage(Detector(8), taps, steps=2), Stage(Detector(8), taps)]
    distiller = ProgressiveDistillation(student, stages)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.bind(optimizer)
    used = distiller.distiller.taps.loss["1"].generate.weight
    _train(student, distiller, optimizer, range(1))
    assert distiller.stage == 1
    assert not torch.equal(used, first)
    assert torch.equal(distiller.distiller.taps.loss["1"].generate.weight, first)


def test_the_old_teacher_is_freed_before_the_next_is_loaded():
    loaders = _Loaders()
    student, distiller, optimizer = _start(loaders)
    average = torch.optim.swa_utils.AveragedModel(DistilledStudent(distiller))
    _train(student, distiller, optimizer, range(4))
    assert loaders.alive == [[], [False], [False, False]]
    assert loaders.made[2]() is distiller.teacher
    distiller.stop()
    gc.collect()
    assert loaders.made[2]() is None and average.module.distiller.teacher is None


def test_weights_count_from_the_beginning_of_their_stage():
    student, distiller, optimizer = _start()
    got = []
    for epoch in range(3):
        distiller.set_epoch(epoch)
        for _ in range(2):
            got.append(distiller.distiller._factor(lambda *_: 1.0))
            distiller.step()
    cosine = CosineWeight(1.0, 0.1, steps=4)
    assert got == [cosine(step, 0) for step in (0, 1, 0, 1, 2, 3)]


def _saved(student, distiller, optimizer) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (student, distiller, optimizer)], buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("order", ["bind first", "load first"])
def test_resume_lands_in_the_right_stage_and_goes_on_as_if_unbroken(done, order):
    student, distiller, optimizer = _start()
    _train(student, distiller, optimizer, range(done))
    saved = _saved(student, distiller, optimizer)
    torch.manual_seed(7)  # the next stage's align layers, drawn alike in both runs
    unbroken = _train(student, distiller, optimizer, range(done, 5))

    loaders = _Loaders()
    student, distiller, optimizer = _start(loaders)
    if order == "load first":
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        distiller._optimizers.clear()
    states = torch.load(saved, weights_only=True)
    student.load_state_dict(states[0])
    distiller.load_state_dict(states[1])
    if order == "load first":
        distiller.bind(optimizer)
    optimizer.load_state_dict(states[2])
    stage = (0, 1, 1)[done - 1]
    assert distiller.stage == stage and len(loaders.made) == (1 if stage == 0 else 2)
    assert distiller.progress == (2 * done, done - 1)
    torch.manual_seed(7)
    assert _train(student, distiller, optimizer, range(done, 5)) == unbroken


def test_resume_behind_the_last_stage_loads_no_further_teacher():
    student, distiller, optimizer = _start()
    _train(student, distiller, optimizer, range(5))
    saved = _saved(student, distiller, optimizer)
    unbroken = _train(student, distiller, optimizer, range(5, 6))
    loaders = _Loaders()
    student, distiller, optimizer = _start(loaders)
    states = torch.load(saved, weights_only=True)
    for part, state in zip((student, distiller, optimizer), states):
        part.load_state_dict(state)
    gc.collect()
    assert distiller.stopped and [ref() for ref in loaders.made] == [None]
    assert list(distiller.parameters()) == []
    assert _train(student, distiller, optimizer, range(5, 6)) == unbroken


def test_widths_of_a_later_stage_are_found_from_its_first_batch():
    torch.manual_seed(0)
    student = Detector(6)
    stages = [Stage(Detector(8), _taps(8, True), steps=2), Stage(Detector(12), _taps(12, True))]
    distiller = ProgressiveDistillation(student, stages)
    with pytest.raises(RuntimeError, match="widths of the align layers of 'neck.out.0' are not known"):
        list(DistilledStudent(distiller).parameters())
    distiller.build(images())
    optimizer = torch.optim.SGD(
        [{"params": student.parameters()}, {"params": distiller.parameters(), "lr": 0.5}], lr=0.01
    )
    distiller.bind(optimizer)
    _train(student, distiller, optimizer, range(2))
    assert distiller.distiller.taps.align["0"].weight.shape == (12, 6, 1, 1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(list(student.parameters())), 3]

    resumed = ProgressiveDistillation(
        copy.deepcopy(student),
        [Stage(Detector(8), _taps(8, True), steps=2), Stage(Detector(12), _taps(12, True))],
    )
    other = torch.optim.SGD(resumed.student.parameters(), lr=0.01)
    resumed.bind(other)
    resumed.load_state_dict(distiller.state_dict())
    assert resumed.stage == 1 and resumed.distiller.taps.align["0"].weight.shape == (12, 6, 1, 1)
    assert {id(p) for p in resumed.parameters()} <= {id(p) for p in other.param_groups[0]["params"]}


def test_copies_share_the_teachers_and_compiled_students_change_stage():
    student, distiller, optimizer = _start()
    twin = copy.deepcopy(DistilledStudent(distiller))
    assert twin.distiller.student is twin.student and twin.distiller.teacher is distiller.teacher
    assert twin(images()).distill > 0
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(student, backend=counter, fullgraph=True)
    for epoch in range(2):
        distiller.set_epoch(epoch)
        for _ in range(2):
            compiled(images())
            loss = distiller.loss()
            loss.total.backward()
            assert distiller.distiller.taps.align["0"].weight.grad.abs().sum() > 0
    assert counter.frame_count <= 2
    assert len(gradients(student)) > 4


def test_module_teachers_of_later_stages_are_moved_to_the_student():
    torch.manual_seed(0)
    student, later = Detector(6).double(), Detector(12).double()
    stages = [Stage(Detector(8).double(), _taps(8), steps=1), Stage(later, _taps(12))]
    distiller = ProgressiveDistillation(student, stages).double()
    distiller.bind(torch.optim.SGD(student.parameters(), lr=0.1))
    distiller.step()
    assert distiller.teacher is later and isinstance(distiller.distiller, Distiller)
    assert distiller._stages[0] is None


@pytest.mark.parametrize(
    ("stages", "error", "text"),
    [
        (lambda: None, TypeError, "stages must be a list of Stage, got NoneType"),
        (lambda: [], ValueError, "stages must not be empty"),
        (
            lambda: [Stage(Detector(8), _taps(8)), Stage(Detector(8), _taps(8))],
            ValueError,
            "stage 0: epochs or steps .*None",
        ),
        (lambda: [Stage(Detector(8), _taps(8), epochs=0)], ValueError, "stage 0: .* at least 1, got 0"),
        (
            lambda: [Stage(Detector(8), _taps(8), epochs=1, steps=2)],
            ValueError,
            "stage 0: give epochs or steps, got both",
        ),
        (
            lambda: [Stage(Detector(8), _taps(8), epochs=1), Stage(Detector(8), _taps(8), steps=1)],
            ValueError,
            "all stages must be measured in epochs or all in steps",
        ),
        (
            lambda: [Stage(Detector(8), _taps(8), epochs=1), Stage(Detector(8), [Tap("nekc", loss=CWDLoss())])],
            ValueError,
            "student has no layer 'nekc'; did you mean 'neck'",
        ),
        (lambda: [Stage("r101.pth", _taps(8))], TypeError, "Stage: teacher must be a module or a function, got str"),
        (lambda: [Stage(Detector(8), _taps(8), weight="1")], TypeError, "Stage: weight must be a number, got str"),
        (lambda: [Stage(Detector(8), [], epochs=1)], ValueError, "taps must name at least one pair"),
    ],
)
def test_stages_that_are_refused(stages, error, text):
    student = Detector(6)
    with pytest.raises(error, match=text):
        ProgressiveDistillation(student, stages())
    assert not student._forward_pre_hooks


def test_a_stage_that_no_optimizer_would_train_and_going_back_are_refused():
    torch.manual_seed(0)
    stages = [Stage(Detector(8), _taps(8), steps=1), Stage(Detector(12), _taps(12))]
    distiller = ProgressiveDistillation(Detector(6), stages)
    start = distiller.state_dict()
    with pytest.raises(RuntimeError, match=r"of stage 1 start anew, and no optimizer would train them; call bind"):
        distiller.step()
    with pytest.raises(RuntimeError, match="stages go forward only, got stage 0 after 1"):
        distiller.load_state_dict(start)
