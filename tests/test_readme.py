"""The README is run: its Python as one program, its commands one by one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_runs_as_one_program():
    program = "\n".join(blocks("python"))
    assert program.count("kdops") >= 2
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", "\n".join(blocks("")), flags=re.MULTILINE))
def test_make_targets_exist(target):
    if shutil.which("make") is None or not (ROOT / "Makefile").exists():
        pytest.skip("make is not installed")
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo": "kdops.integrations.pytorch.demo", "test": "-m pytest"}[target] in planned


def test_both_commands_are_named():
    assert re.findall(r"^make ([a-z-]+)", "\n".join(blocks("")), flags=re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("command", re.findall(r"`kdops ([a-z-]+)", README))
def test_kdops_commands_exist(command):
    shown = subprocess.run(
        [sys.executable, "-m", "kdops", command, "--help"], capture_output=True, text=True, check=True
    )
    assert command in shown.stdout


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
