"""The fused losses under autograd: modes, repeated backwards, hooks, second derivatives."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kdops
from kdops import testing

# One call per way of saving: the gradient itself (fp32 on a CPU), or statistics (half precision, reduction "none").
CASES = [
    testing.Case(loss, options, shapes, dtype, dtype, reduction=reduction)
    for loss, (_, variants) in testing.LOSSES.items()
    for options in variants[-1:]
    for shapes in (testing.SHAPES["odd"], testing.SHAPES["pyramid"])
    for dtype in (torch.float32, torch.bfloat16)
    for reduction in ("mean", "none")
]


def total(value):
    return sum(
        (v * torch.linspace(0.5, 2.0, v.numel(), device=v.device).view(v.shape)).sum() for v in testing.as_list(value)
    )


def oracle_of_total(case, student, teacher):
    shapes = [v.shape for v in testing.as_list(case.call(student, teacher, "reference"))]
    weights = [torch.linspace(0.5, 2.0, s.numel()).view(s) for s in shapes]
    return case.oracle(student, teacher, weights)[1]


def assert_close(case, got, expected):
    for g, e in zip(testing.as_list(got), expected):
        assert testing.relative_error(g, e) < testing.GRADIENT_BUDGET[case.student_dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_backward_with_another_grad_output(case):
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    value = total(case.call(student, teacher))
    for factor in (1.0, 3.0, 0.0, 1.0, -2.0):
        got = torch.autograd.grad(value, testing.as_list(student), torch.tensor(factor), retain_graph=True)
        if factor:
            assert_close(case, got, [factor * e for e in expected])
        else:
            assert not any(g.any() for g in got)
    assert_close(case, torch.autograd.grad(value, testing.as_list(student)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hook_that_changes_a_gradient_in_place(case):
    """What a hook does to the gradient of one backward must not be seen by the next."""
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    value = total(case.call(student, teacher))
    handles = [s.register_hook(lambda g: g.mul_(100.0)) for s in testing.as_list(student)]
    torch.autograd.grad(value, testing.as_list(student), retain_graph=True)
    for handle in handles:
        handle.remove()
    assert_close(case, torch.autograd.grad(value, testing.as_list(student), retain_graph=True), expected)
    value.backward()
    assert_close(case, [s.grad for s in testing.as_list(student)], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_accumulation(case):
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    for _ in range(3):
        total(case.call(student, teacher)).backward()
    for s, e in zip(testing.as_list(student), expected):
        assert testing.relative_error(s.grad, 3 * e) < 2 * testing.GRADIENT_BUDGET[case.student_dtype]


@pytest.mark.parametrize("case", [c for c in CASES if len(c.shapes) == 1], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(case, reentrant):
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    value = checkpoint(lambda s: total(case.call(s, teacher)), student, use_reentrant=reentrant)
    value.backward()
    assert_close(case, [student.grad], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_tensor_hooks(case):
    """Packed tensors that somebody else keeps are not scaled in place."""
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    packed = {}

    def pack(x):
        packed[len(packed)] = x.clone()
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i].clone()):
        value = total(case.call(student, teacher))
    assert_close(case, torch.autograd.grad(value, testing.as_list(student)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivative_raises_when_asked_for(case):
    student, teacher = case.inputs()
    students = testing.as_list(student)
    value = total(case.call(student, teacher))
    grads = torch.autograd.grad(value, students, create_graph=True)
    assert all(g.requires_grad for g in grads)
    penalised = value + sum(g.float().square().sum() for g in grads)
    with pytest.raises(RuntimeError, match=f"{case.loss}: double backward is not supported"):
        torch.autograd.grad(penalised, students)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_create_graph_alone_does_not_raise(case):
    student, teacher = case.inputs()
    expected = oracle_of_total(case, student, teacher)
    value = total(case.call(student, teacher))
    other = sum(s.float().pow(3).sum() for s in testing.as_list(student))
    grads = torch.autograd.grad(value, testing.as_list(student), create_graph=True)
    assert_close(case, grads, expected)
    first = torch.autograd.grad(other, testing.as_list(student), create_graph=True)
    second = torch.autograd.grad(sum(g.float().sum() for g in first), testing.as_list(student))
    for s, g in zip(testing.as_list(student), second):
        assert testing.relative_error(g, 6 * s) < 1e-2


def test_reference_has_a_second_derivative():
    student, teacher = testing.Case("cwd_loss", {"norm": "batch"}, ((2, 3, 4, 5),)).inputs()
    (grad,) = torch.autograd.grad(
        kdops.cwd_loss(student, teacher, norm="batch", backend="reference"), student, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.square().sum(), student)
    assert second.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_gradient_wanted(case):
    student, teacher = case.inputs()
    expected = [v.detach() for v in testing.as_list(case.call(student, teacher))]
    with torch.no_grad():
        under_no_grad = testing.as_list(case.call(student, teacher))
    with torch.inference_mode():
        under_inference = testing.as_list(case.call(student, teacher))
    detached = [s.detach() for s in testing.as_list(student)]
    of_detached = testing.as_list(case.call(detached if len(detached) > 1 else detached[0], teacher))
    for got in (under_no_grad, under_inference, of_detached):
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, expected))


def test_only_some_levels_require_grad():
    case = testing.Case("cwd_loss", {"norm": "batch"}, testing.SHAPES["pyramid"])
    student, teacher = case.inputs()
    expected = case.oracle(student, teacher)[1]
    student[1].requires_grad_(False)
    case.call(student, teacher).backward()
    assert student[1].grad is None
    assert_close(case, [student[0].grad, student[2].grad], [expected[0], expected[2]])


@pytest.mark.parametrize("loss", testing.LOSSES)
def test_maps_are_not_kept_where_the_gradient_is(loss):
    """fp32 on a CPU: between forward and backward only the gradient is alive, not student and teacher."""
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], testing.SHAPES["odd"])
    leaf, teacher = case.inputs()
    student = leaf * 1
    value = case.call(student, teacher)
    references = [weakref.ref(student), weakref.ref(teacher)]
    del student, teacher
    gc.collect()
    assert [r() for r in references] == [None, None]
    value.backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("loss", testing.LOSSES)
def test_inputs_are_not_written(loss):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], testing.SHAPES["pyramid"])
    student, teacher = case.inputs()
    before = [x.detach().clone() for x in (*student, *teacher)]
    case.call(student, teacher).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*student, *teacher)))


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("factor, recomputed", [(1.0, 0), (-8.0, 0), (2.0**-20, 0), (3.0, 1), (0.0, 1), (math.nan, 1)])
def test_bf16_takes_the_forward_gradient_where_scaling_it_is_exact(loss, factor, recomputed, device, monkeypatch):
    """The first backward's bits are those of a recomputed one, whatever grad_output is."""
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], testing.SHAPES["pyramid"], torch.bfloat16, torch.bfloat16)
    student, teacher = case.inputs(device)
    value = case.call(student, teacher)
    backwards = []
    op = value.grad_fn.op
    backward = op.backward
    monkeypatch.setattr(op, "backward", lambda *args: backwards.append(1) or backward(*args))
    grad_output = torch.tensor(factor, device=device)
    first = torch.autograd.grad(value, student, grad_output, retain_graph=True)
    assert len(backwards) == (recomputed if device == "cpu" else 1)
    second = torch.autograd.grad(value, student, grad_output)
    assert len(backwards) == 1 + (recomputed if device == "cpu" else 1)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def mgd_module(student, teacher):
    return kdops.MGDLoss(5, 5, backend="fused")(student, teacher)


def generation(student, teacher):
    return kdops.MaskedGeneration(5, 5, backend="fused")(student)


def mgd_loss(student, teacher):
    return kdops.mgd_loss(student, teacher, backend="fused")


#: Every fused function, by the name in its error messages.
FUSED = {
    **{name: partial(function, backend="fused") for name, (function, _) in testing.LOSSES.items()},
    "mgd_loss": mgd_loss,
    "MGDLoss": mgd_module,
    "masked_generation": generation,
}


@pytest.mark.parametrize(
    "name, side", [(n, s) for n in FUSED for s in ("student", "teacher") if (n, s) != ("masked_generation", "teacher")]
)
def test_forward_mode_is_refused(name, side):
    """A kernel that drops the tangent would report a derivative of 0."""
    maps = {key: torch.randn(2, 5, 6, 7) for key in ("student", "teacher")}
    x = maps[side]

    def call(x):
        return FUSED[name](*{**maps, side: x}.values())

    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=rf"{name}: forward-mode .* not supported .*reference"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        call(x)  # without a tangent it works there too
    with pytest.raises(RuntimeError, match=f"{name}: forward-mode"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", testing.LOSSES)
def test_forward_mode_is_refused_under_compile(name):
    student, teacher = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)

    @torch.compile(backend="aot_eager")
    def tangent(x):
        return torch.func.jvp(lambda s: FUSED[name](s, teacher), (x,), (torch.ones_like(x),))

    with pytest.raises(RuntimeError, match=f"{name}: forward-mode"):
        tangent(student)


def test_forward_mode_of_the_reference_works():
    case = CASES[0]
    student, teacher = (x.detach().double() for x in case.inputs())
    tangent = torch.randn_like(student)

    def call(s):
        return case.call(s, teacher, "reference")

    _, expected = torch.autograd.functional.jvp(call, student, tangent)
    assert testing.relative_error(torch.func.jvp(call, (student,), (tangent,))[1], expected) < 1e-9
