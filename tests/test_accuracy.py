"""Large means and nearly equal maps: the fused losses against the fp64 oracle and the eager fp32 code."""

import accuracy
import pytest
import torch

from kdops import testing

SHAPE = (4, 12, 20, 20)


def run(case, student, teacher):
    student = [s.detach().requires_grad_() for s in student]
    value = case.call(student, teacher)
    return value.detach(), list(torch.autograd.grad(value, student))


def case_of(loss, options, layout):
    return testing.Case(loss, options, (SHAPE,), student_layout=layout, teacher_layout=layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", accuracy.MEANS)
@pytest.mark.parametrize("loss, options", accuracy.NORMALISED, ids=str)
def test_a_large_mean_costs_no_accuracy(loss, options, mean, layout, instruction_set, device):
    accuracy.check_a_mean(case_of(loss, options, layout), mean, run, device)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("distance", accuracy.DISTANCES)
@pytest.mark.parametrize("loss, options", accuracy.ALL, ids=str)
def test_nearly_equal_maps(loss, options, distance, layout, instruction_set, device):
    on_gpu = accuracy.GPU_FLOOR if options.get("norm") else accuracy.ONLINE_FLOOR
    floor = on_gpu if device == "cuda" else accuracy.FLOOR
    accuracy.check_a_distance(case_of(loss, options, layout), distance, floor, run, device)


@pytest.mark.parametrize("scale", [0.5, 3.0, 100.0])
@pytest.mark.parametrize("distance", accuracy.DISTANCES)
def test_pkd_of_maps_that_agree_but_for_their_scale(scale, distance, instruction_set, device):
    case = case_of("pkd_loss", {"norm": "pkd", "loss_weight": 6.0}, "nchw")
    accuracy.check_a_distance(case, distance, accuracy.SCALED_FLOOR, run, device, scale)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("loss, options", accuracy.ALL, ids=str)
def test_equal_maps_give_exactly_nothing(loss, options, layout, instruction_set, device):
    accuracy.check_equal_maps(case_of(loss, options, layout), run, device)


@pytest.mark.parametrize("batch", [1, 3, 5, 6, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss, options", accuracy.NORMALISED, ids=str)
def test_a_channel_that_is_constant_in_both_maps_has_no_gradient(loss, options, dtype, batch, instruction_set, device):
    """1/eps makes 1e12 of a mean that is off by an ulp, as the mean of N equal numbers easily is."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(batch, 3, 1, 5, generator=generator).to(device, dtype) for _ in range(2))
    student[:, 1], teacher[:, 1] = 0.1, -1.7
    _, (gradient,) = run(case_of(loss, options, "nchw"), [student], [teacher])
    assert not gradient[:, 1].any() and gradient[:, 0].any()
