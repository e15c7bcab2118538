"""The choice between Triton and the paths of the CUDA kernels, on a simulated device of the host shim."""

from __future__ import annotations

import dataclasses

import cuda_host as host
import pytest
import torch

from kdops import _cuda, testing
from kdops._cuda import Path


@pytest.fixture
def shim(monkeypatch):
    built = host.shim()
    built.device(multiprocessors=16)
    built.reset()
    monkeypatch.setattr(_cuda, "_operators", built.ops)
    monkeypatch.setattr(_cuda, "built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return built


def maps(shape, layout="nchw", dtype=torch.bfloat16):
    case = testing.Case("cwd_loss", {"norm": "batch"}, (shape,), dtype, dtype, layout, layout)
    student, teacher = case.inputs()
    return [student.detach()], [teacher]


def entered(monkeypatch, *capabilities):
    """Every rule holds on these devices."""
    rules = tuple(dataclasses.replace(rule, faster_on=frozenset(capabilities)) for rule in _cuda.RULES)
    monkeypatch.setattr(_cuda, "RULES", rules)


def first_choice(loss, *maps):
    return next(_cuda.choices(loss, *maps))


def served_by(shim, loss, student, teacher):
    """What a call of the routed operators gives, and how many kernels of the CUDA paths it launched."""
    parameters = (1.0, 1, 1e-5, 1.0, 0) if loss == "cwd_loss" else (1, 1e-5, 1.0, 0)
    forward = _cuda.routed(loss, "forward", lambda *args: "triton")
    shim.reset()
    return forward(student, teacher, *parameters, host.NOTHING), len(shim.launches)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("shape", [(2, 8, 20, 20), (2, 4, 80, 80), (1, 2, 200, 304)])
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_calls_reach_a_path_only_on_devices_that_its_rule_names(loss, shape, capability, shim, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert served_by(shim, loss, *maps(shape)) == ("triton", 0)
    entered(monkeypatch, 90)
    result, launches = served_by(shim, loss, *maps(shape))
    assert (launches > 0) == (capability == (9, 0)) and (result == "triton") == (launches == 0)


@pytest.mark.parametrize("loss", testing.LOSSES)
def test_no_room_at_the_launch_falls_to_the_next_path(loss, shim, monkeypatch):
    entered(monkeypatch, 90)
    student, teacher = maps((8, 2, 200, 304), dtype=torch.float32)
    assert first_choice(loss, student, teacher) == Path.WAVES
    shim.device(multiprocessors=16, busy=16)
    assert served_by(shim, loss, student, teacher)[0] == "triton"
    with _cuda.forced(Path.WAVES), pytest.raises(NotImplementedError, match="path 3 cannot take this call: .*no room"):
        served_by(shim, loss, student, teacher)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "path"),
    [
        ((2, 8, 20, 20), "nchw", torch.bfloat16, Path.BLOCK),
        ((8, 4, 80, 80), "nchw", torch.bfloat16, Path.BLOCK),
        ((16, 4, 80, 80), "nchw", torch.bfloat16, Path.CLUSTER),
        ((16, 2, 80, 80), "nchw", torch.float32, Path.CLUSTER),
        ((8, 2, 200, 304), "nchw", torch.float32, Path.WAVES),
        ((2, 8, 20, 20), "channels_last", torch.bfloat16, Path.CHANNELS_LAST),
        ((2, 8, 20, 20), "crop", torch.bfloat16, Path.TRITON),
        ((2, 8, 20, 20), "nchw", torch.float64, Path.TRITON),
    ],
)
def test_table_once_a_device_is_entered(shape, layout, dtype, path, shim, monkeypatch):
    entered(monkeypatch, 90)
    shim.device(multiprocessors=16, shared=227 << 10)
    for loss in testing.LOSSES:
        assert first_choice(loss, *maps(shape, layout, dtype)) == path
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert first_choice("cwd_loss", *maps(shape, layout, dtype)) == Path.TRITON


def test_forced_path_is_launched_and_triton_otherwise(shim):
    student, teacher = maps((2, 4, 13, 19))
    parameters = (1.0, 1, 1e-5, 1.0, 0)
    forward = _cuda.routed("cwd_loss", "forward", lambda *args: "triton")
    backward = _cuda.routed("cwd_loss", "backward", lambda *args: "triton")
    assert forward(student, teacher, *parameters, 1) == "triton"
    assert not shim.launches
    with _cuda.forced(Path.CLUSTER):
        loss, stats, _ = forward(student, teacher, *parameters, 1)
        (gradient,) = backward(torch.ones(()), student, teacher, stats, *parameters)
    assert [launch.cluster for launch in shim.launches] == [2, 1]
    case = testing.Case("cwd_loss", {"norm": "batch"}, ((2, 4, 13, 19),), torch.bfloat16, torch.bfloat16)
    values, (expected,) = host.oracle(case, student[0], teacher[0], torch.ones(()))
    assert testing.relative_error(loss, values) < 5e-6
    assert testing.relative_error(gradient, expected) < 2e-3
    assert backward(torch.ones(()), student, teacher, stats, *parameters) == "triton"


def test_statistics_of_another_shape_are_an_error(shim):
    student, teacher = maps((2, 4, 13, 19))
    backward = _cuda.routed("cwd_loss", "backward", lambda *args: "triton")
    with _cuda.forced(Path.BLOCK), pytest.raises(RuntimeError, match=r"stats must be .* \(10, 8\), got \[9, 8\]"):
        backward(torch.ones(()), student, teacher, torch.zeros(9, 8), 1.0, 1, 1e-5, 1.0, 0)


def test_other_losses_are_left_alone():
    assert _cuda.routed("mgd_loss", "forward", print) is print


def test_not_built_is_a_reason():
    if not _cuda.built():
        assert "without CUDA kernels" in _cuda.refusal("cwd_loss", Path.BLOCK, *maps((2, 4, 5, 5)))
