"""Large means and nearly equal maps in the Triton kernels: in the interpreter, and on a GPU where there is one."""

import accuracy
import pytest
from triton_interpreter import DEVICE, INTERPRETED, in_this_process, run_in_the_interpreter, value_and_gradient

from kdops.testing import Case

SHAPE = (2, 8, 20, 20)

if not INTERPRETED:

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)


def case_of(loss, options, layout):
    return Case(loss, options, (SHAPE,), student_layout=layout, teacher_layout=layout)


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", accuracy.MEANS)
@pytest.mark.parametrize("loss, options", accuracy.NORMALISED, ids=str)
def test_a_large_mean_costs_no_accuracy(loss, options, mean, layout):
    accuracy.check_a_mean(case_of(loss, options, layout), mean, value_and_gradient, DEVICE)


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("distance", accuracy.DISTANCES)
@pytest.mark.parametrize("loss, options", accuracy.ALL, ids=str)
def test_nearly_equal_maps(loss, options, distance, layout):
    floor = accuracy.GPU_FLOOR if options.get("norm") else accuracy.ONLINE_FLOOR
    accuracy.check_a_distance(case_of(loss, options, layout), distance, floor, value_and_gradient, DEVICE)


@in_this_process
@pytest.mark.parametrize("scale", [0.5, 3.0, 100.0])
@pytest.mark.parametrize("distance", accuracy.DISTANCES)
def test_pkd_of_maps_that_agree_but_for_their_scale(scale, distance):
    case = case_of("pkd_loss", {"norm": "pkd", "loss_weight": 6.0}, "nchw")
    accuracy.check_a_distance(case, distance, accuracy.SCALED_FLOOR, value_and_gradient, DEVICE, scale)


@in_this_process
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("loss, options", accuracy.ALL, ids=str)
def test_equal_maps_give_exactly_nothing(loss, options, layout):
    accuracy.check_equal_maps(case_of(loss, options, layout), value_and_gradient, DEVICE)
