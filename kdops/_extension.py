"""Loads the compiled extension ``kdops._C``: None if it was not built, ImportError if it does not load."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def _load() -> ModuleType | None:
    if importlib.util.find_spec("kdops._C") is None:
        return None
    try:
        from kdops import _C
    except ImportError as error:
        raise ImportError(
            "kdops: the compiled extension kdops._C does not load. Most likely it was built for another PyTorch: "
            "reinstall kdops with 'pip install --no-build-isolation --force-reinstall --no-deps .' "
            f"(the loader's error: {error})"
        ) from error
    return _C


extension: ModuleType | None = _load()


def build_info() -> dict[str, str] | None:
    """What ``kdops._C`` was built with, or None if it was not built."""
    return None if extension is None else dict(extension.build_info())
