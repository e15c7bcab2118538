"""The Triton kernels of PKD and of scaling stored gradients, in the interpreter and on a GPU where there is one."""

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

from kdops.testing import LAYOUTS, LOSSES, Case, as_list, relative_error

LOSS = "pkd_loss"
PKD = {"norm": "pkd"}
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
@pytest.mark.parametrize("shape", [SQUARE, ROW, (1, 3, 25, 38), (7, 19, 1, 1), (1, 1, 40, 33)], ids=str)
def test_sizes(shape):
    check(Case(LOSS, PKD, (shape,)))


@in_this_process
@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_dtypes(student, teacher):
    check(Case(LOSS, PKD, ((2, 3, 8, 8),), student, teacher))


@in_this_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(Case(LOSS, PKD, ((2, 8, 6, 12),), student_layout=layout, teacher_layout=layout))


@in_this_process
@pytest.mark.parametrize("student, teacher", [("nchw", "channels_last"), ("channels_last", "strided")])
def test_layouts_that_differ(student, teacher):
    check(Case(LOSS, PKD, ((2, 16, 5, 7),), torch.bfloat16, torch.float32, student, teacher))


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_levels(layout):
    reduction = "none" if layout == "nchw" else "mean"
    check(Case(LOSS, PKD, PYRAMID, student_layout=layout, teacher_layout=layout, reduction=reduction))


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
def test_rows_split_over_programs(layout):
    shapes = ((1, 3, 12, 16), (2, 3, 9, 12))
    with forced_tiling(steps=1):
        check(Case(LOSS, PKD, shapes, student_layout=layout, teacher_layout=layout, mean=30.0))


@in_this_process
def test_positions_of_64_bits():
    with forced_tiling(wide=True):
        check(Case(LOSS, PKD, ((2, 3, 13, 19),)))


@in_this_process
@pytest.mark.parametrize("mean", [30.0, -30.0])
def test_large_means(mean):
    check(Case(LOSS, PKD, ((2, 3, 20, 20),), mean=mean))


@in_this_process
@pytest.mark.parametrize("scale, noise, budget", [(1.0, 0.01, 1e-5), (2.0, 0.1, 1e-4), (1000.0, 1.0, 1e-5)])
def test_a_student_close_to_its_teacher_and_one_of_another_scale(scale, noise, budget):
    """The value is 1 - r for a correlation r near 1; what a subtraction can lose is bounded by 1e-7 / (1 - r)."""
    case = Case(LOSS, PKD, ((2, 3, 13, 19),))
    student, (teacher,) = (as_list(x) for x in case.inputs(DEVICE))
    with torch.no_grad():
        student[0].mul_(noise).add_(teacher).mul_(scale)
    value, (gradient,) = value_and_gradient(case, student, [teacher])
    (expected,), (slope,) = case.oracle(student[0], teacher)
    assert 0 < expected < 0.6
    assert relative_error(value, expected) < budget
    assert relative_error(gradient, slope) < 10 * budget


@in_this_process
@pytest.mark.parametrize("norm", ["batch", "pkd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_values_that_are_not_finite(side, bad, norm):
    """They make their channel NaN and leave the others alone."""
    case = Case(LOSS, {"norm": norm}, ((2, 2, 5, 7),), reduction="none")
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    with torch.no_grad():
        (student if side == "student" else teacher)[0][1, 1, 2, 3] = bad
    value, (gradient,) = value_and_gradient(case, student, teacher)
    assert value.isnan().tolist() == [False, True]
    assert gradient[:, 1].isnan().all() and not gradient[:, 0].isnan().any()


@in_this_process
@pytest.mark.parametrize("norm", ["batch", "pkd"])
def test_a_constant_channel(norm):
    case = Case(LOSS, {"norm": norm}, ((2, 3, 13, 19),))
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    with torch.no_grad():
        student[0][:, 1], teacher[0][:, 1], student[0][:, 2] = 30.1, 7.3, -0.7
    value, (gradient,) = value_and_gradient(case, student, teacher)
    (expected,), (slope,) = case.oracle(student, teacher)
    assert relative_error(value, expected) < 5e-6
    for channel in (0, 2):
        assert relative_error(gradient[:, channel], slope[:, channel]) < 1e-5
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))  # constant on both sides


@in_this_process
def test_an_expanded_grad_output():
    case = Case(LOSS, PKD, (SMALL,), reduction="none")
    student, teacher = (as_list(x) for x in case.inputs(DEVICE))
    one = torch.full((1,), 3.0, device=DEVICE).expand(SMALL[1])
    _, (expanded,) = value_and_gradient(case, student, teacher, one)
    _, (dense,) = value_and_gradient(case, student, teacher, one.contiguous())
    assert torch.equal(expanded, dense) and expanded.abs().sum() > 0


@in_this_process
def test_the_same_bits_twice_and_inputs_untouched():
    case = Case(LOSS, PKD, PYRAMID[:3])
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
        launcher(LOSS).forward(x, x, *parameters(LOSS, PKD, "mean"), 2)


@in_this_process
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gradients(dtype):
    """The product is formed in the precision of grad_output, so that fp16 survives a large factor."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = torch.randn(2, 5, 13, 19, device=DEVICE)
    strided = (base.contiguous(memory_format=torch.channels_last), base[:, ::2])
    grads = [(base * 1e-4).to(dtype), *(x.to(dtype) for x in strided)]
    before = [g.clone() for g in grads]
    factor = torch.tensor(65536.0, dtype=wide, device=DEVICE)
    scaled = launcher("scale").scale_gradients(grads[:1], factor)
    scaled += launcher("scale").scale_gradients(grads[1:], factor / 7)
    for g, old, got, by in zip(grads, before, scaled, (factor, factor / 7, factor / 7)):
        assert torch.equal(g, old) and got.dtype == dtype and got.stride() == torch.empty_like(g).stride()
        expected = g.to(wide) * by
        step = 0.0 if dtype == wide else 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
        assert ((got.to(wide) - expected).abs() <= step * expected.abs()).all()
