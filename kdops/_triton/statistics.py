"""Device code for means and centred sums: shifted sums per lane, merged by Chan's formula over lanes, splits, images.

E[x^2] - E[x]^2 would cancel where the mean is large; these sums do not. They are shifted by an element of the same lane
or row, so that a constant channel has a variance of exactly 0. A mean is kept as the sum of two numbers, hi + lo: with
hi alone, x - mean of a map whose mean is 1000 deviations would be off by 3e-5 deviations.

Products in sums over lanes are written as `tl.fma`: the compiler would fuse a plain product into the first addition of
the reduction, and the lanes that hold the result would then differ in its last bit.
"""

import triton
import triton.language as tl


@triton.jit
def two_sum(a, b):
    """a + b as hi + lo, exactly."""
    hi = a + b
    from_b = hi - a
    return hi, (a - (hi - from_b)) + (b - from_b)


@triton.jit
def sum_lanes(x):
    """[ROWS, 1] sum of [ROWS, lanes]."""
    return tl.expand_dims(tl.sum(x, 1), 1)


@triton.jit
def mean_of_lanes(shift, total, count, whole):
    """[ROWS, 1] mean and its rounding error, of lanes with `count` elements that sum to `total` about `shift`."""
    mean = sum_lanes(tl.fma(count, shift, total)) / whole
    return mean, sum_lanes(tl.fma(count, shift - mean, total)) / whole


@triton.jit
def sum_about_mean(product, a_total, b_total, count, a_away, b_away):
    """[ROWS, 1] sum of (a - mean)(b - mean), from lanes that hold sums about points `away` from the means."""
    moved = tl.fma(a_away, tl.fma(count, b_away, b_total), product)
    return sum_lanes(tl.fma(b_away, a_total, moved))


@triton.jit
def merge_channels(parts, total_parts, S: tl.constexpr, T: tl.constexpr, c, exists, N, C, P, chunk, ACC: tl.constexpr,
                   CROSS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """[CHANNELS, 1] means (hi, lo) of student and teacher and centred sums SS, TT, ST, DD over whole channels.

    parts has [total_parts] fields: from S on the student's mean hi, lo and SS, from T on the teacher's; with CROSS, ST
    and DD follow the teacher's. Part `split*N*C + n*C + c` is entry `split*N + n` of channel c. DD is of (s - t)^2.
    """
    entries = (tl.cdiv(P, chunk) * N).to(tl.int32)
    c = tl.expand_dims(c, 1)
    exists = tl.expand_dims(exists, 1)
    s_parts, t_parts = parts + total_parts * S, parts + total_parts * T
    s_first = tl.load(s_parts + c, mask=exists, other=0.0)
    t_first = tl.load(t_parts + c, mask=exists, other=0.0)
    zero = tl.zeros([CHANNELS, ENTRIES], ACC)
    s_mean, t_mean, ss, tt, st, dd = zero, zero, zero, zero, zero, zero  # means are relative to the first entry's hi
    count = tl.zeros([1, ENTRIES], ACC)
    for e0 in range(0, entries, ENTRIES):
        e = tl.expand_dims(e0 + tl.arange(0, ENTRIES), 0)
        mask = exists & (e < entries)
        part = e.to(tl.int64) * C + c
        s, t = s_parts + part, t_parts + part
        length = tl.where(e < entries, tl.minimum(chunk, P - (e // N) * chunk), 0).to(ACC)
        share = length / tl.maximum(count + length, 1.0)
        s_rest = tl.load(s + total_parts, mask=mask, other=0.0)
        t_rest = tl.load(t + total_parts, mask=mask, other=0.0)
        s_step = tl.where(mask, (tl.load(s, mask=mask, other=0.0) - s_first) + s_rest - s_mean, 0.0)
        t_step = tl.where(mask, (tl.load(t, mask=mask, other=0.0) - t_first) + t_rest - t_mean, 0.0)
        weight = count * share
        ss += tl.load(s + total_parts * 2, mask=mask, other=0.0) + s_step * s_step * weight
        tt += tl.load(t + total_parts * 2, mask=mask, other=0.0) + t_step * t_step * weight
        if CROSS:
            d_step = s_step - t_step
            st += tl.load(t + total_parts * 3, mask=mask, other=0.0) + s_step * t_step * weight
            dd += tl.load(t + total_parts * 4, mask=mask, other=0.0) + d_step * d_step * weight
        s_mean += s_step * share
        t_mean += t_step * share
        count += length
    whole = (P * N).to(ACC)
    s_centre, s_rest = mean_of_lanes(s_mean, zero, count, whole)
    t_centre, t_rest = mean_of_lanes(t_mean, zero, count, whole)
    s_away, t_away = s_mean - s_centre, t_mean - t_centre
    ss = sum_about_mean(ss, zero, zero, count, s_away, s_away)
    tt = sum_about_mean(tt, zero, zero, count, t_away, t_away)
    if CROSS:
        st = sum_about_mean(st, zero, zero, count, s_away, t_away)
        dd = sum_about_mean(dd, zero, zero, count, s_away - t_away, s_away - t_away)
    s_hi, s_lo = two_sum(s_first, s_centre)
    t_hi, t_lo = two_sum(t_first, t_centre)
    return s_hi, s_lo + s_rest, t_hi, t_lo + t_rest, ss, tt, st, dd


@triton.jit
def scale_of(m2, count, eps, NORM: tl.constexpr):
    """r, the factor of the normalisation, and q, the factor of its own derivative. NORM 1: batch, 2: pkd."""
    if NORM == 1:
        r = 1.0 / tl.sqrt(m2 / count + eps)
        q = r / count
    else:
        std = tl.sqrt(m2 / (count - 1.0))
        r = 1.0 / (std + eps)
        q = tl.where(std == 0.0, 0.0, 1.0 / ((count - 1.0) * std))
    return r, q
