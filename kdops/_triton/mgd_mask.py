"""MGD's mask on a GPU: Philox4x32-10 from a seed on the device, as `kdops._mask` defines it.

A program draws the mask of its positions once and applies it to all channels: 4 B per element in bf16 and 8 B in fp32.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdops._triton.plan import on_device

_BLOCK = 1024
_TILE = 2048


@triton.jit
def kept(seed, index, threshold):
    """Whether the positions with these int64 indices are kept."""
    zero = tl.zeros_like(index).to(tl.uint32)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero, 10)
    return word.to(tl.int64) < threshold


@triton.jit
def mask_kernel(seed, out, size, threshold, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, kept(tl.load(seed), i, threshold).to(tl.uint8), mask=i < size)


@triton.jit
def apply_kernel(x, out, bias, keep, seed, threshold, C, P, x_n, x_c, x_p, out_n, out_c, out_p,
                 DRAWN: tl.constexpr, ON_CHANNEL: tl.constexpr, BIASED: tl.constexpr,
                 POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """out = keep ? x + bias : 0 for one block of positions of one image and all channels."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = tl.expand_dims(p < P, 1)
    if DRAWN:
        key = tl.load(seed)
    if not ON_CHANNEL:
        if DRAWN:
            mine = kept(key, n * P + p, threshold)
        else:
            mine = tl.load(keep + n * P + p, mask=p < P, other=0) != 0
        mine = tl.expand_dims(mine, 1)
    for c0 in range(0, C, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS).to(tl.int64)
        mask = inside & tl.expand_dims(c < C, 0)
        value = tl.load(x + n * x_n + tl.expand_dims(p * x_p, 1) + tl.expand_dims(c * x_c, 0), mask=mask, other=0.0)
        if BIASED:
            b = tl.expand_dims(tl.load(bias + c, mask=c < C, other=0.0), 0)
            wide = tl.float64 if value.dtype == tl.float64 else tl.float32
            value = (value.to(wide) + b.to(wide)).to(value.dtype)
        if ON_CHANNEL:
            if DRAWN:
                mine_c = kept(key, n * C + c, threshold)
            else:
                mine_c = tl.load(keep + n * C + c, mask=c < C, other=0) != 0
            value = tl.where(tl.expand_dims(mine_c, 0), value, 0.0)
        else:
            value = tl.where(mine, value, 0.0)
        to = out + n * out_n + tl.expand_dims(p * out_p, 1) + tl.expand_dims(c * out_c, 0)
        tl.store(to, value.to(out.dtype.element_ty), mask=mask)


def mgd_mask(seed: Tensor, threshold: int, shape: Sequence[int]) -> Tensor:
    """The kept positions, bool."""
    out = seed.new_empty(tuple(shape), dtype=torch.bool)
    with on_device(seed):
        size = out.numel()
        mask_kernel[(triton.cdiv(size, _BLOCK),)](seed, out.view(torch.uint8), size, threshold, BLOCK=_BLOCK)
    return out


def mgd_apply_mask_(
    out: Tensor,
    x: Tensor,
    bias: Optional[Tensor],
    keep: Optional[Tensor],
    seed: Optional[Tensor],
    threshold: int,
    on_channel: bool,
) -> None:
    """Writes keep ? x + bias : 0 to out, which may be x."""
    if not _flat(x):
        x = x.contiguous()
    target = out if _flat(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    n, c, h, w = x.shape
    channels_in_lanes = target.stride(1) == 1 and c > 1
    channels = 64 if channels_in_lanes and c >= 64 else 16
    positions = _TILE // channels
    with on_device(x):
        apply_kernel[(triton.cdiv(h * w, positions), n)](
            x,
            target,
            bias,
            None if keep is None else keep.contiguous().view(torch.uint8),
            seed,
            threshold,
            c,
            h * w,
            *_strides(x),
            *_strides(target),
            DRAWN=keep is None,
            ON_CHANNEL=on_channel,
            BIASED=bias is not None,
            POSITIONS=positions,
            CHANNELS=channels,
        )
    if target is not out:
        out.copy_(target)


def _flat(x: Tensor) -> bool:
    """Whether height and width collapse into one stride."""
    return x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)
