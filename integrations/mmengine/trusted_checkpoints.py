"""Importing this module lets mmengine read checkpoint files that hold more than tensors: for files that you trust.

    custom_imports = dict(imports=[..., "kdops.integrations.mmengine.trusted_checkpoints"])

Since PyTorch 2.6 torch.load reads tensors and plain values only, and mmengine 0.10 does not ask it for more. What its
Runner saves holds the log's HistoryBuffers, so no run could be resumed, nor old checkpoints be loaded. Such a file can
run any code when it is read, which is why this is asked for and not a default. Downloads are read as before.
"""
from __future__ import annotations

from typing import Any

import torch
from mmengine.runner import CheckpointLoader


def load_trusted(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint with all that its pickle holds."""
    return torch.load(filename, map_location=map_location, weights_only=False)


CheckpointLoader.register_scheme(prefixes="", loader=load_trusted, force=True)
