"""The demo's recipes: their stages, losses and schedules, trained for a few steps."""

import pytest
import torch
from torchvision_import import skip_where_torchvision_is_broken

skip_where_torchvision_is_broken()
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from kdops.integrations.pytorch.demo import cli, engine, models, plan, report  # noqa: E402
from kdops.integrations.pytorch.demo.distillation import align_layers, make_taps  # noqa: E402
from kdops.integrations.pytorch.demo.settings import Settings  # noqa: E402

import kdops  # noqa: E402

TINY = {
    "images": 6,
    "val_images": 2,
    "image_size": 64,
    "batch_size": 3,
    "epochs": 2,
    "teacher_epochs": 1,
    "teacher_backbone": "slim18",
    "weak_teacher_backbone": "slim10",
    "teacher_channels": 96,
    "student_channels": 64,
    "eval_every": 0,
    "device": "cpu",
}
STEPS = 2  # per epoch


def train(folder, **options):
    trainers, _ = cli.train_all(Settings(**{**TINY, **options}, output=folder))
    return trainers


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_rtmdet_distils_on_mosaic_then_fine_tunes(tmp_path, monkeypatch):
    seen = []
    epoch_of = engine._PhaseTrainer._epoch

    def watch(phase, epoch):
        epoch_of(phase, epoch)
        seen.append((phase.trainer.run.name, epoch, phase.trainer.train_data.mosaic))

    monkeypatch.setattr(engine._PhaseTrainer, "_epoch", watch)
    trainers = train(tmp_path, recipe="rtmdet")
    assert seen == [
        ("teacher", 0, False),
        ("student", 0, True),
        ("student", 1, False),
        ("distilled", 0, True),
        ("distilled", 1, False),
    ]
    distillation = trainers["distilled"].history["steps"]["distillation"]
    assert all(value > 0 for value in distillation[:STEPS]) and distillation[STEPS:] == [0.0] * STEPS
    stages = report.run_figures(trainers["distilled"])["stages"]
    assert [(stage["stage"], stage["epochs"]) for stage in stages] == [("distil on mosaic", 1), ("fine-tune", 1)]
    assert all(0 <= stage["AP"] <= 100 for stage in stages)
    assert not any(trainers["student"].history["steps"]["distillation"])


def test_damo_lets_the_weight_fall(tmp_path, monkeypatch):
    weights = []
    loss_of = kdops.Distiller.loss

    def watch(distiller):
        weights.append(distiller._factor(lambda step, epoch: 1.0))
        return loss_of(distiller)

    monkeypatch.setattr(kdops.Distiller, "loss", watch)
    trainers = train(tmp_path, recipe="damo", epochs=3)
    total = 3 * STEPS
    expected = [0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / total)).item() for step in range(2 * STEPS)]
    assert weights[: 2 * STEPS] == pytest.approx(expected, abs=1e-6)
    assert all(align.bias is not None for align in trainers["distilled"].aligns)
    assert trainers["distilled"].history["steps"]["distillation"][2 * STEPS :] == [0.0] * STEPS


def test_mtpd_passes_the_student_from_teacher_to_teacher(tmp_path, monkeypatch):
    begun, made = [], []
    make = engine.make_distiller

    def watch(student, teacher, taps, phase, *rest):
        begun.append((phase.teacher, teacher, {k: v.clone() for k, v in student.state_dict().items()}, taps))
        made.append(make(student, teacher, taps, phase, *rest))
        return made[-1]

    monkeypatch.setattr(engine, "make_distiller", watch)
    trainers = train(tmp_path, recipe="mtpd", epochs=1)
    assert list(trainers) == ["weak_teacher", "teacher", "student", "distilled"]
    assert [name for name, *_ in begun] == ["weak_teacher", "teacher"]
    assert begun[0][1] is trainers["weak_teacher"].model and begun[1][1] is trainers["teacher"].model
    assert [len(distiller.teacher_report.folded) for distiller in made] == [12, 20]  # all of slim10's and slim18's
    assert not torch.equal(begun[0][2]["head.classification_head.cls_logits.weight"], begun[1][2][
        "head.classification_head.cls_logits.weight"
    ])  # fmt: skip
    assert not {id(tap.align) for tap in begun[0][3]} & {id(tap.align) for tap in begun[1][3]}
    figures = report.run_figures(trainers["distilled"])
    assert [stage["stage"] for stage in figures["stages"]] == [
        "stage 1: distil from weak_teacher",
        "stage 2: distil from teacher",
    ]
    rates = figures["steps"]["lr"]
    assert len(rates) == 2 * STEPS and rates[:STEPS] == rates[STEPS:]  # each stage is a full schedule
    assert len(trainers["student"].history["steps"]["lr"]) == len(rates)


@pytest.mark.parametrize("recipe", ["rtmdet", "mtpd"])  # behind the stop; at the border of the stages
def test_resume_lands_in_the_right_stage(tmp_path, monkeypatch, recipe):
    options = {"recipe": recipe, "epochs": 3 if recipe == "rtmdet" else 1}
    whole = train(tmp_path / "whole", **options)
    save, saved = engine.save_checkpoint, []

    def save_then_stop(path, content):
        save(path, content)
        saved.append(path.stem)
        if saved.count("distilled") == (2 if recipe == "rtmdet" else 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", **options)
    resumed = train(tmp_path / "cut", **options, resume=True)["distilled"]
    assert resumed.history["steps"] == whole["distilled"].history["steps"]
    assert same_weights(resumed.model, whole["distilled"].model)


@pytest.mark.parametrize("model, loss", [("retinanet", "pkd"), ("fcos", "mgd")])
def test_other_detector_and_losses(tmp_path, model, loss):
    trainer = train(tmp_path, model=model, loss=loss, epochs=1)["distilled"]
    steps = trainer.history["steps"]
    assert len(steps["distillation"]) == STEPS and all(value > 0 for value in steps["distillation"])
    assert type(trainer.model).__name__ == {"retinanet": "RetinaNet", "fcos": "FCOS"}[model]
    for align in trainer.aligns:
        assert align(torch.zeros(1, 64, 2, 2)).shape == (1, 96, 2, 2)


def test_the_losses_are_the_asked_for():
    cwd, pkd, mgd = (make_taps(Settings(loss=name, tau=2.0, backend="reference")) for name in ("cwd", "pkd", "mgd"))
    assert [tap.student for tap in cwd] == list(models.FPN_LEVELS)
    assert (cwd[0].loss.tau, cwd[0].loss.norm, cwd[0].loss.loss_weight, cwd[0].loss.backend) == (
        2.0,
        "batch",
        1.0,
        "reference",
    )
    assert pkd[0].loss.loss_weight == 10.0 and mgd[0].loss.alpha_mgd == 2e-5
    assert mgd[0].loss is not mgd[1].loss and all(tap.align is None for tap in mgd)
    assert cwd[0].align.bias is None
    assert isinstance(align_layers(make_taps(Settings(loss="mgd", teacher_channels=64)))[0], torch.nn.Identity)
    assert make_taps(Settings(loss="cwd", loss_weight=3.0))[0].loss.loss_weight == 3.0


@pytest.mark.parametrize("recipe, stop", [("rtmdet", 280), ("damo", 284)])
def test_published_stage_lengths(recipe, stop):
    runs = {run.name: run for run in plan.plan(Settings(recipe=recipe, epochs=300))}
    (phase,) = runs["distilled"].phases
    assert phase.stop_epoch == stop and phase.teacher == "teacher" and phase.mosaic
    assert [end for _, end in phase.stages()] == [stop, 300]
    (alone,) = runs["student"].phases
    assert (alone.stop_epoch, alone.epochs, alone.mosaic, alone.teacher) == (stop, 300, True, None)
