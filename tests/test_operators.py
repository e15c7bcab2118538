"""The registered operators: opcheck, gradcheck and torch.compile."""

import pytest
import torch

from kdops import _checks, _norm, testing
from kdops._op import Save


def arguments(loss, dtype, save, reduction, layout="nchw"):
    shapes = ((2, 5, 4, 6), (2, 3, 3, 3))
    case = testing.Case(loss, {}, shapes, dtype, torch.float32, layout, layout)
    student, teacher = case.inputs()
    parameters = {"cwd_loss": (2.0, 1, 1e-5, 1.5), "pkd_loss": (2, 1e-6, 1.5)}.get(loss)
    if parameters is None:
        pytest.skip(f"{loss} has operators of another form, with tests of their own")
    return student, teacher, *parameters, reduction, int(save)


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("save", Save)
@pytest.mark.parametrize("reduction", [0, 2])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
def test_opcheck_forward(loss, save, reduction, layout, device):
    if save & Save.GRADS and (reduction == 2 or device == "cuda"):
        pytest.skip("the gradient is not computed in the forward here")
    args = arguments(loss, torch.float32, save, reduction, layout)
    if save == Save.NOTHING:
        args = ([s.detach() for s in args[0]], *args[1:])
    args = (
        [s.detach().to(device).requires_grad_(s.requires_grad) for s in args[0]],
        [t.to(device) for t in args[1]],
        *args[2:],
    )
    torch.library.opcheck(getattr(torch.ops.kdops, loss).default, args)


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
def test_opcheck_backward(loss, layout, device):
    student, teacher, *parameters, save = arguments(loss, torch.bfloat16, Save.STATS, 0, layout)
    student, teacher = [s.detach().to(device) for s in student], [t.to(device) for t in teacher]
    _, stats, _ = getattr(torch.ops.kdops, loss)(student, teacher, *parameters, save)
    args = (torch.tensor(0.5, device=device), student, teacher, stats, *parameters)
    torch.library.opcheck(getattr(torch.ops.kdops, f"{loss}_backward").default, args)


def test_opcheck_scale_gradients():
    grads = [
        torch.randn(2, 3),
        torch.randn(4).bfloat16(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]
    torch.library.opcheck(torch.ops.kdops.scale_gradients.default, (grads, torch.tensor(0.37)))
    if hasattr(
        torch._C._autograd, "_get_current_graph_task_keep_graph"
    ):  # PyTorch 2.4 cannot, and kdops does not use it
        torch.library.opcheck(torch.ops.kdops.scale_gradients_.default, (grads, torch.tensor(0.37)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scale_gradients(dtype, instruction_set, poisoned):
    factor = torch.tensor(0.37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for size in (1, 15, 16, 17, 70001):
        x = torch.randn(size).to(dtype)
        expected = (x.to(factor.dtype) * factor).to(dtype)
        (scaled,) = torch.ops.kdops.scale_gradients([x], factor)
        assert torch.equal(scaled, expected)
        torch.ops.kdops.scale_gradients_([x], factor)
        assert torch.equal(x, expected)


def test_fp16_where_subnormals_are_flushed(instruction_set):
    """As after torch.set_flush_denormal, or loading a library built with -ffast-math: fp16's are normal in fp32."""
    magnitude = torch.arange(2048, dtype=torch.int16)  # all subnormals, and as many normal numbers
    x = torch.cat((magnitude.view(torch.float16), -magnitude.view(torch.float16)))
    factor = torch.tensor(0.37)
    expected = (x.float() * factor).half()
    assert torch.set_flush_denormal(True)
    try:
        (scaled,) = torch.ops.kdops.scale_gradients([x], factor)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(scaled, expected)


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_gradcheck(loss, layout):
    for options in testing.LOSSES[loss][1]:
        for reduction in ("mean", "none"):
            case = testing.Case(
                loss, options, ((2, 3, 3, 4),), torch.float64, torch.float64, layout, layout, reduction=reduction
            )
            student, teacher = case.inputs()
            if layout == "expanded":  # gradcheck perturbs in place
                student = student.detach().contiguous().requires_grad_()
            assert torch.autograd.gradcheck(lambda s: case.call(s, teacher), (student,))  # noqa: B023


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_fullgraph(loss, reduction, dtype, device):
    """One graph, no break; dynamic sizes; the same numbers as eager."""
    torch._dynamo.reset()
    options = testing.LOSSES[loss][1][-1]

    def step(student, teacher, weight):
        value = testing.LOSSES[loss][0](student, teacher, reduction=reduction, **options)
        return sum((v * weight).sum() for v in testing.as_list(value))

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size in (16, 20, 24):
        case = testing.Case(
            loss, options, ((2, 8, size, size + 3), (2, 8, size // 2, size)), dtype, dtype, reduction=reduction
        )
        student, teacher = case.inputs(device)
        weight = torch.tensor(512.0, device=device)
        expected = step(student, teacher, weight)
        gradients = torch.autograd.grad(expected, student)
        got = compiled(student, teacher, weight)
        assert testing.relative_error(got, expected) < 1e-6
        for g, e in zip(torch.autograd.grad(got, student), gradients):
            assert testing.relative_error(g, e) < 1e-6
            assert g.dtype == dtype


def test_compile_inside_a_model():
    """A student with align, loss and a weight that changes per step, compiled as one graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 1, bias=False)
    )
    image, teacher = torch.randn(2, 3, 12, 12), torch.randn(2, 16, 12, 12)

    def step(image, teacher, loss_weight):
        return testing.cwd_loss(student(image), teacher, norm="batch", loss_weight=loss_weight)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for loss_weight in (1.0, 0.7, 0.3):
        expected = torch.autograd.grad(step(image, teacher, loss_weight), list(student.parameters()))
        got = torch.autograd.grad(compiled(image, teacher, loss_weight), list(student.parameters()))
        for g, e in zip(got, expected):
            assert testing.relative_error(g, e) < 1e-5


def test_codes_of_the_schema():
    """The integers that the kernels know."""
    assert _norm.CODES == {None: 0, "batch": 1, "pkd": 2}
    assert _checks.REDUCTIONS == {"mean": 0, "sum": 1, "none": 2}
    assert [int(s) for s in (Save.NOTHING, Save.STATS, Save.GRADS, Save.BOTH)] == [0, 1, 2, 3]
