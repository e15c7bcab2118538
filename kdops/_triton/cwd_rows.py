"""Device code shared by the passes of channel-wise distillation: the statistics of a row, stored and finished."""

import triton
import triton.language as tl

from kdops._triton.tiles import C_FIELD, N_FIELD, as_double

# Fields of `stats`, [R] each; the first four and the last are equal in all rows of a channel.
MEAN_S, R_S, R_T, Q_S = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MAX_S, MAX_T, Z_S, Z_T, DOT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
MEAN_S_LO = tl.constexpr(9)


@triton.jit
def row_weight(level, weight, tau, ACC: tl.constexpr, MEAN: tl.constexpr, POWER: tl.constexpr):
    """loss_weight * tau^POWER, over N*C for the mean."""
    scale = as_double(weight) * as_double(tau)
    if POWER == 2:
        scale *= as_double(tau)
    if MEAN:
        scale /= (tl.load(level + N_FIELD) * tl.load(level + C_FIELD)).to(tl.float64)
    return scale.to(ACC)


@triton.jit
def _log_ratio(z_s, z_t, gap):
    """ln(z_s / z_t) where gap is z_s - z_t, more accurate than the difference of the two: near 1 the device's logarithm
    has a small absolute error, but a large relative one."""
    x = gap / (z_s + z_t)
    y = x * x
    near = 2.0 * x * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * (1.0 / 7 + y * (1.0 / 9)))))
    if x.dtype == tl.float64:
        return tl.log(z_s / z_t)
    else:
        return tl.where(tl.abs(x) < 0.125, near, tl.log(z_s / z_t))


@triton.jit
def close_rows(stat, losses, total_rows, mask, z_s, z_t, gap, divergence, dot, weight):
    """Store the statistics of the second pass, and the weighted loss of the rows."""
    tl.store(stat + total_rows * Z_S, z_s, mask=mask)
    tl.store(stat + total_rows * Z_T, z_t, mask=mask)
    tl.store(stat + total_rows * DOT, dot, mask=mask)
    tl.store(losses, weight * (divergence + _log_ratio(z_s, z_t, gap)), mask=mask)


@triton.jit
def store_plain(stat, total_rows, mask, s_max, t_max):
    """Store the statistics for no normalisation, and the maxima."""
    one = s_max * 0 + 1
    tl.store(stat + total_rows * MEAN_S, tl.zeros_like(one), mask=mask)
    tl.store(stat + total_rows * MEAN_S_LO, tl.zeros_like(one), mask=mask)
    tl.store(stat + total_rows * R_S, tl.full(one.shape, 1.0, one.dtype), mask=mask)
    tl.store(stat + total_rows * R_T, tl.full(one.shape, 1.0, one.dtype), mask=mask)
    tl.store(stat + total_rows * Q_S, tl.zeros_like(one), mask=mask)
    tl.store(stat + total_rows * MAX_S, s_max, mask=mask)
    tl.store(stat + total_rows * MAX_T, t_max, mask=mask)
