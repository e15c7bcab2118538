"""Launches through Triton's front door: how many there are, what they compile, and whether they can be replayed."""

import importlib
from collections import Counter

import pytest
import torch
from torch import nn

import kdops
from kdops import _op
from kdops.testing import Case, as_list

from . import mode
from .interpreter import PtxError

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]
SIZES = [(8, 12), (10, 12), (12, 12), (12, 16), (14, 16), (16, 16), (16, 20), (18, 20), (20, 20), (20, 26)]
#: Launches of a training step with all levels in one group of launches; one more where rows are split.
STEPS = {
    "cwd_loss": Counter(fill_table=2, cwd_moments=1, cwd_merge=1, cwd_sums=1, cwd_gradient=1),
    "pkd_loss": Counter(fill_table=2, pkd_moments=1, pkd_merge=1, pkd_gradient=1),
}


@pytest.fixture
def on_triton(monkeypatch):
    """The losses' own autograd node, with the Triton kernels below it as on a GPU."""
    for name in STEPS:
        launcher = importlib.import_module(f"kdops._triton.{name}")
        loss = importlib.import_module(f"kdops.{name}")
        (operator,) = (x for x in vars(loss).values() if isinstance(x, _op.FusedLoss))
        monkeypatch.setattr(operator, "forward", launcher.forward)
        monkeypatch.setattr(operator, "backward", launcher.backward)
    monkeypatch.setattr(_op, "_what_to_save", lambda student, reduction: _op.Save.STATS)


def entries():
    return Counter(result.entry for result in mode.results)


def compiled(loss):
    """Compiled forms of each kernel that a loss launches."""
    from .driver import variants

    modules = [importlib.import_module(f"kdops._triton.{name}") for name in (loss, "plan", "tiles")]
    kernels = {name: x for module in modules for name, x in vars(module).items() if hasattr(x, "device_caches")}
    return {name: variants(kernels[name]) for name in STEPS[loss]}


@pytest.mark.parametrize("loss", STEPS)
def test_a_multi_scale_training_run(loss, on_triton):
    """Ten input sizes: the launches of a step do not depend on them, and the second epoch compiles nothing."""
    torch.manual_seed(0)
    teacher, student = (nn.Conv2d(3, 16, 3, padding=1) for _ in range(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options = {"norm": "batch"} if loss == "cwd_loss" else {}
    before = compiled(loss)
    after_first = None
    losses = []
    for _epoch in range(2):
        for height, width in SIZES:
            mode.forget()
            image = torch.randn(2, 3, height, width)
            with torch.no_grad():
                targets = [teacher(image), teacher(image[:, :, ::2, ::2])]
            features = [student(image), student(image[:, :, ::2, ::2])]
            value = getattr(kdops, loss)(features, targets, **options)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            assert STEPS[loss] - entries() == Counter()
            assert entries() - STEPS[loss] in (Counter(), Counter(cwd_finish=1))
        after_first = after_first or compiled(loss)
    assert losses[-1] < losses[0]
    assert compiled(loss) == after_first
    # Maps of one dtype and order differ in how far they are aligned and in the tiles that fit them; no more than that.
    new = {name: after_first[name] - before[name] for name in after_first}
    assert new["fill_table"] <= 2 and all(0 <= count <= 8 for count in new.values()), new
    assert any(new.values()) or any(before.values())


@pytest.mark.parametrize("loss", STEPS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_recorded_step_replays_on_new_values(loss, layout):
    """As a CUDA graph does: nothing of the host's is asked again, so nothing may depend on the values."""
    from triton_interpreter import parameters

    from . import memory

    launcher = importlib.import_module(f"kdops._triton.{loss}")
    case = Case(loss, {"norm": "batch"}, ((2, 8, 13, 19), (2, 8, 5, 7)), student_layout=layout, teacher_layout=layout)
    options = parameters(loss, case.options, "none")
    student, teacher = ([x.detach() for x in as_list(maps)] for maps in case.inputs())
    fresh = [[x.detach() for x in as_list(maps)] for maps in case.inputs(seed=5)]

    def step():
        values, stats, _ = launcher.forward(student, teacher, *options, 1)
        return values, launcher.backward(torch.ones_like(values), student, teacher, stats, *options)

    with memory.held():
        recorded = step()
        first = [x.clone() for x in (recorded[0], *recorded[1])]
        count = len(mode.launches)
        for maps, new in zip((student, teacher), fresh):
            for old, x in zip(maps, new):
                old.copy_(x)
        mode.replay()
        assert len(mode.launches) == 2 * count
        replayed = [x.clone() for x in (recorded[0], *recorded[1])]
        values, gradients = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, (values, *gradients)))
    assert not any(torch.equal(a, b) for a, b in zip(replayed, first))


def test_a_launch_that_triton_refuses_fails(monkeypatch):
    """Triton compares the global values that a kernel uses at every launch."""
    from triton import language as tl

    from . import sample_kernels

    x, out = torch.ones(8), torch.empty(8)
    sample_kernels.scaled[(1,)](x, out, 8, SIZE=8)
    assert (out == 3).all()
    monkeypatch.setattr(sample_kernels, "FACTOR", tl.constexpr(4))
    with pytest.raises(RuntimeError, match="FACTOR has changed"):
        sample_kernels.scaled[(1,)](x, out, 8, SIZE=8)


def test_a_faulty_kernel_is_reported_with_its_line():
    from . import sample_kernels

    sample_kernels.unmasked[(1,)](torch.zeros(128), SIZE=128)
    with pytest.raises(PtxError, match="out of bounds global write") as error:
        sample_kernels.unmasked[(1,)](torch.zeros(100), SIZE=128)
    assert "sample_kernels.py:18" in str(error.value) and "bytes past an allocation of 400 bytes" in str(error.value)
    with pytest.raises(PtxError, match="uninitialised global read"):
        sample_kernels.scaled[(1,)](torch.empty(8), torch.empty(8), 8, SIZE=8)


def test_arguments_of_every_kind():
    from . import sample_kernels

    out = torch.zeros(3, dtype=torch.float64)
    for a, b, c in ((7, 2**40, 0.5), (-3, -(2**35), -1.25), (1, 2, 3.0)):
        sample_kernels.scalars[(1,)](out, a, b, c)
        assert out.tolist() == [a, b, c]
