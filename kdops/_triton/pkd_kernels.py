"""Device code of PKD, the squared distance of normalised maps: every pass, and the bytes it moves per element.

    pass            reads     writes   fp32   bf16
    pkd_moments     S, T      parts     8 B    4 B   means and centred sums of S, T, ST and S - T of each row
    pkd_merge       parts     stats                  Chan's merge over each channel and its loss, a small launch
    pkd_gradient    S, T      dS       12 B    6 B

Forward and backward together: 20 B (bf16 10 B); the lower bound of any implementation is 12 B (6 B).

The loss needs the centred sums SS, TT and ST. The distance r_S^2 SS + r_T^2 TT - 2 r_S r_T ST cancels when the student
is close to the teacher, so DD, the centred sum of (s - t)^2, is kept as well: the same distance is (r_S - r_T)(r_S SS -
r_T TT) + r_S r_T DD, which is accurate then, but cancels when the maps differ in scale. Each channel uses the form that
suits it. Parts are combined in a fixed order.
"""

import triton
import triton.language as tl

from kdops._triton.statistics import mean_of_lanes, merge_channels, scale_of, sum_about_mean, two_sum
from kdops._triton.tiles import (
    ALIGNED,
    CHANNEL0,
    GRADIENT,
    LEVEL_FIELDS,
    PART0,
    STUDENT,
    TEACHER,
    W_FIELD,
    as_double,
    bounds,
    difference,
    lane_counts,
    level_sizes,
    load_tile,
    position_strides,
    positions,
    row_pointers,
    store_tile,
    tile_rows,
    unit_index,
)

# Fields of `stats`, [K] each.
MEAN_S, R_S, MEAN_T, R_T = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
Q_S, DOT, MEAN_S_LO, MEAN_T_LO = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
# Fields of `parts`, [total_parts] each: mean hi, mean lo and SS or TT from these offsets on, then ST and DD.
_PART_S, _PART_T, _PART_ST, _PART_DD = tl.constexpr(0), tl.constexpr(3), tl.constexpr(6), tl.constexpr(7)


@triton.jit
def _moments(level, parts, total_parts, chunk,
             S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr, T_MODE: tl.constexpr,
             ORDER: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
             POSITIONS: tl.constexpr):  # fmt: skip
    N, C, P = level_sizes(level)
    W = tl.load(level + W_FIELD)
    n, c, exists, split, start, stop = tile_rows(tl.program_id(0), N, C, P, chunk, ORDER, VEC, ROWS, POSITIONS)
    exists = tl.expand_dims(exists, 1)
    s_rows = row_pointers(level, STUDENT, n, c, S_TYPE, ORDER, S_MODE, VEC)
    t_rows = row_pointers(level, TEACHER, n, c, T_TYPE, ORDER, T_MODE, VEC)
    s_h, s_w = position_strides(level, STUDENT, ORDER, S_MODE, VEC)
    t_h, t_w = position_strides(level, TEACHER, ORDER, T_MODE, VEC)
    s_first = tl.load(s_rows, mask=exists, other=0.0).to(ACC)
    t_first = tl.load(t_rows, mask=exists, other=0.0).to(ACC)
    begin, end = bounds(start, stop, WIDE)
    # Tiles whose loads are in flight together. Unless strides collapse, every element needs an address of its own.
    UNROLL: tl.constexpr = 2 if VEC > 1 and (S_MODE >= 2 and T_MODE >= 2) else 1
    # Each lane sums about its own first elements.
    p, inside = positions(begin, end, ORDER, VEC, POSITIONS)
    mask = exists & inside
    s_centre = load_tile(s_rows, begin, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
    t_centre = load_tile(t_rows, begin, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
    s_sum = tl.zeros([ROWS, POSITIONS], ACC)
    t_sum = tl.zeros([ROWS, POSITIONS], ACC)
    ss = tl.zeros([ROWS, POSITIONS], ACC)
    tt = tl.zeros([ROWS, POSITIONS], ACC)
    st = tl.zeros([ROWS, POSITIONS], ACC)
    dd = tl.zeros([ROWS, POSITIONS], ACC)
    for p0 in range(begin + POSITIONS, end, POSITIONS * UNROLL):
        for u in tl.static_range(UNROLL):
            first = p0 + u * POSITIONS
            p, inside = positions(first, end, ORDER, VEC, POSITIONS)
            mask = exists & inside
            s = load_tile(s_rows, first, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
            t = load_tile(t_rows, first, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
            s_step = tl.where(mask, s - s_centre, 0.0)
            t_step = tl.where(mask, t - t_centre, 0.0)
            d_step = s_step - t_step
            s_sum += s_step
            t_sum += t_step
            ss += s_step * s_step
            tt += t_step * t_step
            st += s_step * t_step
            dd += d_step * d_step
    counts = lane_counts(start, stop, POSITIONS).to(ACC)
    total = (stop - start).to(ACC)
    s_shift, t_shift = s_centre - s_first, t_centre - t_first
    s_mean, s_rest = mean_of_lanes(s_shift, s_sum, counts, total)
    t_mean, t_rest = mean_of_lanes(t_shift, t_sum, counts, total)
    s_away, t_away = s_shift - s_mean, t_shift - t_mean
    d_away, d_sum = s_away - t_away, s_sum - t_sum
    s_hi, s_lo = two_sum(s_first, s_mean)
    t_hi, t_lo = two_sum(t_first, t_mean)
    out = parts + tl.load(level + PART0) + tl.expand_dims((split * N + n).to(tl.int64) * C + c, 1)
    s_out, t_out = out + total_parts * _PART_S, out + total_parts * _PART_T
    tl.store(s_out, s_hi, mask=exists)
    tl.store(s_out + total_parts, s_lo + s_rest, mask=exists)
    tl.store(s_out + total_parts * 2, sum_about_mean(ss, s_sum, s_sum, counts, s_away, s_away), mask=exists)
    tl.store(t_out, t_hi, mask=exists)
    tl.store(t_out + total_parts, t_lo + t_rest, mask=exists)
    tl.store(t_out + total_parts * 2, sum_about_mean(tt, t_sum, t_sum, counts, t_away, t_away), mask=exists)
    st = sum_about_mean(st, s_sum, t_sum, counts, s_away, t_away)
    tl.store(out + total_parts * _PART_ST, st, mask=exists)
    tl.store(out + total_parts * _PART_DD, sum_about_mean(dd, d_sum, d_sum, counts, d_away, d_away), mask=exists)


@triton.jit(do_not_specialize=["total_parts", "chunk"])
def pkd_moments(table, parts, total_parts: tl.int64, chunk: tl.int64,
                S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
                T_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr,
                ROWS: tl.constexpr, POSITIONS: tl.constexpr):  # fmt: skip
    """Means and centred sums of student, teacher, their product and difference for each row or split of a row."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _moments(level, parts, total_parts, chunk, S_TYPE, T_TYPE, ACC, S_MODE, T_MODE, ORDER,
                     1 if unaligned else VEC, WIDE, ROWS, POSITIONS)  # fmt: skip


@triton.jit(do_not_specialize=["total_parts", "total_channels", "chunk", "eps", "weight"])
def pkd_merge(table, parts, stats, losses, total_parts: tl.int64, total_channels: tl.int64, chunk: tl.int64,
              eps: tl.int64, weight: tl.int64,
              ACC: tl.constexpr, NORM: tl.constexpr, MEAN: tl.constexpr, CHANNELS: tl.constexpr,
              ENTRIES: tl.constexpr):  # fmt: skip
    """Statistics of whole channels, and the weighted loss of each."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    N, C, P = level_sizes(level)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    parts += tl.load(level + PART0)
    chunk = chunk.to(tl.int64)
    s_mean, s_lo, t_mean, t_lo, ss, tt, st, dd = merge_channels(
        parts, total_parts, _PART_S, _PART_T, c, exists, N, C, P, chunk, ACC, True, CHANNELS, ENTRIES
    )
    count = (P * N).to(ACC)
    s_r, s_q = scale_of(ss, count, as_double(eps).to(ACC), NORM)
    t_r, t_q = scale_of(tt, count, as_double(eps).to(ACC), NORM)
    # Two forms of r_S^2 SS + r_T^2 TT - 2 r_S r_T ST and of r_S^2 SS - r_S r_T ST, see above.
    near = (s_r < 4.0 * t_r) & (t_r < 4.0 * s_r)
    surplus = s_r * ss - t_r * tt
    s_part = s_r * ss - t_r * st
    t_part = t_r * tt - s_r * st
    distance = tl.where(near, (s_r - t_r) * surplus + s_r * t_r * dd, s_r * s_part + t_r * t_part)
    distance = tl.where(distance < 0.0, 0.0, distance)  # rounding may make a vanishing distance negative; NaN stays
    dot = tl.where(near, 0.5 * s_r * ((s_r - t_r) * ss + surplus + t_r * dd), s_r * s_part)
    scale = as_double(weight) / (2 * P * N).to(tl.float64)
    if MEAN:
        scale /= C.to(tl.float64)
    channel = tl.load(level + CHANNEL0) + tl.expand_dims(c, 1)
    mask = tl.expand_dims(exists, 1)
    tl.store(losses + channel, scale.to(ACC) * distance, mask=mask)
    stats += channel
    tl.store(stats + total_channels * MEAN_S, s_mean, mask=mask)
    tl.store(stats + total_channels * R_S, s_r, mask=mask)
    tl.store(stats + total_channels * MEAN_T, t_mean, mask=mask)
    tl.store(stats + total_channels * R_T, t_r, mask=mask)
    tl.store(stats + total_channels * Q_S, s_q, mask=mask)
    tl.store(stats + total_channels * DOT, dot, mask=mask)
    tl.store(stats + total_channels * MEAN_S_LO, s_lo, mask=mask)
    tl.store(stats + total_channels * MEAN_T_LO, t_lo, mask=mask)


@triton.jit
def _gradient(level, stats, go, go_stride, total_channels, chunk, weight,
              S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
              T_MODE: tl.constexpr, G_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr,
              UNIT_VEC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
              MEAN: tl.constexpr):  # fmt: skip
    N, C, P = level_sizes(level)
    W = tl.load(level + W_FIELD)
    n, c, exists, split, start, stop = tile_rows(tl.program_id(0), N, C, P, chunk, ORDER, VEC, ROWS, POSITIONS)
    exists = tl.expand_dims(exists, 1)
    s_rows = row_pointers(level, STUDENT, n, c, S_TYPE, ORDER, S_MODE, VEC)
    t_rows = row_pointers(level, TEACHER, n, c, T_TYPE, ORDER, T_MODE, VEC)
    g_rows = row_pointers(level, GRADIENT, n, c, S_TYPE, ORDER, G_MODE, VEC)
    s_h, s_w = position_strides(level, STUDENT, ORDER, S_MODE, VEC)
    t_h, t_w = position_strides(level, TEACHER, ORDER, T_MODE, VEC)
    g_h, g_w = position_strides(level, GRADIENT, ORDER, G_MODE, VEC)
    channel = unit_index(tl.load(level + CHANNEL0), c, UNIT_VEC)
    total_channels = total_channels // UNIT_VEC * UNIT_VEC
    stats += channel
    scale = as_double(weight) / (P * N).to(tl.float64)
    if MEAN:
        scale /= C.to(tl.float64)
    s_mean = tl.load(stats + total_channels * MEAN_S, mask=exists, other=0.0)
    t_mean = tl.load(stats + total_channels * MEAN_T, mask=exists, other=0.0)
    s_r = tl.load(stats + total_channels * R_S, mask=exists, other=0.0)
    factor = s_r * scale.to(ACC) * tl.load(go + channel * go_stride, mask=exists, other=0.0)
    # dS = factor (xhat_S - xhat_T - (s - mean_S) q_S dot)
    slope = tl.load(stats + total_channels * Q_S, mask=exists, other=0.0)
    slope *= tl.load(stats + total_channels * DOT, mask=exists, other=0.0)
    s_factor = factor * (s_r - slope)
    t_factor = factor * tl.load(stats + total_channels * R_T, mask=exists, other=0.0)
    s_lo = tl.load(stats + total_channels * MEAN_S_LO, mask=exists, other=0.0)
    rest = difference(s_factor, s_lo, t_factor, tl.load(stats + total_channels * MEAN_T_LO, mask=exists, other=0.0))
    begin, end = bounds(start, stop, WIDE)
    TILES: tl.constexpr = 2 if S_MODE >= 2 and (T_MODE >= 2 and G_MODE >= 2) else 1
    for p0 in range(begin, end, POSITIONS * TILES):
        # Both tiles are loaded before either is stored: the compiler may not move a load over a store.
        p1, inside1 = positions(p0, end, ORDER, VEC, POSITIONS)
        mask1 = exists & inside1
        s1 = load_tile(s_rows, p0, p1, mask1, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
        t1 = load_tile(t_rows, p0, p1, mask1, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
        if TILES == 2:
            p2, inside2 = positions(p0 + POSITIONS, end, ORDER, VEC, POSITIONS)
            mask2 = exists & inside2
            s2 = load_tile(s_rows, p0 + POSITIONS, p2, mask2, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
            t2 = load_tile(t_rows, p0 + POSITIONS, p2, mask2, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
            g2 = difference(s_factor, s2 - s_mean, t_factor, t2 - t_mean) - rest
        g1 = difference(s_factor, s1 - s_mean, t_factor, t1 - t_mean) - rest
        store_tile(g_rows, p0, p1, mask1, W, g_h, g_w, ORDER, G_MODE, POSITIONS, g1, S_TYPE)
        if TILES == 2:
            store_tile(g_rows, p0 + POSITIONS, p2, mask2, W, g_h, g_w, ORDER, G_MODE, POSITIONS, g2, S_TYPE)


@triton.jit(do_not_specialize=["go_stride", "total_channels", "chunk", "weight"])
def pkd_gradient(table, stats, go, go_stride: tl.int64, total_channels: tl.int64, chunk: tl.int64, weight: tl.int64,
                 S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
                 T_MODE: tl.constexpr, G_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr,
                 UNIT_VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                 POSITIONS: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """The gradient of the student. grad_output is one value (go_stride 0) or one per channel."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _gradient(level, stats, go, go_stride, total_channels, chunk, weight, S_TYPE, T_TYPE, ACC, S_MODE, T_MODE,
                      G_MODE, ORDER, 1 if unaligned else VEC, UNIT_VEC, WIDE, ROWS, POSITIONS, MEAN)  # fmt: skip
