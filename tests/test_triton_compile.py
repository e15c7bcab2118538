"""The Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, wide loads, the plan's promises."""

import math

import pytest
import torch

from kdops.testing import LAYOUTS, laid_out

triton = pytest.importorskip("triton")
from triton_compile import (  # noqa: E402
    SHARED_LIMIT,
    channels_last,
    compiled,
    crop,
    flat_kernels,
    group,
    kernels,
    known,
    nchw,
)

from kdops._triton.plan import _groups, groups, plan_tiles  # noqa: E402

FULL = ((32, 256, 80, 80),)
PYRAMID = ((8, 256, 200, 304), (8, 256, 100, 152), (8, 256, 50, 76), (8, 256, 25, 38), (8, 256, 13, 19))
SMALL = ((8, 192, 20, 20),)
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
VARIANTS = [
    (90, FULL, nchw, HALF, None),
    (90, FULL, channels_last, HALF, None),
    (90, FULL, nchw, SINGLE, None),
    (90, PYRAMID, nchw, torch.float16, None),
    (90, SMALL, crop, SINGLE, HALF),
    (80, FULL, channels_last, SINGLE, HALF),
    (80, FULL, nchw, DOUBLE, None),
    (100, FULL, nchw, HALF, SINGLE),
    (100, SMALL, channels_last, HALF, None),
]


#: Tiles of one map that a pass has loads for: one of each lane's first elements, and those in flight together.
TILES = {
    "cwd_moments": 3,
    "cwd_sums": 2,
    "cwd_online": 1,
    "cwd_gradient": 2,
    "pkd_moments": 3,
    "pkd_gradient": 2,
}


def loads_of_a_tile(launch, dtype):
    """16-byte loads that bring a thread its elements of one tile of one map; none where they are fewer bytes."""
    elements = launch.constants["ROWS"] * launch.constants["POSITIONS"] // (32 * launch.constants["num_warps"])
    return elements * dtype.itemsize // 16


@pytest.mark.parametrize(
    "architecture, shapes, strides, student, teacher",
    VARIANTS,
    ids=[f"sm_{a}-{len(s)}x{s[0]}-{f.__name__}-{x}-{y}" for a, s, f, x, y in VARIANTS],
)
def test_kernels_compile_without_spills(architecture, shapes, strides, student, teacher):
    launch = group(shapes, strides, student, teacher)
    seen = []
    for kernel, constants in kernels(launch, norm=1 + architecture // 100):
        resources = compiled(kernel, constants, launch, architecture)
        name = kernel.fn.__name__
        assert resources.local == 0, f"{name}: {resources}"
        assert resources.shared <= SHARED_LIMIT, f"{name}: {resources}"
        if name in TILES and strides is not crop:
            wide = TILES[name] * sum(loads_of_a_tile(launch, x) for x in (student, teacher or student))
            assert resources.loads[16] >= wide, f"{name}: {resources}, {wide} wide loads"
            if strides is nchw:  # in channels_last statistics are read that wide too
                assert resources.loads[16] == wide, f"{name}: {resources}, {wide} wide loads"
        seen.append(name)
    assert len(seen) == 13 and len(set(seen)) == 9


def test_the_wheel_knows_architectures():
    assert known(80) and known(90) and not known(999)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_flat_kernels_compile_without_spills(architecture):
    launch = group(SMALL, nchw, SINGLE)
    resources = [compiled(kernel, constants, launch, architecture) for kernel, constants in flat_kernels()]
    assert [r.local for r in resources] == [0, 0, 0]
    assert set(resources[2].loads) == {4, 16}  # grad_output, and the gradient


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_promised_alignment_is_there(layout, dtype):
    """VEC and MODE make promises to the compiler; a wrong one is a fault on a device, and silent in the interpreter."""
    shapes = ((2, 8, 20, 20), (3, 16, 5, 8), (2, 12, 10, 10), (1, 24, 7, 1), (2, 6, 13, 19), (4, 8, 1, 1))
    student = [laid_out(torch.randn(s).to(dtype), layout) for s in shapes]
    teacher = [laid_out(torch.randn(s).to(torch.bfloat16), layout) for s in shapes]
    checked = 0
    for launch in groups(student, teacher):
        constants = launch.constants
        for level, packed in zip(launch.levels, launch.packed):
            vec = constants["VEC"] if packed[3] & 1 else 1
            assert packed[3] & 1 or constants["MIXED"]
            n, c, h, w = shapes[level]
            assert (c if constants["ORDER"] else h * w) % vec == 0
            for name, x in (("S", student[level]), ("T", teacher[level])):
                if constants[f"{name}_MODE"] % 2 == 0:
                    continue
                width = min(16, vec * x.element_size())
                for i in range(n):
                    rows = [x[i, 0, y, z] for y in range(h) for z in range(w)] if constants["ORDER"] else x[i, :, 0, 0]
                    assert all(row.data_ptr() % width == 0 for row in rows)
                    checked += len(rows)
    assert checked > 0 or layout in ("crop", "transposed", "strided", "expanded", "channel_slice")


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("shapes", [FULL, PYRAMID, SMALL, ((2, 256, 13, 19),), ((32, 192, 80, 80), (32, 192, 20, 20))])
def test_tiles_cover_the_maps_and_waste_little(shapes, order):
    tiling = plan_tiles(shapes, order, 1024)
    lanes = 0
    for (n, c, h, w), parts in zip(shapes, tiling.parts):
        splits = math.ceil(h * w / tiling.chunk)
        blocks = n * math.ceil(c / tiling.rows) if order else math.ceil(n * c / tiling.rows)
        assert parts == n * c * splits and blocks * splits <= tiling.programs
        steps = math.ceil(h * w / tiling.positions)
        lanes += blocks * steps * tiling.rows * tiling.positions
    assert tiling.chunk % tiling.positions == 0 and tiling.rows * tiling.positions == 1024
    assert lanes <= 1.25 * sum(math.prod(s) for s in shapes)


def test_the_choice_of_a_launch_is_cached():
    """The plan is cached: new tensors of the same kind do not compute it again."""
    _groups.cache_clear()
    for _ in range(3):
        groups([torch.randn(2, 4, 8, 8)], [torch.randn(2, 4, 8, 8)])
    assert _groups.cache_info().misses <= 2  # the allocator may align the first ones differently
