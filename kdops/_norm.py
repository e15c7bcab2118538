"""Per-channel normalisation: the two published conventions, their default eps and their eager reference."""

from __future__ import annotations

import torch
from torch import Tensor

#: Name of a convention -> its code in the operators' schemas.
CODES = {None: 0, "batch": 1, "pkd": 2}
#: "batch" is BatchNorm's default, "pkd" is the constant of the PKD paper's code.
DEFAULT_EPS = {None: 0.0, "batch": 1e-5, "pkd": 1e-6}


def normalise(x: Tensor, norm: str | None, eps: float) -> Tensor:
    """Normalise every channel of a Tensor[N, C, H, W] over N, H and W.

    ``"batch"``: ``(x - mean) / sqrt(var + eps)`` with the biased variance (BatchNorm without affine parameters and
    running statistics). ``"pkd"``: ``(x - mean) / (std + eps)`` with the unbiased deviation (Cao et al. 2022).
    """
    if norm is None:
        return x
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    if norm == "batch":
        variance = x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) * torch.rsqrt(variance + eps)
    return (x - mean) / (x.std(dim=(0, 2, 3), keepdim=True) + eps)


def as_accumulated(x: Tensor) -> Tensor:
    """The map in the dtype of its statistics: fp32 for half and float inputs, fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()
