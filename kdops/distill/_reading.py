"""Reading a checkpoint: code that it brings along is run only where that is asked for."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint"]

_REFUSED = re.compile(r"[Uu]nsupported (?:global: GLOBAL|class) (?P<name>[\w.]+)|[Uu]nsupported operand")


def read_checkpoint(path: Path, allow_pickle: bool) -> Mapping[Any, Any]:
    """Return what ``torch.save`` wrote, on the CPU; tensors are read from the file when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or needs what is not allowed or not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"student_checkpoint: there must be a file to read, got no file at {path}")
    zipped = zipfile.is_zipfile(path)
    if not zipped:
        _check_start(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=zipped)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"student_checkpoint: {path} needs a class that cannot be imported here ({error}): "
            "install the package that wrote it"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, struct.error) as error:
        refused = _REFUSED.search(str(error))
        if allow_pickle or refused is None:
            raise _no_checkpoint(path, _first_sentence(error)) from error
        what = refused["name"] or "a pickle of another kind"
        raise ValueError(
            f"student_checkpoint: {path} holds more than tensors and plain values ({what}), as checkpoints of "
            "OpenMMLab do. Reading it can run any code that is in it: if you trust where it comes from, pass "
            "allow_pickle=True (--allow-pickle)"
        ) from error
    if not isinstance(content, Mapping):
        raise _no_checkpoint(path, f"it holds a {type(content).__name__}, not a dict")
    return content


def _check_start(path: Path) -> None:
    """Refuse what does not start as a pickle of protocol 2 or later does; before torch 1.6 a checkpoint was one."""
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        raise _no_checkpoint(path, "a zip archive that is cut off")
    if start[:1] != b"\x80":
        raise _no_checkpoint(path, "neither a zip archive nor a pickle")


def _no_checkpoint(path: Path, why: str) -> ValueError:
    return ValueError(f"student_checkpoint: the file must be a checkpoint written by torch.save, got {path}: {why}")


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0]
