"""The checks on the project's own kernels: each barrier that is taken out of a kernel's PTX must be reported."""

import importlib
import re

import pytest
import torch
from triton_interpreter import parameters

from kdops.testing import Case, as_list

from . import memory, mode
from .interpreter import Module

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]
#: At which every loop with a barrier goes round more than once.
SHAPES = {"nchw": ((2, 16, 13, 19), (2, 24, 8, 8)), "channels_last": ((20, 16, 6, 9), (2, 24, 13, 19))}
BARRIER = re.compile(r"^\s*bar\.sync.*$", re.MULTILINE)


def recorded(loss, layout):
    """The launches of a step, one of each kernel that has barriers."""
    launcher = importlib.import_module(f"kdops._triton.{loss}")
    case = Case(loss, {"norm": "batch"}, SHAPES[layout], student_layout=layout, teacher_layout=layout)
    options = parameters(loss, case.options, "none")
    student, teacher = ([x.detach() for x in as_list(maps)] for maps in case.inputs())
    values, stats, _ = launcher.forward(student, teacher, *options, 1)
    launcher.backward(torch.ones_like(values), student, teacher, stats, *options)
    by_entry = {launch[1]: launch for launch in mode.launches if BARRIER.search(launch[0].text)}
    assert by_entry
    return by_entry.values(), (student, teacher)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("loss", ["cwd_loss", "pkd_loss"])
def test_every_barrier_is_needed(loss, layout):
    with memory.held():
        launches, _maps = recorded(loss, layout)
        silent = []
        for module, entry, grid, block, values, where in launches:
            for number, barrier in enumerate(BARRIER.finditer(module.text)):
                text = module.text[: barrier.start()] + module.text[barrier.end() :]
                changed = Module(text)
                result = changed.launch(entry, grid, block, values, memory.allocations(), options=mode.options, **where)
                if not result.findings:
                    silent.append((entry, number))
        assert silent == []
