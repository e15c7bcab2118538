"""The demo from its command line to its report, on a few images."""

import json
import math

import pytest
import torch
from PIL import Image
from torchvision_import import skip_where_torchvision_is_broken

skip_where_torchvision_is_broken()
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from kdops.integrations.pytorch.demo import cli, distillation, engine, models  # noqa: E402
from kdops.integrations.pytorch.demo.distillation import teacher_options  # noqa: E402
from kdops.integrations.pytorch.demo.settings import Settings, parse  # noqa: E402

from kdops import TeacherOptions  # noqa: E402

TINY = {
    "images": 12,
    "val_images": 4,
    "image_size": 64,
    "batch_size": 4,
    "epochs": 2,
    "teacher_epochs": 1,
    "teacher_backbone": "slim18",
    "teacher_channels": 96,
    "student_channels": 64,
    "device": "cpu",
}
STEPS = 3  # per epoch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to the end: its settings and its report."""
    settings = Settings(**TINY, output=tmp_path_factory.mktemp("demo"))
    return settings, cli.run(settings)


def test_report_is_complete(finished):
    settings, report = finished
    folder = settings.output / "report"
    assert json.loads((folder / "report.json").read_text()) == report
    assert list(report["runs"]) == ["teacher", "student", "distilled"]
    for name, run in report["runs"].items():
        epochs = settings.teacher_epochs if name == "teacher" else settings.epochs
        assert [len(column) for column in run["steps"].values()] == [STEPS * epochs] * 3
        assert all(map(math.isfinite, run["steps"]["detection"]))
        assert all(value > 0 for value in run["steps"]["detection"])
        assert all((value > 0) == (name == "distilled") for value in run["steps"]["distillation"])
        assert run["final"]["epochs_trained"] == epochs
        assert 0 <= run["final"]["AP"] <= 100
        assert run["stages"][0]["step_ms"] > 0
    assert report["data"]["train"]["images"] == 12
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(-1 <= value <= 1 for value in report["attention_agreement"].values())


def test_student_is_smaller_and_as_long_trained(finished):
    _, report = finished
    teacher, student, distilled = report["runs"].values()
    assert student["parameters"] < teacher["parameters"] / 2
    assert student["gflop_per_image"] < teacher["gflop_per_image"] / 2
    for same in ("parameters", "gflop_per_image", "backbone", "fpn_channels"):
        assert student[same] == distilled[same]
    assert student["steps"]["lr"] == distilled["steps"]["lr"]
    # The same initial weights and the same first batch: the runs diverge only after the first step.
    assert student["steps"]["detection"][0] == distilled["steps"]["detection"][0]
    assert student["steps"]["detection"][1:] != distilled["steps"]["detection"][1:]


def test_pictures_and_index(finished):
    settings, report = finished
    folder = settings.output / "report"
    page = (folder / "index.html").read_text()
    assert {p["file"] for p in report["pictures"]} == {"curves.png", "detections.png", "attention.png", "channels.png"}
    for picture in report["pictures"]:
        assert f"src='{picture['file']}'" in page
        with Image.open(folder / picture["file"]) as image:
            assert len(image.convert("L").resize((64, 64)).getcolors()) > 20  # something is drawn
    assert report["summary"] in page


def test_nothing_temporary_is_left(finished):
    settings, _ = finished
    assert [path.name for path in settings.output.rglob(".*")] == []


@pytest.mark.parametrize("name", ["student", "distilled"])
def test_student_checkpoint_loads_into_the_plain_model(finished, name):
    settings, _ = finished
    path = settings.output / f"{name}.pt"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "meta"}
    plain = models.build_detector(models.DetectorConfig("fcos", "slim10", 64, 11, 64))
    assert type(plain).__module__.startswith("torchvision.")
    plain.load_state_dict(content["model"], strict=True)
    trained = torch.load(settings.output / "checkpoints" / f"{name}.pt", weights_only=True)["model"]
    loaded = models.load_student(path).state_dict()
    assert loaded.keys() == trained.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded[key], trained[key]) for key in trained)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [2, 4])  # within the student alone, within the distilled student
def test_resume_lands_where_it_stopped(finished, tmp_path, monkeypatch, after):
    reference, expected = finished
    settings = Settings(**TINY, output=tmp_path / "demo")
    save, saved = engine.save_checkpoint, []

    def save_then_stop(path, content):
        save(path, content)
        saved.append(path)
        if len(saved) == after:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(engine, "save_checkpoint", save_then_stop)
        with pytest.raises(Interrupted):
            cli.run(settings)
    report = cli.run(Settings(**TINY, output=settings.output, resume=True))
    for name in ("student", "distilled"):
        for column, values in expected["runs"][name]["steps"].items():
            assert report["runs"][name]["steps"][column] == values, (name, column)
        first = torch.load(reference.output / f"{name}.pt", weights_only=True)["model"]
        second = torch.load(settings.output / f"{name}.pt", weights_only=True)["model"]
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert report["attention_agreement"] == expected["attention_agreement"]


def test_resume_refuses_other_settings(finished):
    settings, _ = finished
    with pytest.raises(ValueError, match="--resume needs the settings of the run in .*lr 0.001 -> 0.1"):
        cli.run(Settings(**{**TINY, "lr": 0.1}, output=settings.output, resume=True))


@pytest.mark.parametrize("computes, dtype", [(True, torch.bfloat16), (False, None)])
def test_teacher_is_prepared_in_what_the_device_computes_in(monkeypatch, computes, dtype):
    monkeypatch.setattr(distillation, "_computes_in_bfloat16", lambda device: computes)
    assert teacher_options(Settings()) == TeacherOptions(dtype=dtype, compile=False)


def test_command_line_covers_every_setting():
    assert parse([]) == Settings()
    given = parse(["--prepare-teacher", "fp16", "--compile-teacher"])
    assert teacher_options(given) == TeacherOptions(dtype=torch.float16, compile=True)
    assert teacher_options(parse(["--prepare-teacher", "fp32"])) == TeacherOptions(compile=False)
    assert teacher_options(parse(["--prepare-teacher", "off"])) is None
    given = parse(["--model", "retinanet", "--teacher-epochs", "3", "--amp", "bf16", "--resume", "--output", "x"])
    assert (given.model, given.teacher_epochs, given.amp, given.resume, str(given.output)) == (
        "retinanet",
        3,
        "bf16",
        True,
        "x",
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--recipe", "rtmdet", "--epochs", "1"], "has two stages and needs --epochs 2 or more, got 1"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_own_data_trains(finished, tmp_path):
    """The composed folder serves as somebody's own."""
    settings, _ = finished
    (own,) = (settings.output / "data").iterdir()
    options = {**TINY, "epochs": 1, "model": "retinanet", "image_size": 96, "workers": 1, "flip": 0.5}
    trainers, described = cli.train_all(Settings(**options, data=own, output=tmp_path / "out"))
    assert described["source"] == str(own) and described["train"]["images"] == 12
    assert not (tmp_path / "out" / "data").exists()
    assert len(trainers["distilled"].history["steps"]["distillation"]) == STEPS


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path):
    settings, _ = finished
    (own,) = (settings.output / "data").iterdir()
    with pytest.raises(FloatingPointError, match="losses of teacher were not finite in epoch 1"):
        cli.train_all(Settings(**{**TINY, "lr": float("inf")}, data=own, output=tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoints").exists()
