"""The CUDA kernels on a CPU: every path against the fp64 oracle, on odd sizes, and the bytes that it moves."""

from __future__ import annotations

import cuda_host as host
import pytest
import torch

from kdops import testing

pytestmark = pytest.mark.kernels
PATHS = (host.BLOCK, host.CLUSTER, host.WAVES, host.CHANNELS_LAST)
CHANNEL_PATHS = (host.BLOCK, host.CLUSTER, host.WAVES)
POSITIONS_CONTIGUOUS = ("nchw", "channel_slice", "expanded")


@pytest.fixture(scope="module")
def built():
    return host.shim()


@pytest.fixture
def shim(built):
    built.device()
    built.order(0)
    built.reset()
    return built


def layouts(path: int) -> dict:
    layout = "channels_last" if path == host.CHANNELS_LAST else "nchw"
    return {"student_layout": layout, "teacher_layout": layout}


def covered(case: testing.Case, layouts: tuple) -> bool:
    same = case.student_dtype == case.teacher_dtype != torch.float64
    return same and case.student_layout in layouts and case.teacher_layout in layouts


@pytest.mark.parametrize("path", CHANNEL_PATHS)
@pytest.mark.parametrize("case", [c for c in testing.cases() if covered(c, POSITIONS_CONTIGUOUS)], ids=str)
def test_channels(case, path, shim, poisoned):
    host.check(shim.ops, case, path)


@pytest.mark.parametrize("path", CHANNEL_PATHS)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_rows_misaligned_differently(loss, path, shim, poisoned):
    """A channel slice beside a whole map: vectors of one would straddle those of the other."""
    for dtype in (torch.float32, torch.bfloat16):
        for pair in (("channel_slice", "nchw"), ("nchw", "channel_slice")):
            case = testing.Case(loss, testing.LOSSES[loss][1][-1], testing.SHAPES["odd"], dtype, dtype, *pair)
            host.check(shim.ops, case, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_many_images(loss, path, shim, poisoned):
    """More rows in a channel than warps, and than pieces are wanted."""
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], ((600, 2, 3, 3), (600, 1, 1, 1)), **layouts(path))
    host.check(shim.ops, case, path)


@pytest.mark.parametrize("case", [c for c in testing.cases() if covered(c, ("channels_last",))], ids=str)
def test_channels_last(case, shim, poisoned):
    host.check(shim.ops, case, host.CHANNELS_LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("shapes", [((2, 130, 9, 11), (3, 64, 5, 5)), ((1, 67, 40, 40),)])
def test_channels_last_blocks(loss, shapes, dtype, shim, poisoned):
    """More channels than a warp has, and rows in several pieces."""
    for options in testing.LOSSES[loss][1]:
        case = testing.Case(loss, options, shapes, dtype, dtype, "channels_last", "channels_last")
        host.check(shim.ops, case, host.CHANNELS_LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("shape", [(3, 1, 75, 98), (1, 1, 140, 131)])
def test_cluster_sizes(loss, shape, dtype, shim, poisoned):
    """The less shared memory the simulated device has, the larger the clusters that hold a channel."""
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], (shape,), dtype, dtype)
    seen = set()
    for shared in (int((200 << 10) * 0.93**i) for i in range(100)):
        shim.device(multiprocessors=16, shared=shared)
        shim.reset()
        try:
            host.forward(shim.ops, case, *case.inputs(), host.CLUSTER, host.NOTHING)
        except RuntimeError as refused:
            assert "no cluster of this device holds a channel" in str(refused)
            break
        (launch,) = shim.launches
        if launch.cluster not in seen:
            seen.add(launch.cluster)
            assert launch.shared_bytes <= shared
            host.check(shim.ops, case, host.CLUSTER)
    assert seen == {2, 4, 8, 16}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_any_order_of_threads_gives_the_same_bits(loss, path, shim, poisoned):
    """A missing barrier changes the result in some order."""
    shim.device(multiprocessors=3, shared=30 << 10)
    shapes, options = ((3, 4, 31, 33), (3, 5, 8, 8)), testing.LOSSES[loss][1][-1]
    case = testing.Case(loss, options, shapes, *[torch.bfloat16] * 2, **layouts(path))
    student, teacher = case.inputs()
    runs = []
    for seed in range(6):
        shim.order(seed)
        loss_value, stats, _ = host.forward(shim.ops, case, student, teacher, path, host.STATS)
        runs.append([loss_value, stats, *host.forward(shim.ops, case, student, teacher, path, host.GRADS)[2]])
    assert all(torch.isfinite(x).all() for x in runs[0])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize(("l2", "blocks"), [(200 << 10, 1 * 8), (700 << 10, 2 * 4), (50 << 20, 7 * 1)])
def test_waves_of_groups(loss, l2, blocks, shim, poisoned):
    """Groups of several blocks, each with several channels one after the other, in any order of threads."""
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], ((2, 5, 60, 71), (3, 2, 13, 19)))
    student, teacher = case.inputs()
    shim.device(multiprocessors=4, l2=l2)
    runs = []
    for seed in range(4):
        shim.order(seed)
        shim.reset()
        host.check(shim.ops, case, host.WAVES)
        launch = shim.launches[0]
        assert launch.cooperative and launch.blocks == blocks
        value, stats, _ = host.forward(shim.ops, case, student, teacher, host.WAVES, host.STATS)
        runs.append([value, stats, *host.forward(shim.ops, case, student, teacher, host.WAVES, host.GRADS)[2]])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


# Bytes per element of one map that the kernels ask for, in half precision: value, with the gradient in the forward, and
# the backward from statistics. On chip that is what memory moves, as a map is read once. In waves and channels_last it
# is requested once per pass, and only a GPU's counters can tell how much of the later passes comes from L2.
BYTES_REQUESTED = {
    ("cwd_loss", host.BLOCK): (4, 6, 6),
    ("cwd_loss", host.CLUSTER): (4, 6, 6),
    ("cwd_loss", host.WAVES): (8, 14, 6),
    ("pkd_loss", host.BLOCK): (4, 6, 6),
    ("pkd_loss", host.CLUSTER): (4, 6, 6),
    ("pkd_loss", host.WAVES): (4, 10, 6),
    ("cwd_loss", host.CHANNELS_LAST): (8, 14, 6),
    ("pkd_loss", host.CHANNELS_LAST): (4, 10, 6),
}


@pytest.mark.parametrize("shapes", [((2, 3, 40, 40),), ((3, 4, 13, 19), (3, 2, 25, 38))])
@pytest.mark.parametrize(("loss", "path"), BYTES_REQUESTED)
def test_bytes_requested(loss, path, shapes, shim):
    case = testing.Case(loss, testing.LOSSES[loss][1][-1], shapes, *[torch.bfloat16] * 2, **layouts(path))
    student, teacher = case.inputs()
    elements = sum(s.numel() for s in testing.as_list(student))

    def moved(work):
        shim.reset()
        out = work()
        return sum(shim.bytes) / elements, out

    forward, (_, stats, _) = moved(lambda: host.forward(shim.ops, case, student, teacher, path, host.STATS))
    with_gradient, _ = moved(lambda: host.forward(shim.ops, case, student, teacher, path, host.GRADS))
    weight = torch.ones(())
    backward, _ = moved(lambda: host.backward(shim.ops, case, weight, student, teacher, stats, path))
    assert (forward, with_gradient, backward) == BYTES_REQUESTED[loss, path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", testing.LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_inf(loss, path, bad, where, shim):
    for options in testing.LOSSES[loss][1]:
        case = testing.Case(loss, options, testing.SHAPES["odd"], **layouts(path))
        student, teacher = case.inputs()
        with torch.no_grad():
            (student if where == "student" else teacher)[1, 2, 3, 4] = bad
        value, _, _ = host.forward(shim.ops, case, student, teacher, path, host.NOTHING)
        eager = case.call(student, teacher, "reference")
        assert not torch.isfinite(eager) and not torch.isfinite(value)
        assert torch.isnan(value) or not torch.isnan(eager)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_without_normalisation_rows_are_apart(bad, where, path, shim):
    """-inf masks a position, NaN stays in its row: the gradient is finite where the eager one is."""
    case = testing.Case("cwd_loss", {}, ((2, 5, 13, 19),), **layouts(path))
    student, teacher = case.inputs()
    with torch.no_grad():
        (student if where == "student" else teacher)[1, 2, 3, 4] = bad
    _, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
    _, stats, _ = host.forward(shim.ops, case, student, teacher, path, host.STATS)
    gradients = host.forward(shim.ops, case, student, teacher, path, host.GRADS)[2]
    gradients += host.backward(shim.ops, case, torch.ones(()), student, teacher, stats, path)
    kept = expected.isfinite()
    assert kept.any()
    for gradient in gradients:
        assert torch.equal(gradient.isfinite(), kept)
        assert testing.relative_error(gradient[kept], expected[kept]) <= testing.GRADIENT_BUDGET[torch.float32]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", testing.LOSSES)
def test_constant_channel(loss, path, shim):
    for options in testing.LOSSES[loss][1]:
        case = testing.Case(loss, options, testing.SHAPES["odd"], **layouts(path))
        student, teacher = case.inputs()
        with torch.no_grad():
            student[:, 3], teacher[:, 4] = 0.7, -1.3
        value, _, (gradient,) = host.forward(shim.ops, case, student, teacher, path, host.GRADS)
        values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
        assert testing.relative_error(value, values) < 5e-6
        assert testing.relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_large_mean(path, shim, poisoned):
    """A mean of 333, where E[x^2] - E[x]^2 is off by a hundredth."""
    rounding = 2.0**-16 / 0.5  # of the mean itself, kept in fp32, in the smallest deviation of these maps
    for loss, (_, variants) in testing.LOSSES.items():
        case = testing.Case(loss, variants[-1], ((2, 4, 40, 60),), mean=333.0, **layouts(path))
        student, teacher = case.inputs()
        value, _, (gradient,) = host.forward(shim.ops, case, student, teacher, path, host.GRADS)
        values, (expected,) = host.oracle(case, student, teacher, torch.ones(()))
        assert testing.relative_error(value, values) < 5e-6
        assert testing.relative_error(gradient, expected) < 1e-5 + rounding


def test_refusals(shim):
    """Each path gives the reason why it does not support a call."""

    def refusal(path, **changes):
        case = testing.Case("cwd_loss", {"norm": "batch"}, ((2, 4, 13, 19),), **changes)
        save = host.GRADS if changes.get("student_dtype") == torch.float16 else host.STATS
        with pytest.raises(RuntimeError) as error:
            host.forward(shim.ops, case, *case.inputs(), path, save)
        return str(error.value)

    assert "float32, bfloat16 and float16" in refusal(host.BLOCK, student_dtype=torch.float64)
    assert "differ in dtype" in refusal(host.BLOCK, student_dtype=torch.bfloat16)
    assert "positions of a row" in refusal(host.WAVES, teacher_layout="channels_last")
    assert "height and width" in refusal(host.BLOCK, student_layout="crop")
    assert "underflow" in refusal(host.BLOCK, student_dtype=torch.float16, teacher_dtype=torch.float16)
    assert "not channels_last" in refusal(host.CHANNELS_LAST)
    assert "height and width" in refusal(host.CHANNELS_LAST, student_layout="channels_last_crop")
    shim.device(shared=2 << 10)
    assert "bytes on chip" in refusal(host.BLOCK)
    assert "no cluster" in refusal(host.CLUSTER)
    shim.device(architecture=80)
    assert "compute capability 9.0" in refusal(host.CLUSTER)
    shim.device(architecture=90, code=80)
    assert "compiled for 8.0" in refusal(host.CLUSTER)
    assert not host.forward(shim.ops, *on_one_level(), host.BLOCK, host.NOTHING)[0].isnan()
    shim.device(multiprocessors=1)
    assert "none to spare" in refusal(host.WAVES)
    shim.device(multiprocessors=4, busy=4)
    assert "no room" in refusal(host.WAVES)


def test_a_refusal_sees_the_backward(shim):
    """The gradient of a map with overlapping memory has other strides, which a path may not support."""
    student = torch.randn(2, 4, 1, 1, dtype=torch.float16).expand(2, 4, 3, 5)
    student = student.contiguous(memory_format=torch.channels_last)[:, :, :1, :1].expand(2, 4, 3, 5)
    teacher = torch.randn(2, 4, 3, 5).half().contiguous(memory_format=torch.channels_last)
    _, stats, _ = shim.ops.pkd_loss_cuda([student], [teacher], 1, 1e-5, 1.0, 0, host.STATS, host.CHANNELS_LAST)
    grad_output = torch.ones(())
    arguments = (grad_output, [student], [teacher], stats, 1, 1e-5, 1.0, 0, host.CHANNELS_LAST)
    with pytest.raises(NotImplementedError, match="not channels_last"):
        shim.ops.pkd_loss_backward_cuda(*arguments)
    assert "not channels_last" in shim.ops.cuda_refusal("pkd_loss", host.CHANNELS_LAST, [student], [teacher])


def on_one_level() -> tuple:
    case = testing.Case("cwd_loss", {"norm": "batch"}, ((2, 4, 13, 19),))
    return case, *case.inputs()


def test_blocks_meet_in_the_shapes_for_the_sanitizer(shim):
    """Without synchronization between blocks a race detector has nothing to find."""
    shim.device(**host.H100)
    for loss in testing.LOSSES:
        for path, shape in host.MEETING.items():
            case = testing.Case(loss, testing.LOSSES[loss][1][-1], (shape,), *[torch.bfloat16] * 2, **layouts(path))
            shim.reset()
            with shim.planning():
                host.forward(shim.ops, case, *case.inputs(), path, host.NOTHING)
            launch = shim.launches[0]
            assert launch.cluster == (8 if path == host.CLUSTER else 1)
            if path == host.WAVES:
                assert launch.cooperative and launch.blocks == 3 * 112 and shape[1] > 112
            if path == host.CHANNELS_LAST:
                assert launch.blocks > 2 * shape[0]


@pytest.mark.parametrize("multiprocessors", [2, 4, 108, 132])
def test_waves_leave_room_for_others(multiprocessors, shim):
    """Blocks that wait for one another start beside a kernel that holds an eighth of the device."""
    case = testing.Case("cwd_loss", {"norm": "batch"}, ((4, 8, 400, 400),), *[torch.bfloat16] * 2)
    shim.device(multiprocessors=multiprocessors, busy=max(1, multiprocessors // 8))
    with shim.planning():
        host.forward(shim.ops, case, *case.inputs(), host.WAVES, host.NOTHING)
    assert shim.launches[0].blocks > 2 * (multiprocessors - multiprocessors // 8 - 1)
