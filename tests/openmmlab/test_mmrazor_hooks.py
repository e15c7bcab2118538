"""The hooks for MMRazor's algorithms in real runs of mmengine's Runner."""
from __future__ import annotations

import gc
import weakref

import kdops.integrations.mmengine.trusted_checkpoints  # noqa: F401  (to resume)
import kdops.integrations.mmrazor as kd
import pytest
import torch
import toys
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import load_checkpoint

STOP = dict(type="mmrazor.KDOpsStopDistillHook", stop_epoch=2)

SCOPE = "mmrazor"


class Watch(Hook):
    """Notes what a run does, step by step."""

    priority = "LOWEST"

    def __init__(self):
        self.losses, self.teacher_calls, self.teacher_training, self.outputs = [], [], [], []

    def before_train(self, runner):
        self.teacher = runner.model.teacher

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(set(outputs))
        self.teacher_calls.append(getattr(self.teacher, "calls", None))
        self.teacher_training.append(any(module.training for module in self.teacher.modules()))


def run(work_dir, hooks, resume=False, **options):
    watch = Watch()
    runner = toys.runner(work_dir, [*hooks, watch], resume=resume, **options)
    runner.train()
    return runner, watch


def test_stop_ends_the_teachers_forward_and_frees_it(tmp_path):
    runner, watch = run(tmp_path, [STOP])
    assert ["distill.loss_feat" in losses for losses in watch.losses] == [True] * 4 + [False] * 4
    assert watch.teacher_calls == [1, 2, 3, 4, 4, 4, 4, 4]
    assert all(tensor.numel() == 0 for tensor in [*watch.teacher.parameters(), *watch.teacher.buffers()])
    assert {name.split(".")[0] for name, _ in runner.model.named_parameters()} == {"architecture"}
    state = torch.load(tmp_path / "epoch_4.pth", weights_only=False)
    for entry in ("state_dict", "ema_state_dict"):
        names = {name.removeprefix("module.").split(".")[0] for name in state[entry]}
        assert names - {"steps"} == {"architecture"}, entry


def test_stop_lets_go_of_the_last_maps(tmp_path):
    maps = []

    class Keep(Watch):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            recorders = runner.model.distiller.student_recorders.recorders
            maps.extend(weakref.ref(tensor) for r in recorders.values() for tensor in r.data_buffer)

    toys.runner(tmp_path, [STOP, Keep()], epochs=3).train()
    gc.collect()
    assert maps and all(reference() is None for reference in maps)


def test_before_the_stop_nothing_differs_from_the_stock_hook(tmp_path):
    states = []
    for number, hook in enumerate((dict(type="mmrazor.StopDistillHook", stop_epoch=2), STOP)):
        runner, _ = run(tmp_path / str(number), [hook], model=toys.algorithm(teacher_norm_eval=True))
        states.append(runner.model.architecture.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("keyword", ["stop_epoch", "detach_epoch"])
def test_readmes_spelling_runs(tmp_path, keyword, stock_names):
    _, watch = run(tmp_path, [dict(type="mmrazor.StopDistillHook", **{keyword: 1})], epochs=2)
    assert ["distill.loss_feat" in losses for losses in watch.losses] == [True] * 2 + [False] * 2


def test_stop_iter_works_under_an_iteration_based_loop(tmp_path):
    loop = dict(by_epoch=False, max_iters=5)
    _, watch = run(tmp_path, [{"type": STOP["type"], "stop_iter": 3}], train_cfg=loop, ema=False)
    assert ["distill.loss_feat" in losses for losses in watch.losses] == [True] * 3 + [False] * 2
    with pytest.raises(ValueError, match="stop_epoch=2 never comes under IterBasedTrainLoop"):
        run(tmp_path / "epoch", [STOP], train_cfg=loop, ema=False)


def test_after_the_stop_nothing_is_delivered(tmp_path):
    model = toys.algorithm()
    for part in ("architecture", "teacher"):
        model[part]["type"] = "mmengine.NoisyDetector"
    model["distiller"]["distill_deliveries"] = dict(
        draw=dict(type="MethodOutputs", max_keep_data=1, method_path="toys.NoisyDetector.draw"))
    delivered = []

    class Look(Watch):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            delivered.append(runner.model.architecture.used == self.teacher.used)

    toys.runner(tmp_path, [STOP, Look()], model=model, epochs=3).train()
    assert delivered == [True] * 4 + [False] * 2


def test_an_algorithm_of_another_make_is_told(tmp_path):
    class Other(toys.ToyDetector):
        distillation_stopped = False

    runner = toys.runner(tmp_path, [STOP], epochs=3, ema=False)
    runner.model = Other(4)
    runner.train()
    assert runner.model.distillation_stopped
    runner = toys.runner(tmp_path / "none", [STOP], epochs=3, ema=False)
    runner.model = toys.ToyDetector(4)
    with pytest.raises(TypeError, match="must be a distillation algorithm of MMRazor, got ToyDetector"):
        runner.train()


def test_a_resume_behind_the_stop_says_so_and_warns_of_nothing(tmp_path):
    run(tmp_path / "whole", [STOP], log_level="INFO")
    run(tmp_path / "again", [STOP], resume=True, load_from=str(tmp_path / "whole" / "epoch_3.pth"), log_level="INFO")
    whole, again = (
        "".join(path.read_text() for path in (tmp_path / name).glob("*/*.log")) for name in ("whole", "again"))
    assert "not defined in message_hub" not in again
    assert "Distillation has been stopped at iteration 4" in whole and "stopped at iteration" not in again
    assert "Distillation had been stopped when the checkpoint was written" in again


@pytest.mark.parametrize("arguments, error", [
    ({}, ValueError), (dict(stop_epoch=1, detach_epoch=1), ValueError), (dict(stop_epoch=-1), ValueError),
    (dict(stop_iter=1.5), TypeError), (dict(stop_epoch=True), TypeError),
], ids=str)
def test_stop_refuses(arguments, error):
    with pytest.raises(error, match="KDOpsStopDistillHook"):
        kd.KDOpsStopDistillHook(**arguments)


@pytest.mark.parametrize("resume_from", [1, 3], ids=["before the stop", "after the stop"])
def test_resume_lands_where_it_stopped(tmp_path, resume_from):
    hooks = [STOP, dict(type="mmrazor.KDOpsTeacherEvalHook")]  # no dropout: the teacher draws nothing
    whole, _ = run(tmp_path / "whole", hooks)
    checkpoint = tmp_path / "whole" / f"epoch_{resume_from}.pth"
    again, watch = run(tmp_path / "again", hooks, resume=True, load_from=str(checkpoint))
    expected = 0 if resume_from == 3 else 2
    assert ["distill.loss_feat" in losses for losses in watch.losses].count(True) == expected
    assert len(watch.losses) == 2 * (4 - resume_from)
    assert {name for name, _ in again.model.named_parameters()} == {name for name, _ in whole.model.named_parameters()}
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, msg=name)


def test_the_teacher_that_is_validated_stays(tmp_path):
    runner, watch = run(
        tmp_path, [STOP], epochs=3, ema=False, val_dataloader=toys.LOADER, val_evaluator=dict(type="ToyMetric"),
        val_cfg=dict(type="mmrazor.SingleTeacherDistillValLoop"))
    assert "distill.loss_feat" not in watch.losses[-1]
    assert sum(parameter.numel() for parameter in runner.val_loop.teacher.parameters()) > 0
    assert "teacher.mean" in str(runner.message_hub.log_scalars.keys())


def test_eval_hook_keeps_all_of_the_teacher_in_eval(tmp_path):
    _, watch = run(tmp_path / "stock", [], epochs=1)
    assert all(watch.teacher_training), "MMRazor leaves dropout on: without the hook there is nothing to show"
    _, watch = run(tmp_path / "ours", [dict(type="mmrazor.KDOpsTeacherEvalHook")], epochs=2)
    assert not any(watch.teacher_training)


def test_student_checkpoint_loads_into_the_plain_network(tmp_path):
    runner, _ = run(tmp_path, [dict(type="KDOpsStudentCheckpointHook")], epochs=2)
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    assert not [key for entry in ("state_dict", "ema_state_dict") for key in saved[entry] if "teacher" in key]
    assert any(key.startswith("distiller.connectors.") for key in saved["state_dict"])
    student = MODELS.build(toys.algorithm()["architecture"])
    load_checkpoint(student, str(tmp_path / "epoch_2_student.pth"), strict=True)
    averaged = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module.architecture
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(TypeError, match="drop must be a list"):
        HOOKS.build(dict(type="KDOpsStudentCheckpointHook", drop="teacher."))
