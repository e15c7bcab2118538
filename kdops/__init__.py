"""kdops: fused feature-distillation losses for PyTorch detectors."""

from kdops.cwd_loss import CWDLoss, cwd_loss
from kdops.pkd_loss import PKDLoss, pkd_loss

__version__ = "0.1.0"

__all__ = ["CWDLoss", "PKDLoss", "cwd_loss", "pkd_loss"]
