"""kdops: fused feature-distillation losses for PyTorch detectors."""

from kdops._version import __version__
from kdops.cwd_loss import CWDLoss, cwd_loss
from kdops.masked_generation import MaskedGeneration, masked_generation
from kdops.mgd_loss import MGDLoss, mgd_loss
from kdops.pkd_loss import PKDLoss, pkd_loss



__all__ = ["__version__", "CWDLoss", "MGDLoss", "MaskedGeneration", "PKDLoss", "cwd_loss", "masked_generation", "mgd_loss", "pkd_loss"]
