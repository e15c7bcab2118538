"""The command line: its output, exit status and errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdops
from kdops import _info, _op
from kdops.cli import main
from kdops.distill import order_teachers

HERE = Path(__file__).parent
NETWORKS = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from distill_networks import Detector, images


def networks():
    torch.manual_seed(0)
    teachers = {{"small": Detector(8), "large": Detector(12)}}
    batches = [images(2, seed=1), images(3, seed=2)]
    return {{"student": Detector(6), "teachers": teachers, "batches": batches, "layers": ["neck.out.0"]}}


def without_layers():
    return {{name: value for name, value in networks().items() if name != "layers"}}


def triple():
    return tuple(networks().values())


def failing():
    raise ValueError("a mistake of the file's own")
"""


@pytest.fixture
def networks_file(tmp_path):
    (tmp_path / "networks.py").write_text(NETWORKS)
    return tmp_path / "networks.py"


def _sections(text: str) -> dict[str, list[str]]:
    parts = [part.splitlines() for part in text.strip().split("\n\n")]
    return {lines[0]: lines[1:] for lines in parts}


def _row(lines: list[str], name: str) -> str:
    return next(line.split(name, 1)[1].strip() for line in lines if line.startswith(f"  {name} "))


def test_info_tells_versions_devices_and_backends_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "kdops", "info"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sections = _sections(ran.stdout)
    assert list(sections) == ["versions", "devices", "extension kdops._C", "backends"]
    assert _row(sections["versions"], "kdops") == kdops.__version__
    assert _row(sections["versions"], "torch").startswith(torch.__version__)
    assert _row(sections["versions"], "python").startswith(sys.version.split()[0])
    assert _row(sections["devices"], "cpu")
    shown = {line.split()[0] for line in sections["backends"] if line.startswith("  ") and " on cpu " in line}
    assert {"cwd_loss", "pkd_loss", "mgd_loss"} <= shown


def test_info_names_the_kernel_that_auto_takes():
    rows = _sections(_info.report())["backends"]
    for loss in ("cwd_loss", "pkd_loss"):
        taken = "fused" if _op.resolve(loss, "auto", torch.device("cpu")) == "fused" else "reference"
        assert _row(rows, f"{loss} on cpu").startswith(taken)


def test_info_gives_the_reason_where_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(_info._extension, "extension", None)
    sections = _sections(_info.report())
    assert _row(sections["extension kdops._C"], "not built") == _op.unavailable(torch.device("cpu"))
    row = sections["backends"].index(next(line for line in sections["backends"] if "cwd_loss on cpu" in line))
    assert sections["backends"][row].endswith("reference (eager PyTorch)")
    assert sections["backends"][row + 1].strip() == f"not fused: {_op.unavailable(torch.device('cpu'))}"


def test_info_tells_of_a_loss_without_a_kernel(monkeypatch):
    monkeypatch.setattr(_info, "losses", lambda: ["other_loss"])
    library = torch.library.Library("kdops", "FRAGMENT")  # its operators live as long as it does
    library.define("other_loss(Tensor x) -> Tensor")
    rows = _sections(_info.report())["backends"]
    if _info._extension.extension is not None:
        assert _row(rows, "other_loss on cpu") == "reference (eager PyTorch)"
        assert rows[1].strip().startswith("not fused: no kernel is registered for it; kdops._C is older")


def test_info_warns_of_an_extension_for_another_torch(monkeypatch):
    monkeypatch.setattr(_info._extension, "build_info", lambda: {"torch": "2.0.0", "compiler": "gcc"})
    assert "it was built for torch 2.0.0" in _info.report()


def test_student_checkpoint_writes_and_reports(tmp_path, capsys):
    source, target = str(tmp_path / "kd.pth"), str(tmp_path / "s.pth")
    torch.save({"student.w": torch.ones(3), "teacher.w": torch.ones(5)}, source)
    assert main(["student-checkpoint", source, target]) == 0
    printed = capsys.readouterr().out
    assert "layout   mgd" in printed and "teacher      1 tensors" in printed and target in printed
    assert torch.equal(torch.load(target)["w"], torch.ones(3))
    assert main(["student-checkpoint", source, target]) == 1
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.startswith(f"kdops student-checkpoint: {target} exists;")
    assert main(["student-checkpoint", source, target, "--force", "--layout", "kdops"]) == 0
    assert main(["student-checkpoint", source, target, "--force", "--layout", "mmrazor"]) == 1
    assert "'architecture.'" in capsys.readouterr().err


def test_student_checkpoint_opts_in_to_pickles(tmp_path, capsys):
    source, target = str(tmp_path / "kd.pth"), str(tmp_path / "s.pth")
    torch.save({"state_dict": {"architecture.w": torch.ones(3)}, "hub": Path("a")}, source)
    assert main(["student-checkpoint", source, target]) == 1
    assert "--allow-pickle" in capsys.readouterr().err and not Path(target).exists()
    assert main(["student-checkpoint", source, target, "--allow-pickle"]) == 0
    assert torch.equal(torch.load(target)["state_dict"]["w"], torch.ones(3))


def test_teacher_order_prints_what_the_function_gives(networks_file, capsys):
    plot = networks_file.with_name("costs.png")
    assert main(["teacher-order", str(networks_file), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    given = sys.modules["__kdops_networks__"].networks()
    expected = order_teachers(given.pop("student"), given.pop("teachers"), given.pop("batches"), **given)
    assert printed.strip() == expected.table().strip() and expected.order[-1] == "large"
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_teacher_order_options_go_before_what_the_function_gives(networks_file, capsys, monkeypatch):
    monkeypatch.chdir(networks_file.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ["--layers", "stage", "--strongest", "small", "--batches", "1", "--ridge", "0.1"]
    assert main(["teacher-order", "networks:without_layers", *options]) == 0
    printed = capsys.readouterr().out
    given = sys.modules.pop("networks").networks()
    batches = given["batches"][:1]
    expected = order_teachers(
        given["student"], given["teachers"], batches, layers=["stage"], strongest="small", ridge=0.1
    )
    assert printed.strip() == expected.table().strip() and expected.order[-1] == "small"


REFUSED = {
    "no file": ("nowhere.py", [], "there must be a file to read the networks from, got no file at nowhere.py"),
    "no module": (
        "kdops_nowhere.networks",
        [],
        "there must be a module 'kdops_nowhere.networks' on the path, got none",
    ),
    "no function": ("FILE:other", [], "must have a function 'other', got None"),
    "no dict": ("FILE:triple", [], "must return a dict of student, teachers, batches and perhaps layers, .*got tuple"),
    "no layers": ("FILE:without_layers", [], "the layers to compare must be given"),
    "layer": ("FILE", ["--layers", "nek.out.0"], "has no layer 'nek.out.0'; did you mean 'neck.out.0'"),
    "strongest": ("FILE", ["--strongest", "huge"], r"strongest must be one of \['small', 'large'\], got 'huge'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_teacher_order_refuses_in_words(case, networks_file, capsys):
    reference, options, text = REFUSED[case]
    assert main(["teacher-order", reference.replace("FILE", str(networks_file)), *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdops teacher-order: ")]
    assert re.search(text, line), line


def test_mistakes_in_the_users_file_keep_their_traceback(networks_file):
    with pytest.raises(ValueError, match="a mistake of the file's own"):
        main(["teacher-order", f"{networks_file}:failing"])


@pytest.mark.parametrize("arguments", [[], ["info"], ["student-checkpoint"], ["teacher-order"]])
def test_help_of_every_command(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--help"])
    assert done.value.code == 0 and "usage: kdops" in capsys.readouterr().out


def test_version_and_unknown_commands(capsys):
    for arguments, code in ((["--version"], 0), (["nonsense"], 2), ([], 2)):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == code
    assert capsys.readouterr().out == f"kdops {kdops.__version__}\n"
