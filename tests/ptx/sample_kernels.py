"""Triton kernels with which the launch layer is tested."""

import triton
import triton.language as tl

FACTOR = tl.constexpr(3)


@triton.jit
def scaled(x, out, size, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, FACTOR * tl.load(x + i, mask=i < size), mask=i < size)


@triton.jit
def unmasked(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x + i, i.to(tl.float32))


@triton.jit
def scalars(out, a, b, c):
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
