"""The Triton kernels of MGD: in the interpreter, on a GPU where there is one, and compiled for others."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton_compile import SHARED_LIMIT, measured  # noqa: E402
from triton_interpreter import (  # noqa: E402
    BFLOAT16_BUDGET,
    DEVICE,
    INTERPRETED,
    in_this_process,
    run_in_the_interpreter,
)

from kdops import _mask, _op  # noqa: E402
from kdops._triton import mgd_loss, mgd_mask, scale  # noqa: E402
from kdops.testing import GRADIENT_BUDGET, LAYOUTS, VALUE_BUDGET, MGDCase, laid_out, relative_error  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BUDGET = {**GRADIENT_BUDGET, torch.bfloat16: BFLOAT16_BUDGET}
SIZES = ((2, 12, 13, 19), (1, 70, 5, 4), (3, 5, 1, 1), (2, 3, 1, 67))


def maps(shape, dtype, layout="nchw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(shape, generator=generator).to(DEVICE, dtype), layout)


def guarded(shape, layout):
    """A dense map of a layout with NaN before and behind it, and a function that returns that NaN."""
    like = laid_out(torch.empty(shape), layout)
    memory = torch.full((like.numel() + 512,), torch.nan, device=DEVICE)
    out = memory[256:-256].as_strided(shape, like.stride())
    return out, lambda: torch.cat((memory[:256], memory[-256:]))


if not INTERPRETED:

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)


@in_this_process
@pytest.mark.parametrize("seed", [0, 2**40 + 17, 2**63 - 2])
def test_mask_equals_the_definition_in_every_bit(seed):
    for shape in ((3, 1, 13, 29), (2, 70, 1, 1)):
        for lambda_mgd in (0.0, 0.65, 1.0):
            key, threshold = torch.tensor(seed, device=DEVICE), _mask.threshold(lambda_mgd)
            got = mgd_mask.mgd_mask(key, threshold, shape)
            assert got.dtype == torch.bool and torch.equal(got, _mask.draw_ref(key, threshold, shape))


@in_this_process
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    "layouts",
    [
        ("nchw", "nchw"),
        ("nchw", "channels_last"),
        ("crop", "channels_last"),
        ("transposed", "transposed"),
        ("strided", "transposed"),
        ("expanded", "nchw"),
    ],
)
@pytest.mark.parametrize("on_channel", [False, True])
def test_apply_mask(shape, layouts, on_channel):
    x = maps(shape, torch.float32, layouts[0])
    bias = torch.randn(shape[1], device=DEVICE)
    seed, threshold = torch.tensor(77, device=DEVICE), _mask.threshold(0.4)
    keep = _mask.draw_ref(seed, threshold, _mask.shape_of(x, on_channel, shape[1]))
    for b in (None, bias):
        expected = torch.where(keep, x if b is None else x + b.view(1, -1, 1, 1), 0.0)
        for given in ((None, seed), (keep, None)):
            out, around = guarded(shape, layouts[1])
            mgd_mask.mgd_apply_mask_(out, x, b, *given, threshold, on_channel)
            assert torch.equal(out, expected) and around().isnan().all()
    mgd_mask.mgd_apply_mask_(out, out, None, None, seed, threshold, on_channel)
    assert torch.equal(out, expected)


@in_this_process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bias_and_relu(dtype, layout):
    for shape in SIZES:
        x = maps(shape, dtype, layout)
        x[0, 0, 0, 0] = torch.nan
        bias = maps((1, shape[1], 1, 1), dtype, seed=1).flatten()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = F.relu(x.to(wide) + bias.to(wide).view(1, -1, 1, 1)).to(dtype)
        mgd_loss.mgd_bias_relu_(x, bias)
        assert x.isnan().sum() == 1
        budget = {torch.float64: 0, torch.float32: 0}.get(dtype, 2**-7)  # the interpreter cuts where a device rounds
        torch.testing.assert_close(x, expected, rtol=budget, atol=0, equal_nan=True)


@in_this_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_relu(dtype):
    for shape in (*SIZES, (2, 40, 31, 20)):
        x = F.relu(maps(shape, dtype, "channels_last"))
        x[0, 0, 0, 0] = torch.nan
        bits = mgd_loss.mgd_relu_bits(x)
        assert bits.dtype == torch.uint8 and bits.numel() == -(-x.numel() // 8)
        grad = maps(shape, dtype, "channels_last", seed=2)
        expected = torch.where(x <= 0, 0.0, grad)
        mgd_loss.mgd_relu_backward_(grad, bits)
        assert torch.equal(grad, expected)


@in_this_process
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_loss_and_gradient(student_dtype, teacher_dtype):
    both = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else student_dtype
    weight = 65536.0 if student_dtype == torch.float16 else 1.5
    for shape, layout, teacher_layout in ((SIZES[0], "crop", "nchw"), (SIZES[1], "channels_last", "strided")):
        s, t = maps(shape, student_dtype, layout), maps(shape, teacher_dtype, teacher_layout, seed=1)
        loss, stats, grads = mgd_loss.forward([s], [t], 2e-5, 0, 1)
        assert grads == [] and stats.shape == (0, 0)
        alone, nothing, _ = mgd_loss.forward([s], [t], 2e-5, 0, 0)
        assert nothing.shape == (0,) and torch.equal(alone, loss)
        (gradient,) = mgd_loss.backward(loss.new_tensor(weight), [s], [t], stats, 2e-5, 0)
        wide = s.detach().double().requires_grad_()
        expected = 2e-5 / shape[0] * (wide - t.double()).square().sum()
        (expected_gradient,) = torch.autograd.grad(weight * expected, wide)
        assert loss.dtype == (torch.float64 if both == torch.float64 else torch.float32)
        assert relative_error(loss, expected) <= VALUE_BUDGET[both]
        assert gradient.dtype == s.dtype and gradient.stride() == torch.empty_like(s).stride()
        assert relative_error(gradient, expected_gradient) <= BUDGET[student_dtype]


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_sum_over_several_programs(layout, monkeypatch):
    monkeypatch.setattr(mgd_loss, "_PROGRAMS", 3)
    shape = (2, 21, 20, 31)
    s, t = maps(shape, torch.float32, layout), maps(shape, torch.float32, "nchw", seed=1)
    bias = torch.randn(21, device=DEVICE)
    difference = s + bias.view(1, -1, 1, 1) - t
    total = mgd_loss.mgd_difference_(s, bias, t, 0.75)
    assert relative_error(total, difference.double().square().sum()) <= 1e-6
    assert relative_error(s, 0.75 * difference) <= 1e-6


def functions():
    """The operators that have no kernel for a CPU or another one, by name."""
    yield from ((name, getattr(mgd_mask, name)) for name in ("mgd_mask", "mgd_apply_mask_"))
    names = ("mgd_relu_bits", "mgd_relu_backward_", "mgd_difference_", "mgd_bias_relu_")
    yield from ((name, getattr(mgd_loss, name)) for name in names)
    yield from ((name, getattr(scale, name)) for name in ("scale_gradients", "scale_gradients_"))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """In the interpreter the module takes the GPU's path through its nodes, except for the convolutions."""
    if INTERPRETED:
        kernels = dict(functions())

        class Kernels:
            def __getattr__(self, name):
                return kernels[name]

        monkeypatch.setattr(_op, "on_gpu", lambda x: True)
        for module in ("_generation", "_first_convolution"):
            monkeypatch.setattr(f"kdops.{module}._ops", Kernels())
        for name, kernel in kernels.items():
            monkeypatch.setattr(torch.ops.kdops, name, kernel)
    else:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
        return
    yield


@in_this_process
@pytest.mark.parametrize(
    "case",
    [
        MGDCase(*widths, (2, 7, 5), lambda_mgd, on_channel, layout=layout, explicit=explicit)
        for widths in ((32, 32), (6, 10))
        for lambda_mgd, on_channel in ((0.65, False), (0.3, True), (1.0, False))
        for layout, explicit in (("nchw", False), ("channels_last", True))
    ]
    + [MGDCase(*widths, (2, 7, 5), layout=layout) for widths in ((8, 8), (6, 10)) for layout in LAYOUTS],
    ids=str,
)
def test_the_whole_step(case, as_on_a_gpu):
    step = case.step(DEVICE)
    keep = step.mask
    torch.manual_seed(7)
    if keep is None:
        seed = _mask.draw_seed(step.student.device)
        shape = _mask.shape_of(step.student, case.mask_on_channel, case.teacher_channels)
        keep = _mask.draw_ref(seed, _mask.threshold(case.lambda_mgd), shape)
    torch.manual_seed(7)
    got, expected = step.run(), step.eager(torch.float64, keep).run()
    for g, e in zip(got, expected):
        assert relative_error(g, e) <= GRADIENT_BUDGET[torch.float32]


VARIANTS = [
    (architecture, dtype, bias)
    for architecture in (80, 90, 100)
    for dtype in ("bf16", "fp32")
    for bias in (False, True)
]


def kernels(dtype, biased):
    """Every kernel with its argument types and constants."""
    map_, bias = f"*{dtype}", f"*{dtype}" if biased else None
    sizes = {"size": "i64", "C": "i32", "INNER": "i32"}
    yield mgd_mask.mask_kernel, {"seed": "*i64", "out": "*u8", "size": "i32", "threshold": "i64"}, {"BLOCK": 1024}
    strides = {f"{x}_{d}": "i64" for x in ("x", "out") for d in "nc"} | {"x_p": "i32", "out_p": "i32"}
    constants = {"ON_CHANNEL": biased, "BIASED": biased, "POSITIONS": 32, "CHANNELS": 64}
    common = {"x": map_, "out": map_, "bias": bias, "threshold": "i64", "C": "i32", "P": "i32", **strides}
    for drawn in (True, False):
        source = {"keep": None if drawn else "*u8", "seed": "*i64" if drawn else None}
        yield mgd_mask.apply_kernel, {**common, **source}, {**constants, "DRAWN": drawn}
    if biased:
        yield mgd_loss.bias_relu_kernel, {"x": map_, "bias": bias, **sizes}, {"BLOCK": 2048, "num_warps": 8}
    bits = {"bits": "*u8", "size": "i64"}
    yield mgd_loss.relu_bits_kernel, {"x": map_, **bits}, {"BYTES": 256}
    yield mgd_loss.relu_backward_kernel, {"grad": map_, **bits}, {"BYTES": 256}
    common = {"s": map_, "t": map_, "scale": "fp32", "blocks": "i32", **sizes}
    constants = {"ACC": tl.float32, "BLOCK": 2048, "num_warps": 8}
    for write, scaled in ((True, False), (False, False), (True, True)):
        types = {"out": map_ if write else None, "factor": "*fp32" if scaled else None, "bias": bias}
        flags = {"BIASED": biased, "SCALED": scaled, "WRITE": write, "SUM": not scaled}
        sums = {"sums": None if scaled else "*fp32"}
        yield mgd_loss.difference_kernel, {**common, **types, **sums}, {**constants, **flags}


if not INTERPRETED:

    @pytest.mark.parametrize("architecture, dtype, biased", VARIANTS)
    def test_kernels_compile_without_spills(architecture, dtype, biased):
        for kernel, types, constants in kernels(dtype, biased):
            constants |= {name: None for name, kind in types.items() if kind is None}
            resources = measured(kernel, types, constants, architecture)
            assert resources.spilled == 0, f"{kernel.fn.__name__}: {resources}"
            assert resources.shared <= SHARED_LIMIT, f"{kernel.fn.__name__}: {resources}"
