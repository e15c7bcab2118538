"""Importing this module lets mmengine load checkpoints that contain more than tensors: only for files that you trust.

    custom_imports = dict(imports=[..., "kdops.integrations.mmengine.trusted_checkpoints"])

Since PyTorch 2.6 torch.load reads only tensors and plain values by default, and mmengine 0.10 uses the default. Its
Runner saves the log's HistoryBuffers as well, so neither runs could be resumed nor old checkpoints loaded. Such a file
can run arbitrary code when it is loaded, so this is opt-in. Downloads are read as before.
"""
from __future__ import annotations

from typing import Any

import torch
from mmengine.runner import CheckpointLoader


def load_trusted(filename: str, map_location: Any = None) -> Any:
    """Load a local checkpoint with its whole pickle."""
    return torch.load(filename, map_location=map_location, weights_only=False)


CheckpointLoader.register_scheme(prefixes="", loader=load_trusted, force=True)
