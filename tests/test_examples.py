"""The scripts in examples/ run as they are, and the distillation loss falls."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torchvision_import import skip_where_torchvision_is_broken

FOLDER = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs a source checkout")


def losses(name, capsys):
    """The distillation losses that a script prints, line by line."""
    with torch.random.fork_rng(devices=[]):  # the scripts set a seed
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    return [float(value) for value in re.findall(r"distillation (\S+)$", capsys.readouterr().out, flags=re.MULTILINE)]


def test_all_examples_are_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == {
        "cwd_training_loop.py",
        "distiller_two_taps.py",
        "pkd_torchvision_fcos.py",
    }


def test_cwd_in_a_training_loop(capsys):
    values = losses("cwd_training_loop.py", capsys)
    assert len(values) == 20 and values[-1] < 0.75 * values[0]
    assert all(later < earlier for earlier, later in zip(values, values[1:]))


def test_distiller_with_two_taps_and_an_end(capsys):
    values = losses("distiller_two_taps.py", capsys)
    assert len(values) == 6 and values[0] > values[1] > values[2] > values[3] > 0
    assert values[4:] == [0, 0]


def test_pkd_on_a_torchvision_detector(capsys):
    skip_where_torchvision_is_broken()
    pytest.importorskip("torchvision")
    values = losses("pkd_torchvision_fcos.py", capsys)
    assert len(values) == 5 and 0 < values[-1] < 0.8 * values[0]
