"""kdops::scale_gradients and scale_gradients_: stored gradients times grad_output, on the device, rounded once.

4 B per element in bf16 and 8 B in fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdops._triton.plan import on_device

_BLOCK = 2048


@triton.jit
def scale_kernel(source, out, go, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + i, mask=i < size, other=0.0)
    factor = tl.load(go)
    tl.store(out + i, (value.to(factor.dtype) * factor).to(value.dtype), mask=i < size)


def scale_gradients(grads: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """New tensors grads * grad_output. grad_output: one value in fp32 or fp64, read on the device."""
    with on_device(grad_output):
        return [_scaled(g, grad_output) for g in grads]


def scale_gradients_(grads: Sequence[Tensor], grad_output: Tensor) -> None:
    """The same in place, for dense tensors."""
    with on_device(grad_output):
        for grad in grads:
            _launch(grad, grad, grad_output)


def _scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    if out.stride() != grad.stride():  # with gaps or overlaps: the flat kernel needs one order for both
        grad = out.copy_(grad)
    _launch(grad, out, grad_output)
    return out


def _launch(grad: Tensor, out: Tensor, grad_output: Tensor) -> None:
    size = grad.numel()
    scale_kernel[(triton.cdiv(size, _BLOCK),)](grad, out, grad_output, size, BLOCK=_BLOCK, num_warps=8)
