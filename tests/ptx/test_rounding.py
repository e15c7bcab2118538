"""What rests on the rounding of a GPU's instructions, which the host shim's exact division does not show."""

import cuda_host as host
import pytest
import torch

from kdops import testing

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("path", [host.BLOCK, host.CLUSTER, host.WAVES, host.CHANNELS_LAST])
@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("count", [41, 47, 61, 41 * 32])
def test_constant_channels_of_any_count(loss, path, count):
    """n / n is below 1 for these n in div.approx; a constant channel has no variance all the same."""
    shim = host.shim()
    shim.device()
    layout = "channels_last" if path == host.CHANNELS_LAST else "nchw"
    for options in testing.LOSSES[loss][1]:
        shapes = ((2, 5, 1, count),)
        case = testing.Case(loss, options, shapes, student_layout=layout, teacher_layout=layout)
        student, teacher = case.inputs()
        with torch.no_grad():
            student[:, 3], teacher[:, 4] = 0.7, -1.3
        value, _, (gradient,) = host.forward(shim.ops, case, student, teacher, path, host.GRADS)
        values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
        assert testing.relative_error(value, values) < 5e-6, options
        assert testing.relative_error(gradient, expected) < 1e-5, options
