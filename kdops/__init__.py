"""kdops: fused feature-distillation losses for PyTorch detectors."""

from kdops._version import __version__
from kdops.cwd_loss import CWDLoss, cwd_loss
from kdops.pkd_loss import PKDLoss, pkd_loss



__all__ = ["__version__", "CWDLoss", "PKDLoss", "cwd_loss", "pkd_loss"]
