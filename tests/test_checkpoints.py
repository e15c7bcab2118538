"""Student checkpoints: every layout, what is kept and dropped, and errors."""

from __future__ import annotations

import copy
import fractions
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_networks import LAYERS, Detector, images, pair, targets
from torch import Tensor, nn

from kdops import CWDLoss
from kdops.distill import DistilledStudent, Distiller, ProgressiveDistillation, Stage, Tap, student_checkpoint

META = {"epoch": 3, "experiment": "kd", "classes": ["a", "b"]}


def _distiller(student: nn.Module, teacher: nn.Module) -> Distiller:
    return Distiller(student, teacher, [Tap(layer, loss=CWDLoss(), align=(6, 10)) for layer in LAYERS])


class _Algorithm(nn.Module):
    """The names that MMRazor's and MGD's algorithms give to their parts."""

    def __init__(self, student: str, student_net: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        for name, module in {student: student_net, **others}.items():
            self.add_module(name, module)


def _optimizer(model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer that has stepped: two more tensors and a counter per parameter."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def _mmrazor(student: nn.Module, teacher: nn.Module) -> nn.Module:
    connectors = nn.ModuleDict({"connectors": nn.ModuleDict({"neck": nn.Conv2d(6, 10, 1, bias=False)})})
    return _Algorithm("architecture", student, teacher=teacher, distiller=connectors)


def _mgd(student: nn.Module, teacher: nn.Module) -> nn.Module:
    losses = nn.ModuleDict({"loss_mgd_fpn_0": nn.Conv2d(10, 10, 3)})
    return _Algorithm("student", student, teacher=teacher, distill_losses=losses)


def _kdops(student: nn.Module, teacher: nn.Module) -> nn.Module:
    return DistilledStudent(_distiller(student, teacher))


LAYOUTS = {"kdops": (_kdops, "model"), "mmrazor": (_mmrazor, "state_dict"), "mgd": (_mgd, "state_dict")}


@pytest.fixture
def networks() -> tuple[Detector, Detector]:
    student, teacher = pair()
    student(images())  # statistics of its own
    return student, teacher


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _check_loads(weights: dict[str, Tensor], student: nn.Module) -> None:
    """The plain network loads the weights strictly and then computes what the student computes."""
    plain = Detector(6)
    plain.load_state_dict(weights)
    assert torch.equal(plain.eval()(images()), copy.deepcopy(student).eval()(images()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_and_only_student_and_meta_are_kept(layout, networks, tmp_path):
    student, teacher = networks
    build, entry = LAYOUTS[layout]
    model = build(student, teacher)
    content = {"meta": META, entry: model.state_dict(), "optimizer": _optimizer(model), "scheduler": {"last_epoch": 3}}
    torch.save(content, tmp_path / "kd.pth")
    done = student_checkpoint(tmp_path / "kd.pth", tmp_path / "student.pth")
    written = torch.load(tmp_path / "student.pth", weights_only=True)
    assert written.keys() == {"meta", entry} and written["meta"] == META
    _check_loads(written[entry], student)
    assert written[entry]._metadata == student.state_dict()._metadata
    own = student.state_dict()
    assert (done.layout, done.meta, done.averaged) == (layout, True, False)
    assert (done.kept.tensors, done.kept.bytes) == (len(own), _bytes(own.values()))
    parts = {name for name, _ in model.named_children()} - {"student", "architecture"}
    assert set(done.dropped) == {f"{entry}: {part}" for part in parts} | {"optimizer", "scheduler"}
    assert done.dropped["optimizer"].tensors == 3 * len(list(model.parameters()))
    if f"{entry}: teacher" in done.dropped:
        assert done.dropped[f"{entry}: teacher"].bytes == _bytes(teacher.state_dict().values())
    assert sorted(os.listdir(tmp_path)) == ["kd.pth", "student.pth"], "a temporary file was left behind"
    assert (tmp_path / "student.pth").stat().st_mode & 0o777 == (tmp_path / "kd.pth").stat().st_mode & 0o777


def test_report_has_counts_and_megabytes(tmp_path):
    weights = {
        "architecture.w": torch.zeros(500_000),
        "teacher.w": torch.zeros(2, 1_000_000),
        "teacher.b": torch.ones(1),
    }
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "kd.pth")
    lines = str(student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")).splitlines()
    assert lines[0].split() == ["layout", "mmrazor"]
    assert lines[1].split() == ["kept", "student", "1", "tensors", "2.00", "MB"]
    assert lines[2].split() == ["dropped", "state_dict:", "teacher", "2", "tensors", "8.00", "MB"]
    assert lines[3].split() == ["kept", "meta"]
    assert lines[4].split()[:2] == ["written", str(tmp_path / "s.pth")] and lines[4].endswith("(2.00 MB)")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_names_of_wrappers_are_taken_off(wrap, networks, tmp_path):
    model = wrap(_kdops(*networks))
    keys = list(model.state_dict())
    assert not any(key.startswith("student.") for key in keys)
    torch.save(model.state_dict(), tmp_path / "kd.pth")
    done = student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")
    assert done.layout == "kdops" and list(done.dropped) == ["distiller"] and not done.meta
    _check_loads(torch.load(tmp_path / "s.pth"), networks[0])


def test_student_beside_its_distiller_is_the_layout_of_kdops(networks, tmp_path):
    student, teacher = networks
    stages = [Stage(teacher, [Tap(LAYERS[0], loss=CWDLoss(), align=(6, 10))])]
    for number, distiller in enumerate((_distiller(student, teacher), ProgressiveDistillation(student, stages))):
        content = {"epoch": 1, "student": student.state_dict(), "distiller": distiller.state_dict()}
        torch.save(content, tmp_path / f"kd{number}.pth")
        done = student_checkpoint(tmp_path / f"kd{number}.pth", tmp_path / f"s{number}.pth")
        assert done.layout == "kdops" and set(done.dropped) == {"epoch", "distiller"}
        written = torch.load(tmp_path / f"s{number}.pth")
        assert list(written) == ["student"]
        _check_loads(written["student"], student)


def test_averaged_weights_of_mmengine_are_taken(networks, tmp_path):
    student, teacher = networks
    model = _mmrazor(student, teacher)
    average = torch.optim.swa_utils.AveragedModel(model).state_dict()
    raw = model.state_dict()
    for value in average.values():
        if value.is_floating_point():
            value.mul_(0.5)
    # EMAHook swaps the two before it saves.
    state = {key: average[f"module.{key}"] for key in raw}
    ema = {"steps": average["n_averaged"], **{f"module.{key}": value for key, value in raw.items()}}
    torch.save({"meta": META, "state_dict": state, "ema_state_dict": ema}, tmp_path / "kd.pth")
    done = student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")
    assert done.averaged and "EMAHook" in str(done) and "ema_state_dict" in done.dropped
    written = torch.load(tmp_path / "s.pth")["state_dict"]
    torch.testing.assert_close(written["head.weight"], student.head.weight * 0.5, rtol=0, atol=0)


def test_a_slice_of_a_larger_tensor_is_written_without_the_rest(tmp_path):
    flat = torch.arange(1_000_000.0)
    tied = torch.ones(10)
    weights = {"student.w": flat[:10], "student.a": tied, "student.b": tied, "teacher.w": flat[10:]}
    torch.save(weights, tmp_path / "kd.pth")
    student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")
    written = torch.load(tmp_path / "s.pth")
    assert torch.equal(written["w"], torch.arange(10.0))
    assert written["a"].data_ptr() == written["b"].data_ptr(), "tied weights must stay tied"
    assert (tmp_path / "s.pth").stat().st_size < 10_000


def test_a_trained_student_survives_the_way_round(tmp_path):
    student, teacher = pair()
    model = _kdops(student, teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        output = model(images(seed=step), targets(seed=step))
        (output.student["loss_box"] + output.distill).backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "kd.pth")
    student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")
    _check_loads(torch.load(tmp_path / "s.pth")["model"], student)


def test_existing_target_needs_force_and_may_be_the_source(networks, tmp_path):
    path = tmp_path / "kd.pth"
    torch.save(_kdops(*networks).state_dict(), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"student_checkpoint: .*kd\.pth exists; force=True \(--force\)"):
        student_checkpoint(path, path)
    assert path.read_bytes() == before
    student_checkpoint(path, path, force=True)
    _check_loads(torch.load(path), networks[0])


def test_a_failed_write_leaves_the_old_target(networks, tmp_path, monkeypatch):
    torch.save(_kdops(*networks).state_dict(), tmp_path / "kd.pth")
    (tmp_path / "s.pth").write_text("old")

    def broken(content: Any, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth", force=True)
    assert (tmp_path / "s.pth").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["kd.pth", "s.pth"]


def test_unknown_layout_is_refused_unless_one_is_named(networks, tmp_path):
    student, teacher = networks
    torch.save({"state_dict": student.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(
        ValueError, match="unknown layout: its weights begin with 'stem', 'stage', 'neck', 'head'; known"
    ):
        student_checkpoint(tmp_path / "plain.pth", tmp_path / "s.pth")
    strange = {f"student.{k}": v for k, v in student.state_dict().items()} | {"discriminator.w": torch.ones(4)}
    torch.save(strange, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match="unknown layout: its weights begin with 'student', 'discriminator'"):
        student_checkpoint(tmp_path / "strange.pth", tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"in layout 'mmrazor' the student's keys must begin with 'architecture\.'"):
        student_checkpoint(tmp_path / "strange.pth", tmp_path / "s.pth", layout="mmrazor")
    with pytest.raises(ValueError, match="layout must be one of 'kdops', 'mmrazor', 'mgd', got 'mmyolo'"):
        student_checkpoint(tmp_path / "strange.pth", tmp_path / "s.pth", layout="mmyolo")
    assert not (tmp_path / "s.pth").exists()
    done = student_checkpoint(tmp_path / "strange.pth", tmp_path / "s.pth", layout="mgd")
    assert done.dropped["discriminator"].bytes == 16
    _check_loads(torch.load(tmp_path / "s.pth"), student)


@pytest.mark.parametrize("zipped", [True, False])
def test_old_pickles_need_an_opt_in(zipped, tmp_path):
    content = {"state_dict": {"student.w": torch.arange(3.0)}, "hub": fractions.Fraction(1, 2), "meta": META}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"more than tensors.*\(fractions\.Fraction\).*allow_pickle=True \(--allow-pickle\)"
    ):
        student_checkpoint(tmp_path / "old.pth", tmp_path / "s.pth")
    assert not (tmp_path / "s.pth").exists()
    done = student_checkpoint(tmp_path / "old.pth", tmp_path / "s.pth", allow_pickle=True)
    assert done.dropped["hub"].tensors == 0
    written = torch.load(tmp_path / "s.pth", weights_only=True)
    assert torch.equal(written["state_dict"]["w"], torch.arange(3.0)) and written["meta"] == META


def test_a_class_that_is_not_installed_is_named(tmp_path):
    archive = tmp_path / "kd.pth"
    torch.save({"state_dict": {"student.w": torch.ones(1)}, "hub": fractions.Fraction(1, 2)}, archive)
    with zipfile.ZipFile(archive) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, data.replace(b"fractions", b"mmengines"))
    with pytest.raises(ValueError, match="cannot be imported here .No module named 'mmengines'.: install"):
        student_checkpoint(archive, tmp_path / "s.pth", allow_pickle=True)


def _write_cut(path: Path, **options: Any) -> None:
    torch.save({"student.w": torch.ones(1000)}, path, **options)
    path.write_bytes(path.read_bytes()[:-600])


FILES = {
    "empty": (lambda path: path.write_bytes(b""), "neither a zip archive nor a pickle"),
    "text": (lambda path: path.write_text("weights"), "neither a zip archive nor a pickle"),
    "cut zip": (_write_cut, "a zip archive that is cut off"),
    "cut pickle": (lambda path: _write_cut(path, _use_new_zipfile_serialization=False), r"file\.pth: \w+"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "it holds a Tensor, not a dict"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").close(), r"file\.pth: \w+"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_file_that_is_no_checkpoint_is_refused(kind, allow_pickle, tmp_path):
    write, reason = FILES[kind]
    write(tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"the file must be a checkpoint written by torch.save, got .*{reason}"):
        student_checkpoint(tmp_path / "file.pth", tmp_path / "s.pth", allow_pickle=allow_pickle)
    assert not (tmp_path / "s.pth").exists()


def test_missing_files_folders_and_weights_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no file at .*none.pth"):
        student_checkpoint(tmp_path / "none.pth", tmp_path / "s.pth")
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "kd.pth")
    with pytest.raises(FileNotFoundError, match="the target's folder must exist, got .*nowhere"):
        student_checkpoint(tmp_path / "kd.pth", tmp_path / "nowhere" / "s.pth")
    with pytest.raises(ValueError, match="holds no weights: .* got entries 'epoch', 'optimizer'"):
        student_checkpoint(tmp_path / "kd.pth", tmp_path / "s.pth")


def test_students_own_config_takes_the_place_of_the_runs(tmp_path: Path) -> None:
    meta = {**META, "cfg": "model = dict(type='Distilled')", "kdops_student_cfg": "model = dict(type='Net')"}
    model = _mmrazor(*pair())
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "in.pth")
    student_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["meta"] == {**META, "cfg": "model = dict(type='Net')"}
