"""MGD's value and gradients against the eager formula in fp64, its halves, and what it does to memory."""

import copy

import pytest
import torch
import torch.nn.functional as F

import kdops
from kdops import _generation_by_images, _mask
from kdops._first_convolution import Parameters
from kdops.testing import (
    GRADIENT_BUDGET,
    LAYOUTS,
    VALUE_BUDGET,
    MGDCase,
    laid_out,
    relative_error,
)

ODD = (3, 13, 9)
#: Widths of which masked_conv.cpp has tiles, widths of which it has none, and an align before both.
WIDTHS = ((32, 32), (24, 64), (8, 12), (12, 12))
CASES = [
    MGDCase(*widths, ODD, lambda_mgd, mask_on_channel=on_channel)
    for widths in WIDTHS
    for lambda_mgd in (0.0, 0.1, 0.65, 1.0)
    for on_channel in (False, True)
]
CASES += [MGDCase(*widths, (1, 1, 17)) for widths in WIDTHS]
CASES += [MGDCase(*widths, (9, 1, 1)) for widths in WIDTHS]
CASES += [MGDCase(*widths, ODD, explicit=True, mask_on_channel=c) for widths in WIDTHS for c in (False, True)]
CASES += [MGDCase(*widths, ODD, layout=layout) for widths in WIDTHS for layout in LAYOUTS]
CASES += [MGDCase(24, 64, ODD, layout="channels_last", teacher_layout=layout) for layout in LAYOUTS]
CASES += [MGDCase(*widths, ODD, dtype=torch.float64) for widths in WIDTHS]
HALVES = [
    MGDCase(*widths, (3, 14, 12), dtype=dtype, mask_on_channel=on_channel, layout=layout)
    for widths in ((32, 32), (24, 64))
    for dtype in (torch.bfloat16, torch.float16)
    for on_channel in (False, True)
    for layout in ("nchw", "channels_last")
]


def keep_of(step, case, seed):
    """The mask that manual_seed gives a step, from the reference."""
    if step.mask is not None:
        return step.mask
    torch.manual_seed(seed)
    drawn = _mask.draw_seed(step.student.device)
    channels = step.module.teacher_channels
    shape = _mask.shape_of(step.student, case.mask_on_channel, channels)
    return _mask.draw_ref(drawn, _mask.threshold(case.lambda_mgd), shape)


def outcomes(case, device="cpu", weight=1.5):
    """The kernels' value and gradients, those of the eager formula in fp64 and in the case's dtype."""
    step = case.step(device)
    keep = keep_of(step, case, 7)
    torch.manual_seed(7)
    got = step.run(weight)
    wide = step.eager(torch.float64, keep).run(weight)
    same = step.eager(case.dtype, keep).run(weight)
    for g, p in zip(got[1:], [step.student, *step.module.parameters()]):
        assert g.dtype == p.dtype and g.shape == p.shape
    assert got[1].stride() == torch.empty_like(step.student).stride()
    return got, wide, same


@pytest.fixture(params=[1, 2, 10**9], ids=["image_by_image", "two_images", "at_once"])
def chunks(request, monkeypatch):
    """How the CPU splits the batch; the tests' maps are too small to be split by default."""

    def cut(student, p):
        return (slice(i, i + request.param) for i in range(0, len(student), request.param))

    monkeypatch.setattr(_generation_by_images, "_chunks", cut)


@pytest.mark.parametrize(
    "channels, size, threads, images",
    [(128, (8, 40, 40), 2, 2), (128, (8, 40, 40), 4, 2), (128, (8, 40, 40), 16, 8), (256, (8, 20, 20), 2, 12)],
)
def test_chunks_of_a_batch(channels, size, threads, images, monkeypatch):
    """Enough for the threads, and no smaller than the weights."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.empty(channels, channels, 3, 3)
    student = torch.empty(size[0], channels, *size[1:])
    slices = list(_generation_by_images._chunks(student, Parameters(weight, None, weight, None)))
    assert slices == [slice(i, i + images) for i in range(0, size[0], images)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_eager_formula(case, chunks, poisoned):
    got, wide, _ = outcomes(case)
    assert got[0].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert relative_error(got[0], wide[0]) <= VALUE_BUDGET[case.dtype]
    for g, expected in zip(got[1:], wide[1:]):
        assert relative_error(g, expected) <= GRADIENT_BUDGET[case.dtype]


@pytest.mark.parametrize("case", [c for c in CASES if c.size == ODD and c.lambda_mgd in (0.65, 1.0)][:8], ids=str)
def test_every_instruction_set(case, instruction_set, poisoned):
    test_equals_the_eager_formula(case, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case, poisoned):
    with torch.backends.cudnn.flags(allow_tf32=False):
        got, wide, _ = outcomes(case, "cuda")
    for g, expected in zip(got, wide):
        assert relative_error(g, expected) <= GRADIENT_BUDGET[case.dtype]


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_half_precision_is_rounded_once(case, chunks, poisoned):
    """A gradient is as near to fp64's as fp64's own rounding (a bias's 32 values may be 2.2e-3 off by that)."""
    got, wide, _ = outcomes(case, weight=65536.0 if case.dtype == torch.float16 else 1.5)
    assert got[0].dtype == torch.float32
    assert relative_error(got[0], wide[0]) <= VALUE_BUDGET[case.dtype]
    for g, expected in zip(got[1:], wide[1:]):
        rounding = relative_error(expected.to(case.dtype), expected)
        assert relative_error(g, expected) <= 1.02 * rounding
    assert relative_error(got[1], wide[1]) <= GRADIENT_BUDGET[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_gpu_half_precision_is_as_exact_as_the_eager_chain(case, poisoned):
    """Maps between the convolutions are rounded to half precision in both; where that turns a ReLU's input negative,
    the gradients jump. So the budget is twice the eager chain's own error in the same dtype, plus a rounding."""
    got, wide, same = outcomes(case, "cuda")
    assert got[0].dtype == torch.float32
    assert relative_error(got[0], wide[0]) <= 2e-3
    for g, eager, expected in zip(got[1:], same[1:], wide[1:]):
        assert relative_error(g, expected) <= 2 * relative_error(eager, expected) + GRADIENT_BUDGET[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, weight", [(torch.bfloat16, 1.0), (torch.float16, 65536.0)])
def test_gpu_factors_that_are_powers_of_two_round_nothing_again(dtype, weight):
    """What is stored in half precision between the passes then costs no exactness against the eager chain."""
    case = MGDCase(64, 64, (4, 20, 20), dtype=dtype, explicit=True)
    step = case.step("cuda")
    expected = step.eager(torch.float64, step.mask).run(weight)
    eager = step.eager(dtype, step.mask).run(weight)
    for got, same, wide in zip(step.run(weight)[1:], eager[1:], expected[1:]):
        assert relative_error(got, wide) <= 1.25 * relative_error(same, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast fp32 maps are computed in half precision, gradients of fp32 inputs are fp32."""
    case = MGDCase(24, 64, ODD, explicit=True)
    step = case.step()
    with torch.autocast("cpu", dtype=dtype):
        generated = kdops.MaskedGeneration(24, 64)(step.student)
        got = step.run(65536.0)
        eager = step.eager(torch.float32, step.mask).run(65536.0)
    wide = step.eager(torch.float64, step.mask).run(65536.0)
    assert generated.dtype == dtype and got[0].dtype == torch.float32
    assert relative_error(got[0], wide[0]) <= 2e-3
    for g, e, expected in zip(got[1:], eager[1:], wide[1:]):
        assert g.dtype == torch.float32
        assert relative_error(g, expected) <= 2 * relative_error(e, expected) + GRADIENT_BUDGET[dtype]


@pytest.mark.parametrize("widths", [(24, 64), (8, 12)])
def test_a_backward_under_autocast_is_that_of_its_forward(widths):
    step = MGDCase(*widths, ODD, explicit=True).step()
    expected = step.run()
    loss = 1.5 * step.module(step.student, step.teacher, step.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, [step.student, *step.module.parameters()])
    for a, b in zip(got, expected[1:]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("student_dtype", list(VALUE_BUDGET))
@pytest.mark.parametrize("teacher_dtype", list(VALUE_BUDGET))
@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("crop", "strided")])
def test_mgd_loss(student_dtype, teacher_dtype, layouts, instruction_set, poisoned):
    generator = torch.Generator().manual_seed(3)
    shape = (3, 21, 13, 19)
    generated = laid_out(torch.randn(shape, generator=generator).to(student_dtype), layouts[0]).requires_grad_()
    teacher = laid_out(torch.randn(shape, generator=generator).to(teacher_dtype), layouts[1])
    weight = 65536.0 if student_dtype == torch.float16 else 1.5
    loss = kdops.mgd_loss(generated, teacher, backend="fused")
    (gradient,) = torch.autograd.grad(weight * loss, generated)
    wide = generated.detach().double().requires_grad_()
    expected = 2e-5 * F.mse_loss(wide, teacher.double(), reduction="sum") / 3
    (expected_gradient,) = torch.autograd.grad(weight * expected, wide)
    both = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else student_dtype
    assert loss.dtype == (torch.float64 if both == torch.float64 else torch.float32) and gradient.dtype == student_dtype
    assert relative_error(loss, expected) <= VALUE_BUDGET[both]
    assert relative_error(gradient, expected_gradient) <= GRADIENT_BUDGET[student_dtype]


def test_the_halves_make_the_whole():
    case = MGDCase(24, 64, ODD, explicit=True)
    step = case.step()
    p = step.module.parameters_of_chain()
    generated = kdops.masked_generation(
        step.student, *p[:4], align_weight=p.align_weight, align_bias=p.align_bias, mask=step.mask, backend="fused"
    )
    loss = kdops.mgd_loss(generated, step.teacher, alpha_mgd=2e-3)
    halves = [loss.detach(), *torch.autograd.grad(1.5 * loss, [step.student, *step.module.parameters()])]
    for half, whole in zip(halves, step.run()):
        assert relative_error(half, whole) <= 1e-6


@pytest.mark.parametrize("on_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_of_every_dtype(on_channel, dtype):
    case = MGDCase(32, 32, ODD, mask_on_channel=on_channel, explicit=True)
    step = case.step()
    expected = step.run()
    step.mask = step.mask.to(dtype)
    assert 0 < float(step.mask.float().mean()) < 1
    for a, b in zip(step.run(), expected):
        assert torch.equal(a, b)


def test_a_masked_position_contributes_nothing():
    """Not even NaN: the same on the compact, the dense and the eager way."""
    for width in (12, 32):
        step = MGDCase(width, width, ODD, explicit=True).step()
        expected = step.run()
        with torch.no_grad():
            step.student.masked_fill_(~step.mask, torch.nan)
        for results in (step.run(), step.eager(torch.float32, step.mask).run()):
            for a, b in zip(results, expected):
                assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("width", [12, 32])
def test_nan_at_a_kept_position_reaches_the_loss(width):
    step = MGDCase(width, width, ODD, explicit=True).step()
    n, _, h, w = step.mask.nonzero()[0]
    with torch.no_grad():
        step.student[n, 3, h, w] = torch.nan
    assert step.run()[0].isnan()


def test_only_what_needs_a_gradient_gets_one():
    step = MGDCase(24, 64, ODD, explicit=True).step()
    expected = step.run()
    names = ["student", *(name for name, _ in step.module.named_parameters())]
    for kept in names:
        one = copy.deepcopy(step.module)
        for name, p in one.named_parameters():
            p.requires_grad_(name == kept)
        student = step.student.detach().requires_grad_(kept == "student")
        (1.5 * one(student, step.teacher, step.mask)).backward()
        got = {"student": student.grad, **{name: p.grad for name, p in one.named_parameters()}}
        assert [name for name, g in got.items() if g is not None] == [kept]
        assert relative_error(got[kept], expected[1 + names.index(kept)]) <= 1e-6
    with torch.no_grad():
        assert relative_error(step.module(step.student, step.teacher, step.mask), expected[0]) <= 1e-6


def test_same_bits_on_every_run_and_thread_count():
    step = MGDCase(32, 64, (4, 20, 20), explicit=True).step()
    p = step.module.parameters_of_chain()
    rows = torch.ops.kdops.mgd_compact(step.student.detach(), step.mask)
    aligned = F.linear(rows, p.align_weight.detach().flatten(1))
    grad = torch.randn(4, 64, 20, 20).contiguous(memory_format=torch.channels_last)
    weight, bias = p.weight1.detach(), p.bias1.detach()

    def bits(threads):
        torch.set_num_threads(threads)
        hidden = torch.ops.kdops.mgd_masked_conv(aligned, step.mask, weight, bias)
        return [hidden, *torch.ops.kdops.mgd_masked_conv_backward(grad, aligned, step.mask, weight, True, True)]

    threads = torch.get_num_threads()
    try:
        runs = [bits(1), bits(2), bits(7)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("factor, recomputed", [(1.0, 0), (-(2.0**16), 0), (3.0, 1)])
def test_bf16_is_recomputed_where_scaling_would_round_again(factor, recomputed, monkeypatch):
    case = MGDCase(32, 32, (3, 14, 12), dtype=torch.bfloat16, explicit=True)
    step = case.step()
    inputs = [step.student, *step.module.parameters()]
    loss = step.module(step.student, step.teacher, step.mask)
    steps, whole = [], _generation_by_images._step
    monkeypatch.setattr(_generation_by_images, "_step", lambda *args: steps.append(1) or whole(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the backward alone: it changes nothing
        got = torch.autograd.grad(loss, inputs, torch.tensor(factor))
    assert len(steps) == recomputed
    for g, expected in zip(got, step.eager(torch.float64, step.mask).run(factor)[1:]):
        assert relative_error(g, expected) <= 1.02 * relative_error(expected.to(torch.bfloat16), expected)
