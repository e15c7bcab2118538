"""MGD on a GPU, around its convolutions: bias and ReLU, the ReLU's bits, and the squared error with its gradient.

Bytes per element in bf16 (fp32): mgd_bias_relu_ 4 (8), mgd_relu_bits 2.1 (4.1), mgd_relu_backward_ 4.1 (8.1),
mgd_difference_ 6 (12), forward 4 (8), backward 6 (12).

Maps are processed in memory order; a teacher in another memory format is first copied to the generated map's.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdops._triton.plan import on_device

_BLOCK = 2048
_PROGRAMS = 1024  # that share a sum: enough for any GPU, few enough for one final sum
_BYTES = 256  # bytes of bits per program


@triton.jit
def channel_of(start, C, INNER, BLOCK: tl.constexpr):
    """The channels of BLOCK elements from ``start`` on; INNER elements of a channel are contiguous."""
    row = start // INNER
    within = (start - row * INNER).to(tl.int32) + tl.arange(0, BLOCK)
    return ((row % C).to(tl.int32) + within // INNER) % C


@triton.jit
def bias_relu_kernel(x, bias, size, C, INNER, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0)
    wide = tl.float64 if value.dtype == tl.float64 else tl.float32
    total = value.to(wide) + tl.load(bias + channel_of(start, C, INNER, BLOCK)).to(wide)
    tl.store(x + i, tl.where(total <= 0, 0.0, total).to(value.dtype), mask=i < size)  # NaN stays


@triton.jit
def relu_bits_kernel(x, bits, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    i = tl.expand_dims(byte * 8, 1) + tl.expand_dims(bit, 0)
    positive = tl.load(x + i, mask=i < size, other=0.0) <= 0
    word = tl.sum(tl.where(positive, 0, 1) << tl.expand_dims(bit, 0), 1)
    tl.store(bits + byte, word.to(tl.uint8), mask=byte * 8 < size)


@triton.jit
def relu_backward_kernel(grad, bits, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.expand_dims(tl.arange(0, 8), 0)
    i = tl.expand_dims(byte * 8, 1) + bit
    word = tl.load(bits + byte, mask=byte * 8 < size, other=0).to(tl.int32)
    value = tl.load(grad + i, mask=i < size, other=0.0)
    passes = (tl.expand_dims(word, 1) >> bit) & 1
    tl.store(grad + i, tl.where(passes != 0, value, 0.0), mask=i < size)


@triton.jit
def difference_kernel(s, t, out, bias, factor, scale, sums, size, blocks, C, INNER,
                      BIASED: tl.constexpr, SCALED: tl.constexpr, WRITE: tl.constexpr, SUM: tl.constexpr,
                      ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = factor or scale * (s + bias - t), and the sum of (s + bias - t)^2 over this program's blocks."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    for block in range(0, blocks):
        start = (program * blocks + block) * BLOCK
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        x = tl.load(s + i, mask=inside, other=0.0)
        d = x.to(ACC) - tl.load(t + i, mask=inside, other=0.0).to(ACC)
        if BIASED:
            b = tl.load(bias + channel_of(start, C, INNER, BLOCK)).to(ACC)
            d += tl.where(inside, b, 0.0)
        if SUM:
            total += d * d
        if WRITE:
            if SCALED:
                d *= tl.load(factor)
            else:
                d *= scale
            if x.dtype != tl.float64:
                d = d.to(tl.float32)  # Triton's interpreter cannot convert fp64 to bf16
            tl.store(out + i, d.to(x.dtype), mask=inside)
    if SUM:
        tl.store(sums + program, tl.sum(total, 0))


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], alpha_mgd: float, reduction: int, save: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of kdops::mgd_loss; its backward needs no statistics."""
    if save not in (0, 1):
        raise ValueError(f"mgd_loss: the Triton kernels save nothing (0) or statistics (1), got save={save}")
    acc = _accumulation([*student, *teacher])
    losses = [_difference(s, t, None, acc=acc) * (alpha_mgd / s.shape[0]) for s, t in zip(student, teacher)]
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return loss, loss.new_empty((0, 0) if save else 0), []


def backward(
    grad_output: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    stats: Tensor,
    alpha_mgd: float,
    reduction: int,
) -> list[Tensor]:
    """The gradient of kdops::mgd_loss_backward."""
    acc, grads = _accumulation([*student, *teacher]), []
    for s, t in zip(student, teacher):
        grads.append(torch.empty_like(s))
        _difference(s, t, grads[-1], factor=grad_output * (2 * alpha_mgd / s.shape[0]), acc=acc)
    return grads


def mgd_difference_(generated: Tensor, bias: Optional[Tensor], teacher: Tensor, scale: float) -> Tensor:
    """generated = scale * (generated + bias - teacher); returns the sum of the squares of the difference."""
    acc = _accumulation([generated, teacher])
    return _difference(generated, teacher, generated, bias=bias, scale=scale, acc=acc)


def mgd_bias_relu_(x: Tensor, bias: Tensor) -> None:
    """x = max(x + bias, 0) for a dense map."""
    with on_device(x):
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        bias_relu_kernel[grid](x, bias, x.numel(), x.shape[1], _inner(x), BLOCK=_BLOCK, num_warps=8)


def mgd_relu_bits(x: Tensor) -> Tensor:
    """One bit per element of a dense map, in memory order: whether the ReLU passes the gradient."""
    bits = x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)
    with on_device(x):
        relu_bits_kernel[(triton.cdiv(bits.numel(), _BYTES),)](x, bits, x.numel(), BYTES=_BYTES)
    return bits


def mgd_relu_backward_(grad: Tensor, bits: Tensor) -> None:
    """Set the gradient to 0 where the bit is 0."""
    with on_device(grad):
        relu_backward_kernel[(triton.cdiv(bits.numel(), _BYTES),)](grad, bits, grad.numel(), BYTES=_BYTES)


def _difference(
    s: Tensor,
    t: Tensor,
    out: Optional[Tensor],
    *,
    acc: torch.dtype,
    bias: Optional[Tensor] = None,
    factor: Optional[Tensor] = None,
    scale: float = 1.0,
) -> Optional[Tensor]:
    """Write (factor or scale) * (s + bias - t) to out, if given; without a factor return the sum of the squares."""
    dense = s.is_contiguous() or s.is_contiguous(memory_format=torch.channels_last)
    order = s if dense else s.contiguous()
    target = out if out is None or out.stride() == order.stride() else torch.empty_like(order)
    t = t if t.stride() == order.stride() else torch.empty_like(order, dtype=t.dtype).copy_(t)
    blocks = triton.cdiv(triton.cdiv(s.numel(), _BLOCK), _PROGRAMS)
    programs = triton.cdiv(s.numel(), _BLOCK * blocks)
    sums = s.new_empty(programs, dtype=acc) if factor is None else None
    with on_device(s):
        difference_kernel[(programs,)](
            order,
            t,
            target,
            bias,
            factor,
            scale,
            sums,
            s.numel(),
            blocks,
            s.shape[1],
            _inner(order),
            BIASED=bias is not None,
            SCALED=factor is not None,
            WRITE=target is not None,
            SUM=factor is None,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    if target is not out:
        out.copy_(target)
    return None if sums is None else sums.sum()


def _inner(x: Tensor) -> int:
    """The number of contiguous elements of one channel in a dense NCHW or channels_last map."""
    return 1 if x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1 else x.shape[2] * x.shape[3]


def _accumulation(maps: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in maps) else torch.float32
