"""MGD's random mask, from a counter-based generator: a seed of eight bytes reproduces it.

The mask is a pure function of a 64-bit seed. Word 0 of Philox4x32-10 (Salmon et al. 2011) with the seed as key (low
half first) and the position's index as counter (low half first, then two zeros) decides whether a position is kept:
``word < threshold``, threshold = round((1 - lambda) * 2^32). The index is ``(n*H + h)*W + w`` for a spatial mask and
``n*C + c`` for one on channels. The CPU kernel, the GPU kernels and `draw_ref` below give identical masks.

The seed is one int64 drawn by torch.randint on the device of the features, from its default generator or the one
given: torch.manual_seed reproduces it, activation checkpointing replays it, and a CUDA graph draws a new one at every
replay. The generators of CPU and GPU differ: the same *seed tensor* gives the same mask on both, the same
torch.manual_seed does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdops import _checks, _op

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

_op.library.define("mgd_mask(Tensor seed, int threshold, int[] shape) -> Tensor")
_op.library.define(
    "mgd_apply_mask_(Tensor(a!) out, Tensor x, Tensor? bias, Tensor? keep, Tensor? seed, int threshold, "
    "bool on_channel) -> ()"
)
_op.library.impl("mgd_mask", _op.triton_kernel("mgd_mask", "mgd_mask"), "CUDA")
_op.library.impl("mgd_apply_mask_", _op.triton_kernel("mgd_mask", "mgd_apply_mask_"), "CUDA")
torch.library.register_fake(
    "kdops::mgd_mask", lambda seed, threshold, shape: seed.new_empty(shape, dtype=torch.bool), lib=_op.library
)


class Mask(NamedTuple):
    """A mask as it is saved for backward: explicit positions, or the seed of random ones."""

    keep: Tensor | None  # bool, True is kept
    seed: Tensor | None
    shape: tuple[int, int, int, int]
    on_channel: bool
    masked_fraction: float  # lambda

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.keep, self.seed

    def without_tensors(self) -> Mask:
        return self._replace(keep=None, seed=None)

    def with_tensors(self, keep: Tensor | None, seed: Tensor | None) -> Mask:
        return self._replace(keep=keep, seed=seed)

    def positions(self) -> Tensor:
        """The kept positions, bool, from the kernel of the seed's device."""
        if self.keep is not None:
            return self.keep
        return torch.ops.kdops.mgd_mask(self.seed, threshold(self.masked_fraction), self.shape)

    def positions_ref(self) -> Tensor:
        """The same from the reference, `draw_ref`."""
        if self.keep is not None:
            return self.keep
        return draw_ref(self.seed, threshold(self.masked_fraction), self.shape)

    def apply(self, x: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """Writes mask * (x + bias) to out, which may be x, and returns it. A GPU draws the mask in the same pass."""
        if _op.on_gpu(x):
            limit = threshold(self.masked_fraction)
            torch.ops.kdops.mgd_apply_mask_(out, x, bias, self.keep, self.seed, limit, self.on_channel)
            return out
        return torch.where(self.positions(), x, torch.zeros((), dtype=x.dtype), out=out)


def threshold(lambda_mgd: float) -> int:
    """How many of the 2^32 words keep a position: all of them at lambda 0, none at lambda 1."""
    return round((1.0 - lambda_mgd) * 2**32)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, Tensor[] of int64 on the device, from PyTorch's generator of that device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def shape_of(x: Tensor, on_channel: bool, channels: int) -> tuple[int, int, int, int]:
    """The mask's shape for a map of ``channels`` channels with the batch and size of ``x``."""
    n, _, h, w = x.shape
    return (n, channels, 1, 1) if on_channel else (n, 1, h, w)


def draw_ref(seed: Tensor, threshold: int, shape: Sequence[int]) -> Tensor:
    """The kept positions as a bool Tensor of ``shape``, in PyTorch's integer arithmetic: the ground truth."""
    index = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3 = index & _WORD, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return (c0 < threshold).view(tuple(shape))


def check_mask(name: str, mask: Any, shape: Sequence[int], device: torch.device) -> None:
    """Raise for an explicit mask of the wrong type, shape or device, or one that requires grad."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in _checks.DTYPES:
        raise TypeError(f"{name}: mask must be bool, or 0 and 1 in a floating dtype, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name}: mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name}: mask must be on the student's device, got {mask.device} and {device}")
    if mask.requires_grad:
        raise ValueError(f"{name}: mask must not require grad, as no gradient is computed for it")


def check_seed(name: str, seed: Any, device: torch.device) -> None:
    """Raise for a seed that is not a single int64 on the device of the features."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        what = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{name}: seed must be an int64 tensor with one value, got {what}")
    if seed.device != device:
        raise ValueError(f"{name}: seed must be on the student's device, got {seed.device} and {device}")


def check_lambda(name: str, value: Any) -> float:
    """The fraction of zeroed positions, in [0, 1]."""
    value = _checks.number(name, "lambda_mgd", value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: lambda_mgd must be in [0, 1], got {value}")
    return value


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of multiplier * x; intermediate values stay below 2^63."""
    upper, lower = (multiplier >> 16) * x, (multiplier & 0xFFFF) * x
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
