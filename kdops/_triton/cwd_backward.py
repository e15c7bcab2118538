"""Device code of the gradient of channel-wise distillation: reads S, T and the statistics of the rows, writes dS.

12 B per element in fp32 and 6 B in bf16.

With p = exp(k (x - max)) / Z, c the weighted grad_output of a row and D = r_S * sum over n of c * dot,
dS = r_S * (c (p_S - p_T) - (s - mean_S) q_S D); the last term exists only with a normalisation.
"""

import triton
import triton.language as tl

from kdops._triton.cwd_rows import (
    DOT,
    MAX_S,
    MAX_T,
    MEAN_S,
    MEAN_S_LO,
    Q_S,
    R_S,
    R_T,
    Z_S,
    Z_T,
    row_weight,
)
from kdops._triton.tiles import (
    ALIGNED,
    GRADIENT,
    LEVEL_FIELDS,
    ROW0,
    STUDENT,
    TEACHER,
    W_FIELD,
    as_double,
    bounds,
    difference,
    exp_scale,
    exp_scaled,
    level_sizes,
    load_tile,
    position_strides,
    positions,
    row_pointers,
    store_tile,
    tile_rows,
    unit_index,
)

_IMAGES = tl.constexpr(16)  # of a channel, per step of its dot product


@triton.jit
def _channel_dot(stats, go, go_stride, total_rows, row0, c, exists, N, C, ACC: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 1] sum over the images of grad_output * dot, for the channel of each row."""
    total = tl.zeros([ROWS, _IMAGES], ACC)
    for n0 in range(0, N, _IMAGES):
        n = tl.expand_dims(n0 + tl.arange(0, _IMAGES), 0)
        mask = exists & (n < N)
        row = row0 + n.to(tl.int64) * C + tl.expand_dims(c, 1)
        dot = tl.load(stats + total_rows * DOT + row, mask=mask, other=0.0)
        total += dot * tl.load(go + row * go_stride, mask=mask, other=0.0)
    return tl.expand_dims(tl.sum(total, 1), 1)


@triton.jit
def _gradient(level, stats, go, go_stride, total_rows, chunk, weight, tau,
              S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
              T_MODE: tl.constexpr, G_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr,
              UNIT_VEC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
              NORMALISED: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
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
    row0 = tl.load(level + ROW0)
    row = unit_index(row0 + n.to(tl.int64) * C, c, UNIT_VEC)
    total_rows = total_rows // UNIT_VEC * UNIT_VEC
    stat = stats + row
    scale = row_weight(level, weight, tau, ACC, MEAN, 1)
    inverse_tau = (1.0 / as_double(tau)).to(ACC)
    s_k = inverse_tau
    t_k = inverse_tau
    factor = scale * tl.load(go + row * go_stride, mask=exists, other=0.0)
    if NORMALISED:
        r = tl.load(stat + total_rows * R_S, mask=exists, other=0.0)
        s_k = inverse_tau * r
        t_k = inverse_tau * tl.load(stat + total_rows * R_T, mask=exists, other=0.0)
        factor *= r
        mean = tl.load(stat + total_rows * MEAN_S, mask=exists, other=0.0)
        slope = r * r * scale * _channel_dot(stats, go, go_stride, total_rows, row0, c, exists, N, C, ACC, ROWS)
        slope *= tl.load(stat + total_rows * Q_S, mask=exists, other=0.0)
        rest = slope * tl.load(stat + total_rows * MEAN_S_LO, mask=exists, other=0.0)
    s_max = tl.load(stat + total_rows * MAX_S, mask=exists, other=0.0)
    t_max = tl.load(stat + total_rows * MAX_T, mask=exists, other=0.0)
    s_factor = factor / tl.load(stat + total_rows * Z_S, mask=exists, other=1.0)
    t_factor = factor / tl.load(stat + total_rows * Z_T, mask=exists, other=1.0)
    s_k, t_k = exp_scale(s_k), exp_scale(t_k)
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
            g2 = difference(s_factor, exp_scaled((s2 - s_max) * s_k), t_factor, exp_scaled((t2 - t_max) * t_k))
            if NORMALISED:
                g2 -= (s2 - mean) * slope - rest
        g1 = difference(s_factor, exp_scaled((s1 - s_max) * s_k), t_factor, exp_scaled((t1 - t_max) * t_k))
        if NORMALISED:
            g1 -= (s1 - mean) * slope - rest
        store_tile(g_rows, p0, p1, mask1, W, g_h, g_w, ORDER, G_MODE, POSITIONS, g1, S_TYPE)
        if TILES == 2:
            store_tile(g_rows, p0 + POSITIONS, p2, mask2, W, g_h, g_w, ORDER, G_MODE, POSITIONS, g2, S_TYPE)


@triton.jit(do_not_specialize=["go_stride", "total_rows", "chunk", "weight", "tau"])
def cwd_gradient(table, stats, go, go_stride: tl.int64, total_rows: tl.int64, chunk: tl.int64, weight: tl.int64,
                 tau: tl.int64,
                 S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, ACC: tl.constexpr, S_MODE: tl.constexpr,
                 T_MODE: tl.constexpr, G_MODE: tl.constexpr, ORDER: tl.constexpr, VEC: tl.constexpr,
                 UNIT_VEC: tl.constexpr, MIXED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                 POSITIONS: tl.constexpr, NORMALISED: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """The gradient of the student. grad_output is one value (go_stride 0) or one per row."""
    level = table + tl.program_id(1) * LEVEL_FIELDS
    for unaligned in tl.static_range(1 + MIXED):
        if tl.load(level + ALIGNED) != unaligned:
            _gradient(level, stats, go, go_stride, total_rows, chunk, weight, tau, S_TYPE, T_TYPE, ACC, S_MODE,
                      T_MODE, G_MODE, ORDER, 1 if unaligned else VEC, UNIT_VEC, WIDE, ROWS, POSITIONS, NORMALISED,
                      MEAN)  # fmt: skip
