"""Device code for means and centred sums: Welford per lane, Chan's formula between lanes, splits and images.

E[x^2] - E[x]^2 would lose all digits of the variance of a map whose mean is large; these do not. Every mean starts from
an element of its own row or channel, so that a constant channel has a variance of exactly 0.
"""

import triton
import triton.language as tl


@triton.jit
def welford(x, mask, mean, m2, share):
    """One more element per lane; share is 1 over the count including it."""
    step = tl.where(mask, x - mean, 0.0)
    mean += step * share
    m2 += step * (x - mean)
    return mean, m2


@triton.jit
def merge_lanes(mean, m2, first, count, total):
    """[ROWS, 1] mean and M2 of [ROWS, lanes]. The second sum takes out the rounding of the first."""
    centre = first + tl.expand_dims(tl.sum(count * (mean - first), 1), 1) / total
    centre += tl.expand_dims(tl.sum(count * (mean - centre), 1), 1) / total
    shift = mean - centre
    return centre, tl.expand_dims(tl.sum(m2 + count * shift * shift, 1), 1)


@triton.jit
def merge_parts(parts, total_parts, c, exists, N, C, P, chunk, ACC: tl.constexpr, CHANNELS: tl.constexpr,
                ENTRIES: tl.constexpr):  # fmt: skip
    """[CHANNELS, 1] mean and M2 of whole channels from parts [mean, M2] of all images and splits.

    Part `split*N*C + n*C + c` is entry `split*N + n` of channel c.
    """
    entries = (tl.cdiv(P, chunk) * N).to(tl.int32)
    c = tl.expand_dims(c, 1)
    exists = tl.expand_dims(exists, 1)
    first = tl.load(parts + c, mask=exists, other=0.0)
    mean = tl.zeros([CHANNELS, ENTRIES], ACC) + first
    m2 = tl.zeros([CHANNELS, ENTRIES], ACC)
    count = tl.zeros([1, ENTRIES], ACC)
    for e0 in range(0, entries, ENTRIES):
        e = tl.expand_dims(e0 + tl.arange(0, ENTRIES), 0)
        length = tl.where(e < entries, tl.minimum(chunk, P - (e // N) * chunk), 0).to(ACC)
        part = parts + e.to(tl.int64) * C + c
        mask = exists & (e < entries)
        step = tl.where(mask, tl.load(part, mask=mask, other=0.0) - mean, 0.0)
        weight = length / tl.maximum(count + length, 1.0)
        mean += step * weight
        m2 += tl.load(part + total_parts, mask=mask, other=0.0) + step * step * (count * weight)
        count += length
    return merge_lanes(mean, m2, first, count, (P * N).to(ACC))


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
