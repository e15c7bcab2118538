"""torchvision that is installed but does not import, as PyPI's does not beside a CPU build of PyTorch."""

import importlib.util

import pytest


def skip_where_torchvision_is_broken() -> None:
    """For a test module of what imports torchvision; transformers, timm and torchmetrics do where it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        pytest.skip(f"the installed torchvision does not work with this PyTorch: {error}", allow_module_level=True)
