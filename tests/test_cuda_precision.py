"""The CUDA kernels' precision on the host shim at the limits of fp32, compared with fp64 and the eager code."""

from __future__ import annotations

import cuda_host as host
import pytest
import torch

from kdops import testing

pytestmark = pytest.mark.kernels

PATHS = (host.BLOCK, host.CLUSTER, host.WAVES, host.CHANNELS_LAST)
NORMALISED = [(loss, o) for loss, (_, variants) in testing.LOSSES.items() for o in variants if o.get("norm")]


@pytest.fixture(scope="module")
def shim():
    built = host.shim()
    built.device()
    built.order(0)
    return built


def options_id(x):
    return "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x)


def case_on(path: int, loss: str, options: dict, shape: tuple, dtype=torch.float32, mean: float = 0.0) -> testing.Case:
    layout = "channels_last" if path == host.CHANNELS_LAST else "nchw"
    return testing.Case(loss, options, (shape,), dtype, dtype, layout, layout, mean=mean)


def results(ops, case: testing.Case, student, teacher, path: int) -> list:
    """Value and gradient with the gradient made in the forward, then in the backward."""
    value, _, (gradient,) = host.forward(ops, case, student, teacher, path, host.GRADS)
    later, stats, _ = host.forward(ops, case, student, teacher, path, host.STATS)
    (recomputed,) = host.backward(ops, case, torch.ones(()), student, teacher, stats, path)
    return [(value, gradient), (later, recomputed)]


def eager_errors(case: testing.Case, student, teacher, values, expected) -> tuple[float, float]:
    """Of value and gradient of the eager code in fp32."""
    student = student.detach().float().requires_grad_()
    value = case.call(student, teacher.float(), "reference")
    (gradient,) = torch.autograd.grad(value, student)
    return testing.relative_error(value, values), testing.relative_error(gradient, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "options"), NORMALISED, ids=options_id)
def test_mean_of_many_deviations(loss, options, dtype, path, shim):
    """Kept in one fp32 number, a mean of 1000 deviations is off by 6e-5 of one."""
    for mean in (0.0, 1.0, 30.0, 100.0, 300.0, 1000.0):
        case = case_on(path, loss, options, (2, 6, 40, 41), dtype, mean)
        student, teacher = case.inputs(seed=3)
        values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
        eager_value, eager_gradient = eager_errors(case, student, teacher, values, expected)
        rounding = testing.relative_error(expected.to(dtype), expected)
        for value, gradient in results(shim.ops, case, student, teacher, path):
            assert testing.relative_error(value, values) <= max(testing.VALUE_BUDGET[dtype], 4 * eager_value), mean
            assert testing.relative_error(gradient, expected) <= 4 * eager_gradient + rounding, mean
            # The eager code's own mean is one number: what is asked for beyond it does not grow with the mean.
            assert testing.relative_error(gradient, expected) <= 5e-6 + rounding, mean


def near(case: testing.Case, distance: float) -> tuple:
    """A teacher, and a student whose elements differ from its own by this part of themselves."""
    student, teacher = case.inputs(seed=3)
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        student.copy_(teacher * (1 + distance * noise))
    return student, teacher


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", testing.LOSSES["pkd_loss"][1], ids=options_id)
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_pkd_of_a_student_near_its_teacher(distance, options, path, shim):
    """r_S^2 SS + r_T^2 TT - 2 r_S r_T ST is then the difference of numbers that agree in all their digits."""
    case = case_on(path, "pkd_loss", options, (2, 6, 40, 41))
    student, teacher = near(case, distance)
    values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
    _, eager_gradient = eager_errors(case, student, teacher, values, expected)
    for value, gradient in results(shim.ops, case, student, teacher, path):
        assert testing.relative_error(value, values) <= testing.VALUE_BUDGET[torch.float32]
        assert testing.relative_error(gradient, expected) <= 4 * eager_gradient


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", testing.LOSSES["pkd_loss"][1], ids=options_id)
@pytest.mark.parametrize("shape", [(2, 6, 40, 41), (5, 6, 1, 1)], ids=str)
def test_pkd_of_maps_with_means_far_apart(shape, options, path, shim):
    """Their difference is rounded to 6e-5 of a deviation, and so is that of their distances where it alone is used."""
    case = case_on(path, "pkd_loss", {**options, "eps": 1e-6}, shape)
    student, teacher = case.inputs(seed=3)
    with torch.no_grad():
        teacher.copy_(student - student.mean((0, 2, 3), keepdim=True))
        teacher += 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
        student += 1000
        teacher -= 1000
    values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
    eager_value, eager_gradient = eager_errors(case, student, teacher, values, expected)
    for value, gradient in results(shim.ops, case, student, teacher, path):
        assert testing.relative_error(value, values) <= max(testing.VALUE_BUDGET[torch.float32], 4 * eager_value)
        assert testing.relative_error(gradient, expected) <= 4 * eager_gradient + 1e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [None, "batch", "pkd"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_cwd_of_a_student_near_its_teacher(distance, norm, path, shim):
    """Losses down to 5e-7, the sum of divergences' parts near 1."""
    case = case_on(path, "cwd_loss", {"norm": norm, "tau": 4.0}, (2, 6, 40, 41))
    student, teacher = near(case, distance)
    values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
    _, eager_gradient = eager_errors(case, student, teacher, values, expected)
    for value, gradient in results(shim.ops, case, student, teacher, path):
        assert testing.relative_error(value, values) <= testing.VALUE_BUDGET[torch.float32]
        assert testing.relative_error(gradient, expected) <= 4 * eager_gradient


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_cwd_of_maps_with_outliers(norm, path, shim):
    """Spikes of one map alone move its maximum far from the other's, and e^-120 is no fp32 number."""
    for height in (10.0, 120.0, 3000.0):
        case = case_on(path, "cwd_loss", {"norm": norm, "tau": 1.0}, (2, 6, 20, 21))
        student, teacher = near(case, 1e-2)
        with torch.no_grad():
            student[0, 0, 3, 4], student[1, 2, 0, 0] = height, -height
            teacher[0, 1, 5, 6], teacher[1, 3, 0, 0] = height, -height
        values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
        for value, gradient in results(shim.ops, case, student, teacher, path):
            assert testing.relative_error(value, values) <= testing.VALUE_BUDGET[torch.float32], height
            assert testing.relative_error(gradient, expected) <= testing.GRADIENT_BUDGET[torch.float32], height


# Counts n with n * (1/n) < 1 in fp32: a division of that kind makes a part of nothing and one of n come to less than n.
@pytest.mark.parametrize("width", [41, 47, 55, 61, 82, 97, 107, 41 * 8, 47 * 32, 41 * 32])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("loss", "options"), NORMALISED, ids=options_id)
def test_constant_channels(loss, options, path, width, shim):
    case = case_on(path, loss, options, (2, 5, 1, width))
    student, teacher = case.inputs()
    with torch.no_grad():
        student[:, 3], teacher[:, 4] = 0.7, -1.3
    values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
    for value, gradient in results(shim.ops, case, student, teacher, path):
        assert testing.relative_error(value, values) <= testing.VALUE_BUDGET[torch.float32]
        assert testing.relative_error(gradient, expected) <= testing.GRADIENT_BUDGET[torch.float32]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("loss", "options"), NORMALISED, ids=options_id)
def test_ties_have_no_gradient(loss, options, path, shim):
    """Of maps that are equal, or constant in a channel: 1/eps makes 1e6 of what a fused product would leave."""
    case = case_on(path, loss, options, (2, 5, 9, 11))
    student, teacher = case.inputs()
    with torch.no_grad():
        student[:, 3], teacher[:, 3] = 0.1, -1.3
        student[:, 4] = teacher[:, 4]
    for _, gradient in results(shim.ops, case, student, teacher, path):
        assert not gradient[:, 3:].any() and gradient[:, :3].any(), gradient[:, 3:].abs().max()
