"""Every case of kdops.testing against the fp64 oracle, on every instruction set and on the GPU."""

import pytest
import torch

from kdops import testing

CASES = list(testing.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case, instruction_set, poisoned):
    testing.check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case, poisoned):
    testing.check(case, device="cuda")


@pytest.mark.parametrize("case", [c for c in CASES if c.student_dtype == torch.float32 and c.mean == 0], ids=str)
def test_few_channels_are_split_over_units(case, poisoned):
    """With more threads than channels the passes run one after the other over rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        testing.check(case)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("loss", testing.LOSSES)
def test_same_bits_on_every_run_and_thread_count(loss, instruction_set):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], ((4, 48, 40, 40), (4, 48, 20, 20)))

    def bits(threads):
        torch.set_num_threads(threads)
        student, teacher = case.inputs()
        value = case.call(student, teacher)
        return [value.detach(), *torch.autograd.grad(value, student)]

    threads = torch.get_num_threads()
    try:
        runs = [bits(1), bits(threads), bits(threads), bits(7)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_large_maps(loss, mean, layout, poisoned):
    """Long rows and many of them, where the error of a sum would grow."""
    for options in testing.LOSSES[loss][1]:
        testing.check(
            testing.Case(loss, options, ((2, 24, 152, 100),), student_layout=layout, teacher_layout=layout, mean=mean)
        )


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_inf_give_nan(loss, bad, where, instruction_set, device):
    for options in testing.LOSSES[loss][1]:
        case = testing.Case(loss, options, testing.SHAPES["odd"])
        student, teacher = case.inputs(device)
        with torch.no_grad():
            (student if where == "student" else teacher)[1, 2, 3, 4] = bad
        fused, eager = case.call(student, teacher), case.call(student, teacher, "reference")
        assert not torch.isfinite(eager)
        assert not torch.isfinite(fused)
        if torch.isnan(eager):
            assert torch.isnan(fused)


def test_spike_is_finite(instruction_set, device):
    """log(softmax(x)) of the released CWD code is -inf here; the log-sum-exp form is not."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 10, 10, generator=generator)
    teacher = torch.randn(2, 4, 10, 10, generator=generator)
    student[:, :, 5, 5] = 120.0
    case = testing.Case("cwd_loss", {"norm": None}, ((2, 4, 10, 10),))
    student = student.to(device).requires_grad_()
    value = case.call(student, teacher.to(device))
    (expected,), (gradient,) = case.oracle(student, teacher.to(device))
    assert expected > 50
    assert testing.relative_error(value, expected) < 5e-6
    assert testing.relative_error(torch.autograd.grad(value, student)[0], gradient) < 1e-5


def test_cwd_sum_beyond_half_range(device):
    """The sum over rows exceeds 65504; in fp16 the released formula overflows, the accumulation in fp32 does not."""
    case = testing.Case("cwd_loss", {"norm": None}, ((8, 128, 16, 16),), torch.float16, torch.float16)
    student, teacher = case.inputs(device)
    student, teacher = (student.detach() * 12).requires_grad_(), teacher * 12
    (expected,), _ = case.oracle(student, teacher)
    assert expected * 8 * 128 > 7e3
    assert testing.relative_error(case.call(student, teacher), expected) < 5e-6


@pytest.mark.parametrize("loss", testing.LOSSES)
def test_constant_channel(loss, instruction_set, device):
    """A dead channel: its deviation is 0, and only eps stands between the gradient and a division by it."""
    for options in testing.LOSSES[loss][1]:
        case = testing.Case(loss, options, testing.SHAPES["odd"])
        student, teacher = case.inputs(device)
        with torch.no_grad():
            student[:, 3] = 0.7
            teacher[:, 4] = -1.3
        value = case.call(student, teacher)
        (expected,), (gradient,) = case.oracle(student, teacher)
        assert testing.relative_error(value, expected) < 5e-6
        assert testing.relative_error(torch.autograd.grad(value, student)[0], gradient) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_beyond_two_to_the_31_elements(loss):
    """Offsets past 32 bits: the last image alone must give what it gives in a small tensor."""
    shape = (33, 256, 512, 512)
    student = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    teacher = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    student[-1].normal_(), teacher[-1].normal_()
    case = testing.Case(loss, testing.LOSSES[loss][1][0], (shape,), torch.bfloat16, torch.bfloat16, reduction="sum")
    small = testing.Case(loss, {**case.options}, ((2, *shape[1:]),), torch.bfloat16, torch.bfloat16, reduction="sum")
    value = case.call(student.requires_grad_(), teacher)
    gradient = torch.autograd.grad(value, student)[0][-1]
    if loss == "cwd_loss":  # no normalisation: rows are independent
        s, t = student.detach()[-2:].clone().requires_grad_(), teacher[-2:]
        expected = small.call(s, t)
        assert testing.relative_error(value, expected) < 1e-5
        assert testing.relative_error(gradient, torch.autograd.grad(expected, s)[0][-1]) < 1e-5
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and gradient.any()
