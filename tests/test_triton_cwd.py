"""The Triton kernels of channel-wise distillation, in the interpreter and on a GPU where there is one."""

import itertools

import pytest
import torch
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    check,
    forced_tiling,
    in_this_process,
    launcher,
    parameters,
    run_in_the_interpreter,
    value_and_gradient,
)

from kdops.testing import LAYOUTS, LOSSES, Case, as_list, laid_out, relative_error

LOSS = "cwd_loss"
BATCH = {"norm": "batch", "tau": 1.0}
PLAIN = {"norm": None, "tau": 2.0}
SMALL, SQUARE, ROW = (2, 5, 13, 19), (2, 3, 20, 20), (2, 5, 1, 67)
PYRAMID = ((2, 4, 16, 20), (2, 3, 7, 8), (2, 4, 4, 5), (2, 4, 2, 3), (2, 9, 3, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


if not INTERPRETED:

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)


@in_this_process
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", LOSSES[LOSS][1], ids=str)
def test_options_and_reductions(options, reduction):
    check(Case(LOSS, options, (SMALL,), reduction=reduction))


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("shape", [SQUARE, ROW, (1, 3, 25, 38), (7, 19, 1, 1), (1, 1, 40, 33)], ids=str)
def test_sizes(shape, options):
    if options is PLAIN or shape[2:] != (1, 1):
        check(Case(LOSS, options, (shape,)))


@in_this_process
@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_dtypes(student, teacher):
    options = BATCH if DTYPES.index(student) % 2 == DTYPES.index(teacher) % 2 else PLAIN
    check(Case(LOSS, options, ((2, 3, 8, 8),), student, teacher))


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, options):
    check(Case(LOSS, options, ((2, 8, 6, 12),), student_layout=layout, teacher_layout=layout))


@in_this_process
@pytest.mark.parametrize(
    "student, teacher", [("nchw", "channels_last"), ("channels_last", "crop"), ("expanded", "channels_last_crop")]
)
def test_layouts_that_differ(student, teacher):
    check(Case(LOSS, BATCH, ((2, 16, 5, 7),), torch.bfloat16, torch.float32, student, teacher))


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_levels(layout, options):
    reduction = "none" if options is BATCH else "mean"
    check(Case(LOSS, options, PYRAMID, student_layout=layout, teacher_layout=layout, reduction=reduction))


@in_this_process
def test_levels_of_different_kinds():
    """Levels that cannot share a launch: dtype and memory format differ."""
    case = Case(LOSS, BATCH, PYRAMID[:3], reduction="none")
    kinds = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"), (torch.float16, "crop"))
    student, teacher = case.inputs(DEVICE)
    student = [laid_out(s.detach().to(dtype), layout) for s, (dtype, layout) in zip(student, kinds)]
    value, gradient = value_and_gradient(case, student, teacher, 65536.0)
    values, expected = case.oracle(student, teacher, [torch.full(s.shape[:2], 65536.0) for s in student])
    assert relative_error(value, torch.cat([v.flatten() for v in values])) < 5e-6
    for s, got, want in zip(student, gradient, expected):
        assert got.dtype == s.dtype
        assert relative_error(got, want) < (1e-5 if s.dtype == torch.float32 else 4e-3)


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("mean", [30.0, -30.0])
def test_large_means(mean, options):
    check(Case(LOSS, options, ((2, 3, 20, 20),), mean=mean))


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
def test_rows_split_over_programs(layout, options):
    shapes = ((1, 3, 12, 16), (2, 3, 9, 12))
    case = Case(LOSS, options, shapes, student_layout=layout, teacher_layout=layout, mean=30.0)
    with forced_tiling(steps=1):
        check(case)


@in_this_process
@pytest.mark.parametrize("options", [BATCH, PLAIN], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "crop"])
def test_positions_of_64_bits(layout, options):
    with forced_tiling(wide=True):
        check(Case(LOSS, options, ((2, 3, 13, 19),), student_layout=layout, teacher_layout=layout))


@in_this_process
@pytest.mark.parametrize("norm", [None, "batch", "pkd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_values_that_are_not_finite(side, bad, norm):
    """They make their row NaN, with a normalisation their channel, and leave the others alone."""
    case = Case(LOSS, {"norm": norm}, ((2, 2, 5, 7),), reduction="none")
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    with torch.no_grad():
        (student if side == "student" else teacher)[0][1, 1, 2, 3] = bad
    value, (gradient,) = value_and_gradient(case, student, teacher)
    value = value.view(2, 2)
    hit = torch.tensor([[False, norm is not None], [False, True]], device=DEVICE)
    assert torch.equal(value.isnan(), hit)
    assert torch.equal(gradient.isnan().all(dim=(2, 3)), hit) and torch.equal(gradient.isnan().any(dim=(2, 3)), hit)


@in_this_process
@pytest.mark.parametrize("norm", ["batch", "pkd"])
def test_a_constant_channel(norm):
    case = Case(LOSS, {"norm": norm}, ((2, 3, 13, 19),))
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    with torch.no_grad():
        student[0][:, 1], teacher[0][:, 1] = 30.1, 7.3
        student[0][:, 2] = -0.7
    value, (gradient,) = value_and_gradient(case, student, teacher)
    (expected,), (slope,) = case.oracle(student, teacher)
    assert relative_error(value, expected) < 5e-6
    live, dead = [0], [2]  # channel 1 is constant on both sides, its gradient is exactly 0
    assert relative_error(gradient[:, live], slope[:, live]) < 1e-5
    assert relative_error(gradient[:, dead], slope[:, dead]) < 1e-5
    assert (gradient[:, 1].abs() <= 1e-6 * gradient[:, 2].abs().max()).all()


@in_this_process
def test_an_expanded_grad_output():
    case = Case(LOSS, BATCH, (SMALL,), reduction="none")
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    one = torch.full((1,), 3.0, device=DEVICE).expand(SMALL[0] * SMALL[1])
    _, (expanded,) = value_and_gradient(case, student, teacher, one)
    _, (dense,) = value_and_gradient(case, student, teacher, one.contiguous())
    assert torch.equal(expanded, dense) and expanded.abs().sum() > 0


@in_this_process
def test_the_same_bits_twice_and_inputs_untouched():
    case = Case(LOSS, BATCH, PYRAMID[:3])
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    before = [x.detach().clone() for x in (*student, *teacher)]
    first, second = (value_and_gradient(case, student, teacher) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    assert all(torch.equal(a, b) for a, b in zip(before, (*student, *teacher)))


@in_this_process
def test_stored_gradients_are_refused():
    x = [torch.randn(2, 3, 4, 4, device=DEVICE)]
    with pytest.raises(ValueError, match="save=2"):
        launcher(LOSS).forward(x, x, *parameters(LOSS, BATCH, "mean"), 2)
