"""Device code of channel-wise distillation: every pass, and the bytes it moves per element of one map.

    pass                     reads     writes   fp32   bf16
    cwd_moments  (norm)      S, T      parts     8 B    4 B   mean, M2 and maximum of each row
    cwd_merge    (norm)      parts     stats                  Chan's merge over each channel, a small launch
    cwd_sums     (norm)      S, T      parts     8 B    4 B   exponential sums of each row
    cwd_online   (no norm)   S, T      parts     8 B    4 B   the same with a running maximum, in one pass
    cwd_finish               parts     stats                  only where rows are split over programs
    cwd_gradient             S, T      dS       12 B    6 B

Forward and backward together: 28 B (bf16 14 B) with a normalisation, 20 B (10 B) without; the lower bound of any
implementation is 12 B (6 B). cwd_sums runs its programs in reverse order, to start with what cwd_moments left in the
cache.

With p = exp(k (x - max)) / Z and k = r / tau, the divergence of a row is E_T[k_T (t - m_T) - k_S (s - m_S)] +
ln(Z_S / Z_T), whose terms stay small whatever the mean of the maps. Parts are combined in a fixed order.
"""

import triton
import triton.language as tl

from kdops._triton.cwd_rows import (
    MAX_S,
    MAX_T,
    MEAN_S,
    MEAN_S_LO,
    Q_S,
    R_S,
    R_T,
    close_rows,
    row_weight,
    store_plain,
)
from kdops._triton.statistics import mean_of_lanes, merge_channels, scale_of, sum_about_mean, sum_lanes, two_sum
from kdops._triton.tiles import (
    ALIGNED,
    LEVEL_FIELDS,
    PART0,
    ROW0,
    STUDENT,
    TEACHER,
    W_FIELD,
    as_double,
    bounds,
    exp_scale,
    exp_scaled,
    lane_counts,
    level_sizes,
    load_tile,
    position_strides,
    positions,
    row_pointers,
    tile_rows,
    unit_index,
)

# Fields of `parts`, [total_parts] each, from cwd_moments to cwd_merge: mean hi, mean lo and M2 of each map from
# these offsets on, then the maxima.
_PART_S, _PART_T, _PART_MAX_S, _PART_MAX_T = tl.constexpr(0), tl.constexpr(3), tl.constexpr(6), tl.constexpr(7)
_INF = tl.constexpr(float("inf"))
_FLOOR = tl.constexpr(-3.0e38)


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
    # Each lane sums about its own first element.
    p, inside = positions(begin, end, ORDER, VEC, POSITIONS)
    mask = exists & inside
    s_centre = load_tile(s_rows, begin, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
    t_centre = load_tile(t_rows, begin, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
    s_max = tl.where(mask, s_centre, -_INF)
    t_max = tl.where(mask, t_centre, -_INF)
    s_sum = tl.zeros([ROWS, POSITIONS], ACC)
    t_sum = tl.zeros([ROWS, POSITIONS], ACC)
    s_m2 = tl.zeros([ROWS, POSITIONS], ACC)
    t_m2 = tl.zeros([ROWS, POSITIONS], ACC)
    for p0 in range(begin + POSITIONS, end, POSITIONS * UNROLL):
        for u in tl.static_range(UNROLL):
            first = p0 + u * POSITIONS
            p, inside = positions(first, end, ORDER, VEC, POSITIONS)
            mask = exists & inside
            s = load_tile(s_rows, first, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0)
            t = load_tile(t_rows, first, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0)
            s_step = tl.where(mask, s - s_centre, 0.0)
            t_step = tl.where(mask, t - t_centre, 0.0)
            s_sum += s_step
            t_sum += t_step
            s_m2 += s_step * s_step
            t_m2 += t_step * t_step
            s_max = tl.maximum(s_max, tl.where(mask, s, -_INF))
            t_max = tl.maximum(t_max, tl.where(mask, t, -_INF))
    counts = lane_counts(start, stop, POSITIONS).to(ACC)
    total = (stop - start).to(ACC)
    s_shift, t_shift = s_centre - s_first, t_centre - t_first
    s_mean, s_rest = mean_of_lanes(s_shift, s_sum, counts, total)
    t_mean, t_rest = mean_of_lanes(t_shift, t_sum, counts, total)
    s_away, t_away = s_shift - s_mean, t_shift - t_mean
    s_hi, s_lo = two_sum(s_first, s_mean)
    t_hi, t_lo = two_sum(t_first, t_mean)
    out = parts + tl.load(level + PART0) + tl.expand_dims((split * N + n).to(tl.int64) * C + c, 1)
    s_out, t_out = out + total_parts * _PART_S, out + total_parts * _PART_T
    tl.store(s_out, s_hi, mask=exists)
    tl.store(s_out + total_parts, s_lo + s_rest, mask=exists)
    tl.store(s_out + total_parts * 2, sum_about_mean(s_m2, s_sum, s_sum, counts, s_away, s_away), mask=exists)
    tl.store(t_out, t_hi, mask=exists)
    tl.store(t_out + total_parts, t_lo + t_rest, mask=exists)
    tl.store(t_out + total_parts * 2, sum_about_mean(t_m2, t_sum, t_sum, counts, t_away, t_away), mask=exists)
    tl.store(out + total_parts * _PART_MAX_S, tl.expand_dims(tl.max(s_max, 1), 1), mask=exists)
    tl.store(out + total_parts * _PART_MAX_T, tl.expand_dims(tl.max(t_max, 1), 1), mask=exists)


@triton.jit(do_not_specialize=["total_parts", "chunk"])
def cwd_moments(table, parts, total_parts: tl.int64, chunk: tl.int64,
                S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
                T_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr,
                ROWS: tl.constexpr, POSITIONS: tl.constexpr):  # fmt: skip
    """Mean, M2 and maximum of student and teacher for each row, or each split of a row."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _moments(level, parts, total_parts, chunk, S_TYPE, T_TYPE, ACC, S_MODE, T_MODE, ORDER,
                     1 if unaligned else VEC, WIDE, ROWS, POSITIONS)  # fmt: skip


@triton.jit(do_not_specialize=["total_parts", "total_rows", "chunk", "eps"])
def cwd_merge(table, parts, stats, total_parts: tl.int64, total_rows: tl.int64, chunk: tl.int64, eps: tl.int64,
              ACC: tl.constexpr, NORM: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Statistics of whole channels, written to each of their rows, and the maximum of each row."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    N, C, P = level_sizes(level)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    parts += tl.load(level + PART0)
    chunk = chunk.to(tl.int64)
    s_mean, s_lo, _, _, s_m2, t_m2, _, _ = merge_channels(
        parts, total_parts, _PART_S, _PART_T, c, exists, N, C, P, chunk, ACC, False, CHANNELS, ENTRIES
    )
    count = (P * N).to(ACC)
    s_r, s_q = scale_of(s_m2, count, as_double(eps).to(ACC), NORM)
    t_r, t_q = scale_of(t_m2, count, as_double(eps).to(ACC), NORM)
    splits = tl.cdiv(P, chunk).to(tl.int32)
    zero = tl.zeros([CHANNELS, ENTRIES], ACC)
    for n0 in range(0, N, ENTRIES):
        n = tl.expand_dims(n0 + tl.arange(0, ENTRIES), 0)
        mask = tl.expand_dims(exists, 1) & (n < N)
        row = n.to(tl.int64) * C + tl.expand_dims(c, 1)
        s_max = tl.full([CHANNELS, ENTRIES], -_INF, ACC)
        t_max = tl.full([CHANNELS, ENTRIES], -_INF, ACC)
        for split in range(0, splits):
            part = parts + split * (N.to(tl.int64) * C) + row
            s_max = tl.maximum(s_max, tl.load(part + total_parts * _PART_MAX_S, mask=mask, other=0.0))
            t_max = tl.maximum(t_max, tl.load(part + total_parts * _PART_MAX_T, mask=mask, other=0.0))
        out = stats + tl.load(level + ROW0) + row
        tl.store(out + total_rows * MEAN_S, s_mean + zero, mask=mask)
        tl.store(out + total_rows * MEAN_S_LO, s_lo + zero, mask=mask)
        tl.store(out + total_rows * R_S, s_r + zero, mask=mask)
        tl.store(out + total_rows * R_T, t_r + zero, mask=mask)
        tl.store(out + total_rows * Q_S, s_q + zero, mask=mask)
        tl.store(out + total_rows * MAX_S, s_max, mask=mask)
        tl.store(out + total_rows * MAX_T, t_max, mask=mask)


@triton.jit
def _sums(level, unit, stats, losses, parts, total_rows, total_parts, chunk, weight, tau,
          S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr, T_MODE: tl.constexpr,
          ORDER: tl.constexpr, VEC: tl.constexpr, UNIT_VEC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
          POSITIONS: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    N, C, P = level_sizes(level)
    W = tl.load(level + W_FIELD)
    n, c, exists, split, start, stop = tile_rows(unit, N, C, P, chunk, ORDER, VEC, ROWS, POSITIONS)
    exists = tl.expand_dims(exists, 1)
    s_rows = row_pointers(level, STUDENT, n, c, S_TYPE, ORDER, S_MODE, VEC)
    t_rows = row_pointers(level, TEACHER, n, c, T_TYPE, ORDER, T_MODE, VEC)
    s_h, s_w = position_strides(level, STUDENT, ORDER, S_MODE, VEC)
    t_h, t_w = position_strides(level, TEACHER, ORDER, T_MODE, VEC)
    row = unit_index(tl.load(level + ROW0) + n.to(tl.int64) * C, c, UNIT_VEC)
    total_rows = total_rows // UNIT_VEC * UNIT_VEC
    stat = stats + row
    inverse_tau = (1.0 / as_double(tau)).to(ACC)
    s_k = tl.load(stat + total_rows * R_S, mask=exists, other=0.0) * inverse_tau
    t_k = tl.load(stat + total_rows * R_T, mask=exists, other=0.0) * inverse_tau
    s_max = tl.load(stat + total_rows * MAX_S, mask=exists, other=0.0)
    t_max = tl.load(stat + total_rows * MAX_T, mask=exists, other=0.0)
    s_k, t_k = exp_scale(s_k), exp_scale(t_k)
    z_s = tl.zeros([ROWS, POSITIONS], ACC)
    z_t = tl.zeros([ROWS, POSITIONS], ACC)
    gap = tl.zeros([ROWS, POSITIONS], ACC)  # z_s - z_t without its cancellation when the maps are close
    ss = tl.zeros([ROWS, POSITIONS], ACC)
    st = tl.zeros([ROWS, POSITIONS], ACC)
    divergence = tl.zeros([ROWS, POSITIONS], ACC)
    begin, end = bounds(start, stop, WIDE)
    # Tiles whose loads are in flight together. Unless strides collapse, every element needs an address of its own.
    UNROLL: tl.constexpr = 2 if VEC > 1 and (S_MODE >= 2 and T_MODE >= 2) else 1
    for p0 in range(begin, end, POSITIONS * UNROLL):
        for u in tl.static_range(UNROLL):
            first = p0 + u * POSITIONS
            p, inside = positions(first, end, ORDER, VEC, POSITIONS)
            mask = exists & inside
            s = load_tile(s_rows, first, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, 0.0) - s_max
            t = load_tile(t_rows, first, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, 0.0) - t_max
            s_log, t_log = tl.fma(s, s_k, 0.0), tl.fma(t, t_k, 0.0)  # rounded: 0 between equal maps
            s_exp = tl.where(mask, exp_scaled(s_log), 0.0)
            t_exp = tl.where(mask, exp_scaled(t_log), 0.0)
            z_s += s_exp
            z_t += t_exp
            gap += s_exp - t_exp
            ss += s_exp * s
            st += t_exp * s
            divergence += t_exp * (t_log - s_log)
    z_s, z_t, gap = sum_lanes(z_s), sum_lanes(z_t), sum_lanes(gap)
    ss, st, divergence = sum_lanes(ss), sum_lanes(st), sum_lanes(divergence) / exp_scale(tl.full((), 1.0, ACC))
    if SPLIT:
        out = parts + tl.load(level + PART0) + tl.expand_dims((split * N + n).to(tl.int64) * C + c, 1)
        tl.store(out, z_s, mask=exists)
        tl.store(out + total_parts, z_t, mask=exists)
        tl.store(out + total_parts * 2, ss, mask=exists)
        tl.store(out + total_parts * 3, st, mask=exists)
        tl.store(out + total_parts * 4, divergence, mask=exists)
        tl.store(out + total_parts * 5, gap, mask=exists)
    else:
        close_rows(stat, losses + row, total_rows, exists, z_s, z_t, gap, divergence / z_t, ss / z_s - st / z_t,
                    row_weight(level, weight, tau, ACC, MEAN, 2))  # fmt: skip


@triton.jit(do_not_specialize=["total_rows", "total_parts", "chunk", "weight", "tau"])
def cwd_sums(table, stats, losses, parts, total_rows: tl.int64, total_parts: tl.int64, chunk: tl.int64,
             weight: tl.int64, tau: tl.int64,
             S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr, T_MODE: tl.constexpr,
             ORDER: tl.constexpr, VEC: tl.constexpr, UNIT_VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr,
             ROWS: tl.constexpr, POSITIONS: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """Partition functions, the divergence and the dot product of the normalisation's derivative, for each row."""
    unit = tl.num_programs(0) - 1 - tl.program_id(0)
    level = table + (tl.num_programs(1) - 1 - tl.program_id(1)) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _sums(level, unit, stats, losses, parts, total_rows, total_parts, chunk, weight, tau, S_TYPE, T_TYPE, ACC,
                  S_MODE, T_MODE, ORDER, 1 if unaligned else VEC, UNIT_VEC, WIDE, ROWS, POSITIONS, SPLIT,
                  MEAN)  # fmt: skip


@triton.jit
def _online(level, stats, losses, parts, total_rows, total_parts, chunk, weight, tau,
            S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr, T_MODE: tl.constexpr,
            ORDER: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
            SPLIT: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    N, C, P = level_sizes(level)
    W = tl.load(level + W_FIELD)
    n, c, exists, split, start, stop = tile_rows(tl.program_id(0), N, C, P, chunk, ORDER, VEC, ROWS, POSITIONS)
    exists = tl.expand_dims(exists, 1)
    s_rows = row_pointers(level, STUDENT, n, c, S_TYPE, ORDER, S_MODE, VEC)
    t_rows = row_pointers(level, TEACHER, n, c, T_TYPE, ORDER, T_MODE, VEC)
    s_h, s_w = position_strides(level, STUDENT, ORDER, S_MODE, VEC)
    t_h, t_w = position_strides(level, TEACHER, ORDER, T_MODE, VEC)
    k = (1.0 / as_double(tau)).to(ACC)
    s_ref = tl.load(s_rows, mask=exists, other=0.0).to(ACC)
    t_ref = tl.load(t_rows, mask=exists, other=0.0).to(ACC)
    # Finite, so that a lane without an element adds exp(-inf - _FLOOR) = 0 instead of NaN.
    s_max = tl.full([ROWS, POSITIONS], _FLOOR, ACC)
    t_max = tl.full([ROWS, POSITIONS], _FLOOR, ACC)
    z_s = tl.zeros([ROWS, POSITIONS], ACC)
    z_t = tl.zeros([ROWS, POSITIONS], ACC)
    difference = tl.zeros([ROWS, POSITIONS], ACC)  # sum of e_T ((t - t_ref) - (s - s_ref))
    begin, end = bounds(start, stop, WIDE)
    for p0 in range(begin, end, POSITIONS):  # not unrolled: it keeps the most values in registers
        p, inside = positions(p0, end, ORDER, VEC, POSITIONS)
        mask = exists & inside
        s = load_tile(s_rows, p0, p, mask, W, s_h, s_w, ORDER, S_MODE, POSITIONS, ACC, -_INF)
        t = load_tile(t_rows, p0, p, mask, W, t_h, t_w, ORDER, T_MODE, POSITIONS, ACC, -_INF)
        # One exponential either rescales the sum to a new maximum or adds the element to it.
        s_exp = exp_scaled(-tl.abs(s - s_max) * exp_scale(k))
        z_s = tl.where(s > s_max, z_s * s_exp + 1.0, z_s + s_exp)
        s_max = tl.maximum(s_max, s)
        d = tl.where(mask, (t - t_ref) - (s - s_ref), 0.0)
        t_exp = exp_scaled(-tl.abs(t - t_max) * exp_scale(k))
        z_t = tl.where(t > t_max, z_t * t_exp + 1.0, z_t + t_exp)
        difference = tl.where(t > t_max, difference * t_exp + d, difference + t_exp * d)
        t_max = tl.maximum(t_max, t)
    s_top = tl.expand_dims(tl.max(s_max, 1), 1)
    t_top = tl.expand_dims(tl.max(t_max, 1), 1)
    s_lane = tl.where(s_max == s_top, 1.0, exp_scaled((s_max - s_top) * exp_scale(k)))
    t_lane = tl.where(t_max == t_top, 1.0, exp_scaled((t_max - t_top) * exp_scale(k)))
    # The softmax of a row with an infinite element is undefined, but its running sum would look finite.
    z_s = tl.where(tl.abs(s_top) == _INF, float("nan"), sum_lanes(tl.fma(z_s, s_lane, 0.0)))
    z_t = tl.where(tl.abs(t_top) == _INF, float("nan"), sum_lanes(tl.fma(z_t, t_lane, 0.0)))
    difference = sum_lanes(tl.fma(difference, t_lane, 0.0))
    if SPLIT:
        out = parts + tl.load(level + PART0) + tl.expand_dims((split * N + n).to(tl.int64) * C + c, 1)
        tl.store(out, z_s, mask=exists)
        tl.store(out + total_parts, z_t, mask=exists)
        tl.store(out + total_parts * 2, s_top, mask=exists)
        tl.store(out + total_parts * 3, t_top, mask=exists)
        tl.store(out + total_parts * 4, difference, mask=exists)
        tl.store(out + total_parts * 5, t_ref - s_ref, mask=exists)
    else:
        row = tl.load(level + ROW0) + tl.expand_dims(n.to(tl.int64) * C + c, 1)
        store_plain(stats + row, total_rows, exists, s_top, t_top)
        divergence = k * (difference / z_t - ((t_top - t_ref) - (s_top - s_ref)))
        close_rows(stats + row, losses + row, total_rows, exists, z_s, z_t, z_s - z_t, divergence, tl.zeros_like(z_s),
                    row_weight(level, weight, tau, ACC, MEAN, 2))  # fmt: skip


@triton.jit(do_not_specialize=["total_rows", "total_parts", "chunk", "weight", "tau"])
def cwd_online(table, stats, losses, parts, total_rows: tl.int64, total_parts: tl.int64, chunk: tl.int64,
               weight: tl.int64, tau: tl.int64,
               S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
               T_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr,
               ROWS: tl.constexpr, POSITIONS: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """The whole forward pass where nothing is normalised: maxima, partition functions and divergence of each row."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _online(level, stats, losses, parts, total_rows, total_parts, chunk, weight, tau, S_TYPE, T_TYPE, ACC,
                    S_MODE, T_MODE, ORDER, 1 if unaligned else VEC, WIDE, ROWS, POSITIONS, SPLIT, MEAN)  # fmt: skip


@triton.jit(do_not_specialize=["total_rows", "total_parts", "chunk", "weight", "tau"])
def cwd_finish(table, stats, losses, parts, total_rows: tl.int64, total_parts: tl.int64, chunk: tl.int64,
               weight: tl.int64, tau: tl.int64,
               ACC: tl.constexpr, NORMALISED: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Adds up the splits of each row, first to last."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    N, C, P = level_sizes(level)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = r < N * C
    row = tl.load(level + ROW0) + r
    parts += tl.load(level + PART0) + r
    step = N.to(tl.int64) * C
    splits = tl.cdiv(P, chunk.to(tl.int64)).to(tl.int32)
    scale = row_weight(level, weight, tau, ACC, MEAN, 2)
    z_s = tl.zeros([ROWS], ACC)
    z_t = tl.zeros([ROWS], ACC)
    divergence = tl.zeros([ROWS], ACC)
    if NORMALISED:
        ss = tl.zeros([ROWS], ACC)
        st = tl.zeros([ROWS], ACC)
        gap = tl.zeros([ROWS], ACC)
        for split in range(0, splits):
            part = parts + split * step
            z_s += tl.load(part, mask=exists, other=1.0)
            z_t += tl.load(part + total_parts, mask=exists, other=1.0)
            ss += tl.load(part + total_parts * 2, mask=exists, other=0.0)
            st += tl.load(part + total_parts * 3, mask=exists, other=0.0)
            divergence += tl.load(part + total_parts * 4, mask=exists, other=0.0)
            gap += tl.load(part + total_parts * 5, mask=exists, other=0.0)
        close_rows(stats + row, losses + row, total_rows, exists, z_s, z_t, gap, divergence / z_t, ss / z_s - st / z_t,
                    scale)  # fmt: skip
    else:
        k = (1.0 / as_double(tau)).to(ACC)
        s_max = tl.full([ROWS], -_INF, ACC)
        t_max = tl.full([ROWS], -_INF, ACC)
        for split in range(0, splits):
            part = parts + split * step
            s_max = tl.maximum(s_max, tl.load(part + total_parts * 2, mask=exists, other=0.0))
            t_max = tl.maximum(t_max, tl.load(part + total_parts * 3, mask=exists, other=0.0))
        for split in range(0, splits):
            part = parts + split * step
            s_part = exp_scaled((tl.load(part + total_parts * 2, mask=exists, other=0.0) - s_max) * exp_scale(k))
            t_part = exp_scaled((tl.load(part + total_parts * 3, mask=exists, other=0.0) - t_max) * exp_scale(k))
            z_s += s_part * tl.load(part, mask=exists, other=1.0)
            z_t += t_part * tl.load(part + total_parts, mask=exists, other=1.0)
            divergence += t_part * tl.load(part + total_parts * 4, mask=exists, other=0.0)
        offset = (t_max - s_max) - tl.load(parts + total_parts * 5, mask=exists, other=0.0)
        store_plain(stats + row, total_rows, exists, s_max, t_max)
        close_rows(stats + row, losses + row, total_rows, exists, z_s, z_t, z_s - z_t, k * (divergence / z_t - offset),
                    tl.zeros_like(z_s), scale)  # fmt: skip
