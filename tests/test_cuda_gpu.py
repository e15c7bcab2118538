"""The CUDA kernels on a GPU: all cases on every path, streams, graphs, repeatability and large offsets.

None of this has been run yet; tests/test_cuda_paths.py runs the same kernels on the CPU.
"""

from __future__ import annotations

import cuda_host as host
import pytest
import torch

from kdops import _cuda, testing
from kdops._cuda import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda.built(), reason="kdops._C was built without CUDA kernels"),
]
PATHS = [path for path in Path if path != Path.TRITON]
HALF = (torch.bfloat16, torch.bfloat16)


def layout(path: Path) -> dict:
    name = "channels_last" if path == Path.CHANNELS_LAST else "nchw"
    return {"student_layout": name, "teacher_layout": name}


def taken(case: testing.Case, path: Path, device: str = "cuda") -> tuple:
    """The inputs of a case; skips if the path does not support them."""
    student, teacher = case.inputs(device)
    reason = _cuda.refusal(case.loss, path, testing.as_list(student), testing.as_list(teacher))
    if reason is not None:
        pytest.skip(f"{path.name}: {reason}")
    return student, teacher


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("case", list(testing.cases()), ids=str)
def test_cases(case, path, poisoned):
    taken(case, path)
    host.check(torch.ops.kdops, case, path, "cuda")
    with _cuda.forced(path):
        testing.check(case, "cuda")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_gradient_in_the_forward_through_autograd(loss, path, poisoned):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], ((3, 24, 20, 30),), **layout(path))
    taken(case, path)
    with _cuda.forced(path, gradient_in_forward=True):
        testing.check(case, "cuda")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("shape", [(32, 64, 80, 80), (8, 16, 200, 304), (32, 64, 20, 20), (7, 33, 25, 38)])
def test_shapes_of_detectors(loss, shape, path):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], (shape,), *HALF, **layout(path))
    taken(case, path)
    host.check(torch.ops.kdops, case, path, "cuda")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_same_bits_every_time(loss, path):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], ((16, 64, 40, 40), (16, 64, 20, 20)), *HALF, **layout(path))
    student, teacher = taken(case, path)
    runs = []
    for _ in range(20):
        value, stats, _ = host.forward(torch.ops.kdops, case, student, teacher, path, host.STATS)
        grads = host.forward(torch.ops.kdops, case, student, teacher, path, host.GRADS)[2]
        runs.append([value, stats, *grads])
    assert all(torch.isfinite(x).all() for x in runs[0])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def meeting(loss: str, path: Path) -> testing.Case:
    """Maps for which the blocks of the path wait for one another."""
    return testing.Case(loss, testing.LOSSES[loss][1][-1], (host.MEETING[path],), *HALF, **layout(path))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_meetings_for_the_sanitizer(loss, path):
    """benchmarks/gpu_check.sh runs these under memcheck, racecheck and synccheck."""
    case = meeting(loss, path)
    taken(case, path)
    host.check(torch.ops.kdops, case, path, "cuda")


def replayed(work, student, fresh) -> None:
    """What `work` gives in a graph on new values of the student is what it gives outside."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    with torch.no_grad():
        student.copy_(fresh)
    for _ in range(3):  # counters start from 0 at every replay
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, work()))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_graph_replays_on_new_values(loss, path):
    case = meeting(loss, path)
    student, teacher = taken(case, path)

    def work():
        value, _, grads = host.forward(torch.ops.kdops, case, student, teacher, path, host.GRADS)
        return value, grads[0]

    replayed(work, student, case.inputs("cuda", seed=5)[0])


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_graph_replays_a_backward(loss, path, in_forward):
    """Forward and backward through autograd, with a grad_output that changes too."""
    case = meeting(loss, path)
    student, teacher = taken(case, path)
    scale = torch.full((), 0.5, device="cuda")

    def work():
        with _cuda.forced(path, gradient_in_forward=in_forward):
            value = case.call(student, teacher)
            return value.detach(), *torch.autograd.grad(value, student, scale)

    replayed(work, student, case.inputs("cuda", seed=5)[0])
    scale.fill_(3.0)
    replayed(work, student, case.inputs("cuda", seed=6)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_another_device_than_the_current_one(loss, path):
    """Limits, occupancy and kernels' attributes belong to the device of the maps."""
    case = meeting(loss, path)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        taken(case, path, device)
        with torch.cuda.device(0):
            host.check(torch.ops.kdops, case, path, device)
            with _cuda.forced(path):
                testing.check(case, device)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_current_stream_is_used(path):
    """The input is written late on a side stream: a launch on another stream would read it before."""
    case = testing.Case("cwd_loss", {"norm": "batch"}, ((4, 32, 40, 40),), *HALF, **layout(path))
    student, teacher = taken(case, path)
    expected = host.forward(torch.ops.kdops, case, student, teacher, path, host.NOTHING)[0]
    late = torch.full_like(student, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)
        late.copy_(student)
        value = host.forward(torch.ops.kdops, case, late, teacher, path, host.NOTHING)[0]
    stream.synchronize()
    assert torch.equal(value, expected)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_beyond_two_to_the_31_elements(path):
    """Offsets past 32 bits: the last channels must give what they give in a small tensor."""
    shape, last = (2, 33000, 256, 128), 4  # 2.16e9 elements
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * torch.Size(shape).numel():
        pytest.skip("needs 18 GB of memory for two maps and a gradient, and room")
    case = testing.Case("cwd_loss", {"norm": "batch"}, (shape,), *HALF, reduction="none", **layout(path))
    memory = torch.channels_last if path == Path.CHANNELS_LAST else torch.contiguous_format
    student, teacher = (torch.zeros(shape, dtype=HALF[0], device="cuda").to(memory_format=memory) for _ in range(2))
    reason = _cuda.refusal(case.loss, path, [student], [teacher])
    if reason is not None:
        pytest.skip(f"{path.name}: {reason}")
    small = [torch.randn(2, last, *shape[2:], device="cuda").to(HALF[0]) for _ in range(2)]
    student[:, -last:], teacher[:, -last:] = small
    rows, stats, _ = host.forward(torch.ops.kdops, case, student, teacher, path, host.STATS)
    grad = host.backward(torch.ops.kdops, case, torch.ones_like(rows), student, teacher, stats, path)[0]
    few = testing.Case("cwd_loss", {"norm": "batch"}, (small[0].shape,), *HALF, reduction="none")
    values, (expected,) = host.oracle(few, *small, torch.ones(2 * last, device="cuda"))
    assert testing.relative_error(rows.view(2, -1)[:, -last:].flatten(), values) < 5e-6
    assert testing.relative_error(grad[:, -last:], expected) < 2e-3
