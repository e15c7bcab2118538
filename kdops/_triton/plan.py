"""Which levels share a launch, and the size of their tiles: from shapes, strides, dtypes and alignment only.

Nothing is timed and no device property is read, so every rank and every run uses the same launches and gets the same
bits. The plan is cached: training computes it once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kdops._triton.tiles import FIELDS_PER_LEVEL, LEVELS_PER_FILL, STRIDES, fill_strides, fill_table

WARPS = 4
# With an explicit limit ptxas uses this many registers; without one it may spill to fit one more block.
REGISTERS = 128
_PER_THREAD = 8  # elements of a tile; 16 bytes in channels_last, where every channel has its own parameters
PROGRAMS = 2048  # split rows until a launch has at least this many programs: about 15 for each of 132 SMs
_MIN_STEPS = 8  # minimum number of tiles per program where rows are split, to amortize its prologue
_WASTE = 1.1  # lanes launched per element: use the largest tile within this, else the one with the least
_HALF = 32  # two numbers are packed into one argument, tiles.py unpacks them
_ARGUMENTS_PER_LEVEL = 7
MERGE = {"CHANNELS": 8, "ENTRIES": 64, "num_warps": 4}  # tile of the merge kernels: channels by (image, split)

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Map(NamedTuple):
    """The properties of a tensor on which a launch may depend: all but its address and values."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: torch.dtype
    misalignment: int  # address modulo 16


class Tiling(NamedTuple):
    """How the levels of one launch are cut into programs."""

    rows: int  # of a tile, constexpr ROWS
    positions: int  # of a tile, constexpr POSITIONS
    chunk: int  # positions that a program covers, a multiple of `positions`
    programs: int  # along axis 0: of the level with the most
    parts: tuple[int, ...]  # partial results per level: rows times splits
    wide: bool  # positions need 64 bits


@dataclass(frozen=True)
class Group:
    """The levels of one launch: equal in dtypes, order and modes."""

    levels: tuple[int, ...]  # indices into the caller's lists
    tiling: Tiling
    constants: dict[str, Any]  # of every pass over the maps
    units: dict[str, Any]  # of the passes that read statistics
    acc: torch.dtype
    max_rows: int  # N*C of the level with the most rows
    max_channels: int
    split: bool  # some row is split over programs
    packed: tuple[tuple[int, int, int, int], ...]  # per level: sizes, offsets and flags as fill_table takes them
    strided: tuple[tuple[int, tuple[int, ...]], ...]  # strides that fill_table cannot derive, with their offsets

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiling.programs, len(self.levels)

    @property
    def parts(self) -> int:
        return sum(self.tiling.parts)

    def table(self, *maps: Sequence[Tensor]) -> Tensor:
        """Fill the level table on the device with the addresses of student, teacher and, if given, gradient."""
        table = maps[0][0].new_empty(len(self.levels) * FIELDS_PER_LEVEL, dtype=torch.int64)
        arguments = []
        for i, packed in zip(self.levels, self.packed):
            arguments += [x[i].data_ptr() for x in maps]
            arguments += [0] * (3 - len(maps))
            arguments += packed
        per_fill = LEVELS_PER_FILL * _ARGUMENTS_PER_LEVEL
        for start in range(0, len(arguments), per_fill):
            part = arguments[start : start + per_fill]
            padding = [0] * (per_fill - len(part))
            fill_table[(1,)](table, start // _ARGUMENTS_PER_LEVEL, len(self.levels), *part, *padding, num_warps=1)
        for slot, strides in self.strided:
            fill_strides[(1,)](table, slot, *strides, num_warps=1)
        return table


def groups(*maps: Sequence[Tensor]) -> tuple[Group, ...]:
    """Group levels into launches. maps: the lists of student, teacher and, for a pass that writes it, gradient."""
    return _groups(
        tuple(tuple(Map(tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % 16) for x in level) for level in zip(*maps))
    )


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current device for launches; does nothing for a CPU tensor (interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=1024)
def double_bits(value: float) -> int:
    """The bits of a double as an integer argument: Triton would pass a Python float in single precision."""
    return struct.unpack("q", struct.pack("d", value))[0]


@lru_cache(maxsize=1024)
def _groups(levels: tuple[tuple[Map, ...], ...]) -> tuple[Group, ...]:
    wide = any(x.dtype == torch.float64 for level in levels for x in level)
    together: dict[tuple, list[int]] = {}
    for i, level in enumerate(levels):
        order = _order(level[0])
        together.setdefault((order, tuple((_mode(x, order), x.dtype) for x in level)), []).append(i)
    offsets, row0, channel0 = [], 0, 0
    for student, *_ in levels:
        offsets.append((row0, channel0))
        row0, channel0 = row0 + student.shape[0] * student.shape[1], channel0 + student.shape[1]
    acc = torch.float64 if wide else torch.float32
    return tuple(
        _group(
            tuple(indices), [levels[i] for i in indices], [offsets[i] for i in indices], (row0, channel0), order, acc
        )
        for (order, _), indices in together.items()
    )


def _group(
    indices: tuple[int, ...],
    levels: list[tuple[Map, ...]],
    offsets: list[tuple[int, int]],
    totals: tuple[int, int],
    order: int,
    acc: torch.dtype,
) -> Group:
    shapes = tuple(level[0].shape for level in levels)
    per_thread = _PER_THREAD if acc == torch.float32 else _PER_THREAD // 4
    if any(_mode(x, order) < 2 for x in levels[0]):
        per_thread //= 2  # every element needs an address, two registers
    if order == 1:
        per_thread = min(per_thread, 16 // max(x.dtype.itemsize for x in levels[0]))
    tiling = plan_tiles(shapes, order, per_thread * 32 * WARPS)
    alignments = [_alignment(level, order) for level in levels]
    vec = alignments[max(range(len(levels)), key=lambda j: math.prod(shapes[j]))]
    constants = {"S_TYPE": DTYPES[levels[0][0].dtype], "T_TYPE": DTYPES[levels[0][1].dtype], "ACC": DTYPES[acc]}
    constants |= {f"{name}_MODE": _mode(x, order) for name, x in zip("STG", levels[0])}
    constants |= {"ORDER": order, "VEC": vec, "MIXED": any(a < vec for a in alignments), "WIDE": tiling.wide}
    constants |= {"ROWS": tiling.rows, "POSITIONS": tiling.positions, "num_warps": WARPS}
    if acc == torch.float64:
        constants["maxnreg"] = REGISTERS
    packed, strided, part0 = [], [], 0
    for j, level in enumerate(levels):
        n, c, h, w = shapes[j]
        flags = int(alignments[j] >= vec)
        for k, x in enumerate(level):
            if x.strides == (c * h * w, 1, w * c, c):
                flags |= 2 << k
            elif x.strides != (c * h * w, h * w, w, 1):
                strided.append((j * FIELDS_PER_LEVEL + STRIDES.value + 4 * k, x.strides))
        row0, channel0 = offsets[j]
        packed.append((n << _HALF | c, h << _HALF | w, row0 << _HALF | channel0, part0 << 4 | flags))
        part0 += tiling.parts[j]
    return Group(
        levels=indices,
        tiling=tiling,
        constants=constants,
        units={"UNIT_VEC": _unit_alignment(shapes, offsets, totals) if order else 1},
        acc=acc,
        max_rows=max(n * c for n, c, _, _ in shapes),
        max_channels=max(c for _, c, _, _ in shapes),
        split=sum(tiling.parts) > sum(n * c for n, c, _, _ in shapes),
        packed=tuple(packed),
        strided=tuple(strided),
    )


def plan_tiles(shapes: tuple[tuple[int, ...], ...], order: int, tile: int) -> Tiling:
    """Tile sizes that waste few lanes, and a chunk that gives enough programs. order 0: NCHW, 1: channels_last."""
    maps = [(n, c, h * w) for n, c, h, w in shapes]
    if order == 0:
        # Two rows at least: Triton 3.9 fails on alignment hints for tensors of one element.
        candidates = [size for size in (512, 256, 128, 64, 32, 16) if size <= tile // 2]
        positions = _fitting(candidates, [(p, n * c) for n, c, p in maps])
        rows = tile // positions
    else:
        rows = _fitting([64, 32, 16], [(c, n * p) for n, c, p in maps])
        positions = tile // rows

    def row_blocks(n: int, c: int) -> int:
        return -(-n * c // rows) if order == 0 else n * -(-c // rows)

    steps = max(-(-p // positions) for _, _, p in maps)
    while steps > _MIN_STEPS and sum(row_blocks(n, c) * -(-p // (steps * positions)) for n, c, p in maps) < PROGRAMS:
        steps = max(_MIN_STEPS, -(-steps // 2))
    chunk = steps * positions
    splits = [-(-p // chunk) for _, _, p in maps]
    return Tiling(
        rows=rows,
        positions=positions,
        chunk=chunk,
        programs=max(row_blocks(n, c) * k for (n, c, _), k in zip(maps, splits)),
        parts=tuple(n * c * k for (n, c, _), k in zip(maps, splits)),
        wide=any(p + chunk >= 2**31 - 2**16 for _, _, p in maps),
    )


def _unit_alignment(shapes: tuple, offsets: list[tuple[int, int]], totals: tuple[int, int]) -> int:
    """4 if statistics, by row and by channel, can be read four channels at a time at aligned addresses; else 1."""
    starts = (*totals, *(x for pair in offsets for x in pair), *(c for _, c, _, _ in shapes))
    return 4 if all(x % 4 == 0 for x in starts) else 1


def _fitting(candidates: Sequence[int], extents: Sequence[tuple[int, int]]) -> int:
    """The largest block with little padding, else the one with the least. extents: (length, count)."""
    useful = sum(length * count for length, count in extents)
    padded = [sum(-(-length // size) * size * count for length, count in extents) / useful for size in candidates]
    return next((size for size, x in zip(candidates, padded) if x <= _WASTE), candidates[padded.index(min(padded))])


def _flat_stride(x: Map) -> int | None:
    """The stride of a position h*W + w, or None if height and width do not collapse."""
    _, _, h, w = x.shape
    _, _, stride_h, stride_w = x.strides
    if w == 1:
        return stride_h
    return stride_w if h == 1 or stride_h == w * stride_w else None


def _order(student: Map) -> int:
    return 1 if student.shape[1] > 1 and student.strides[1] == 1 and _flat_stride(student) != 1 else 0


def _mode(x: Map, order: int) -> int:
    flat = _flat_stride(x)
    unit = (x.strides[1] == 1 or x.shape[1] == 1) if order else flat == 1
    return int(unit) + 2 * (flat is not None)


def _alignment(level: Sequence[Map], order: int) -> int:
    """The largest power of two that divides, in elements, every offset at which a tensor with MODE bit 0 is read."""
    n, c, h, w = level[0].shape
    common = c if order else h * w
    widest = 8
    for x in level:
        size = x.dtype.itemsize
        widest = min(widest, 2 if size == 8 else 8)
        if _mode(x, order) % 2:
            stride_n, stride_c, stride_h, stride_w = x.strides
            other = ((stride_n, n), (stride_h, h), (stride_w, w)) if order else ((stride_n, n), (stride_c, c))
            common = math.gcd(common, *(stride for stride, extent in other if extent > 1))
            # An address aligned to 16 bytes allows any load; any other limits the width to its divisors.
            common = math.gcd(common, math.gcd(x.misalignment, 16) // size if x.misalignment else 8)
    return math.gcd(common, widest)
