"""KDOpsDistilledDetector and its hooks in real runs of mmengine's Runner."""
from __future__ import annotations

import gc
import json
import weakref

import kdops.integrations.mmdet  # noqa: F401
import kdops.integrations.mmengine.trusted_checkpoints  # noqa: F401  (to resume)
import pytest
import torch
import toys
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint
from toys import detector, taps

from kdops import CosineWeight

SCOPE = "mmdet"

DRIVE = dict(type="KDOpsDistillHook")
STUDENT = dict(type="ToyDetector", width=4)


def progressive(folder=None):
    """Two teachers, two epochs each; from checkpoints in a folder where runs have to have the same ones."""
    stages = [dict(teacher=dict(type="ToyDetector", width=width), taps=taps(width), epochs=2) for width in (6, 8)]
    for stage in stages if folder is not None else ():
        path = folder / f"teacher{stage['teacher']['width']}.pth"
        if not path.exists():
            torch.save(MODELS.build(stage["teacher"]).state_dict(), path)
        stage["teacher_checkpoint"] = str(path)
    return detector(stages=stages)


class Watch(Hook):
    priority = "LOWEST"

    def __init__(self):
        self.losses, self.rates, self.widths, self.teachers = [], [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        self.losses.append({name: float(value) for name, value in outputs.items()})
        self.rates.append(runner.optim_wrapper.get_lr()["lr"][0])
        teacher = model.distiller.teacher
        self.widths.append(teacher and teacher.neck.out_channels)
        if teacher is not None and not any(reference() is teacher for reference in self.teachers):
            self.teachers.append(weakref.ref(teacher))
        assert teacher is None or not any(module.training for module in teacher.modules())


def run(work_dir, hooks, model, resume=False, **options):
    watch = Watch()
    runner = toys.runner(work_dir, [*hooks, watch], model=model, resume=resume, default_scope="mmdet", **options)
    runner.train()
    return runner, watch


def assert_same_state(runner, expected):
    assert set(runner.model.state_dict()) == set(expected.model.state_dict())
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(runner.model.state_dict()[name], value, msg=name)


def test_trains_student_and_align_and_stops(tmp_path):
    stop = dict(type="KDOpsStopHook", detach_epoch=2)
    runner, watch = run(tmp_path, [DRIVE, stop], detector())
    assert ["distill.loss_feat" in losses for losses in watch.losses] == [True] * 4 + [False] * 4
    assert all(losses["distill.loss_feat"] > 1e-4 for losses in watch.losses[:4])
    assert watch.losses[0]["distill.loss_feat"] != watch.losses[2]["distill.loss_feat"]
    gc.collect()
    assert [reference() for reference in watch.teachers] == [None], "the teacher's memory is still held"
    checkpoint = torch.load(tmp_path / "epoch_4.pth", weights_only=False)
    plain = MODELS.build(STUDENT)
    assert set(checkpoint["state_dict"]) == set(plain.state_dict())
    load_checkpoint(plain, str(tmp_path / "epoch_4.pth"), strict=True)


def test_the_average_shares_the_teacher(tmp_path):
    shared = []

    class Look(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            average = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model
            shared.append(average.module.distiller.teacher is runner.model.distiller.teacher)
            assert average.module.student is not runner.model.student

    run(tmp_path, [DRIVE, Look()], detector(), epochs=1)
    assert shared == [True, True]


@pytest.mark.parametrize("resume_from", [1, 3], ids=["before the stop", "after the stop"])
def test_resume_lands_where_it_stopped(tmp_path, resume_from):
    hooks = [DRIVE, dict(type="KDOpsStopHook", stop_epoch=2)]
    whole, _ = run(tmp_path / "whole", hooks, detector())
    again, watch = run(tmp_path / "again", hooks, detector(), resume=True,
                       load_from=str(tmp_path / "whole" / f"epoch_{resume_from}.pth"))
    assert len(watch.losses) == 2 * (4 - resume_from)
    assert_same_state(again, whole)


SCHEDULE = dict(type="MultiStepLR", by_epoch=True, milestones=[1], gamma=0.1)


def test_progressive_teachers_each_get_a_full_schedule(tmp_path):
    runner, watch = run(tmp_path, [DRIVE], progressive(), param_scheduler=SCHEDULE)
    assert watch.widths == [6] * 4 + [8] * 4
    assert watch.rates == pytest.approx([0.01, 0.01, 0.001, 0.001] * 2)
    assert all(losses["distill.loss_feat"] > 1e-4 for losses in watch.losses)
    gc.collect()
    assert watch.teachers[0]() is None, "the first teacher is still in memory"
    aligns = [p for name, p in runner.model.named_parameters() if name.startswith("distiller.")]
    held = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert aligns and all(id(parameter) in held for parameter in aligns)
    average = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert set(average.state_dict()) == set(runner.model.state_dict())


@pytest.mark.parametrize("resume_from", [1, 2, 3], ids=["first stage", "border", "second stage"])
def test_resume_lands_in_the_right_stage(tmp_path, resume_from):
    whole, _ = run(tmp_path / "whole", [DRIVE], progressive(tmp_path), param_scheduler=SCHEDULE)
    again, watch = run(tmp_path / "again", [DRIVE], progressive(tmp_path), param_scheduler=SCHEDULE, resume=True,
                       load_from=str(tmp_path / "whole" / f"epoch_{resume_from}.pth"))
    assert watch.widths == ([6] * 4 + [8] * 4)[2 * resume_from:]
    assert watch.rates == pytest.approx(([0.01, 0.01, 0.001, 0.001] * 2)[2 * resume_from:])
    if resume_from == 3:  # a stage that begins draws its align layers, and a resumed process draws others
        assert_same_state(again, whole)


def test_weight_schedule_is_driven(tmp_path):
    weight = dict(type="kdops.LinearWeight", start=1.0, end=0.0, steps=4)
    _, watch = run(tmp_path, [DRIVE], detector(weight=weight), epochs=3, ema=False)
    values = [losses["distill.loss_feat"] for losses in watch.losses]
    assert values[0] > values[1] > values[3] > 0 and values[4:] == [0, 0]


@pytest.mark.parametrize("model, what", [
    (detector(weight=dict(type="kdops.CosineWeight", epochs=4)), r"CosineWeight\(.*epochs=4\)"),
    (detector(weight=dict(type="kdops.WarmupWeight", after=CosineWeight(epochs=4), steps=2)), "CosineWeight"),
    (dict(detector(), taps=taps(weight=dict(type="kdops.LinearWeight", start=1.0, end=0.0, epochs=2))), "LinearWeight"),
    (progressive(), "stage 0 of 2 epochs, stage 1 of 2 epochs"),
], ids=["schedule", "warmed-up schedule", "schedule of a tap", "stages"])
def test_epochs_under_an_iteration_based_loop_are_refused(tmp_path, model, what):
    with pytest.raises(ValueError, match=f"KDOpsDistillHook: {what}.*: epochs never come under IterBasedTrainLoop"):
        run(tmp_path, [DRIVE], model, train_cfg=dict(by_epoch=False, max_iters=8), ema=False)


def test_steps_count_under_an_iteration_based_loop(tmp_path):
    weight = dict(type="kdops.LinearWeight", start=1.0, end=0.0, steps=2)
    stages = [dict(teacher=dict(type="ToyDetector", width=width), taps=taps(width), weight=weight, steps=3)
              for width in (6, 8)]
    seen = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            teacher = runner.model.distiller.teacher
            seen.append([teacher and teacher.neck.out_channels])

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen[-1].append(outputs.get("distill.loss_feat"))

    toys.runner(tmp_path, [DRIVE, Look()], model=detector(stages=stages), default_scope="mmdet", ema=False,
                train_cfg=dict(by_epoch=False, max_iters=8)).train()
    assert [width for width, _ in seen] == [6] * 3 + [8] * 3 + [None] * 2
    assert [term and bool(term > 0) for _, term in seen] == [True, True, False] * 2 + [None] * 2


def test_nothing_of_an_ended_distillation_is_logged(tmp_path):
    runner, _ = run(tmp_path, [DRIVE], progressive(), epochs=6)
    lines = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert ["distill.loss_feat" in line for line in lines] == [True] * 8 + [False] * 4


def test_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match="KDOpsDistillHook"):
        run(tmp_path / "hook", [], progressive())
    with pytest.raises(ValueError, match="exactly one of teacher and stages"):
        MODELS.build(dict(type="KDOpsDistilledDetector", student=STUDENT))
    with pytest.raises(TypeError, match="must be a KDOpsDistilledDetector, got ToyDetector"):
        run(tmp_path / "model", [dict(type="KDOpsStopHook", stop_epoch=1)], STUDENT)
    with pytest.raises(ValueError, match="no layer 'nek'"):
        MODELS.build(dict(type="KDOpsDistilledDetector", student=STUDENT, teacher=STUDENT, taps=[
            dict(student="nek", loss=dict(type="kdops.CWDLoss"))]))
