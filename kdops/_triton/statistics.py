"""Device code for means and centred sums: Welford per lane, Chan's formula between lanes, splits and images.

E[x^2] - E[x]^2 would lose all digits of the variance of a map whose mean is large; these do not. Every mean starts from
an element of its own row or channel, so that a constant channel has a variance of exactly 0.
"""

import triton
import triton.language as tl

# What merge_parts sums over a channel, of a and b about their means: a * b, or (a - b)^2.
PRODUCT, DISTANCE = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def welford(x, mask, mean, m2, share):
    """One more element per lane; share is 1 over the count including it."""
    step = tl.where(mask, x - mean, 0.0)
    mean += step * share
    m2 += step * (x - mean)
    return mean, m2


@triton.jit
def merge_means(mean, first, count, total):
    """[ROWS, 1] mean of [ROWS, lanes]. The second sum takes out the rounding of the first."""
    centre = first + tl.expand_dims(tl.sum(count * (mean - first), 1), 1) / total
    return centre + tl.expand_dims(tl.sum(count * (mean - centre), 1), 1) / total


@triton.jit
def merge_sums(m2, count, shift, other_shift):
    """[ROWS, 1] centred sum of [ROWS, lanes] whose means are shifted from the common mean."""
    return tl.expand_dims(tl.sum(m2 + count * shift * other_shift, 1), 1)


@triton.jit
def _shift_product(a, b, KIND: tl.constexpr):
    if KIND == DISTANCE:
        return (a - b) * (a - b)
    else:
        return a * b


@triton.jit
def merge_parts(a, b, sums, c, exists, N, C, P, chunk, KIND: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr,
                ENTRIES: tl.constexpr):  # fmt: skip
    """[CHANNELS, 1] mean of a and centred sum over whole channels, from the parts of all images and splits.

    Part `split*N*C + n*C + c` is entry `split*N + n` of channel c.
    """
    entries = (tl.cdiv(P, chunk) * N).to(tl.int32)
    c = tl.expand_dims(c, 1)
    exists = tl.expand_dims(exists, 1)
    a_first = tl.load(a + c, mask=exists, other=0.0)
    b_first = tl.load(b + c, mask=exists, other=0.0)
    a_mean = tl.zeros([CHANNELS, ENTRIES], ACC) + a_first
    b_mean = tl.zeros([CHANNELS, ENTRIES], ACC) + b_first
    m2 = tl.zeros([CHANNELS, ENTRIES], ACC)
    count = tl.zeros([1, ENTRIES], ACC)
    for e0 in range(0, entries, ENTRIES):
        e = tl.expand_dims(e0 + tl.arange(0, ENTRIES), 0)
        mask = exists & (e < entries)
        part = e.to(tl.int64) * C + c
        length = tl.where(e < entries, tl.minimum(chunk, P - (e // N) * chunk), 0).to(ACC)
        weight = length / tl.maximum(count + length, 1.0)
        a_step = tl.where(mask, tl.load(a + part, mask=mask, other=0.0) - a_mean, 0.0)
        b_step = tl.where(mask, tl.load(b + part, mask=mask, other=0.0) - b_mean, 0.0)
        product = _shift_product(a_step, b_step, KIND)
        m2 += tl.load(sums + part, mask=mask, other=0.0) + product * (count * weight)
        a_mean += a_step * weight
        b_mean += b_step * weight
        count += length
    total = (P * N).to(ACC)
    a_centre = merge_means(a_mean, a_first, count, total)
    b_centre = merge_means(b_mean, b_first, count, total)
    product = _shift_product(a_mean - a_centre, b_mean - b_centre, KIND)
    return a_centre, tl.expand_dims(tl.sum(m2 + count * product, 1), 1)


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
