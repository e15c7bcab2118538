"""Reading a checkpoint: no code of the file's own is run unless that is asked for, and every failure is said plainly."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint"]

_REFUSED = re.compile(r"[Uu]nsupported (?:global|class|operand).*?((?:\w+\.)+\w+)", re.DOTALL)


def read_checkpoint(path: Path, allow_pickle: bool) -> Mapping[Any, Any]:
    """Return what ``torch.save`` wrote, on the CPU; tensors are read from the file when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or needs what is not allowed or not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"student_checkpoint: there must be a file to read, got no file at {path}")
    zipped = zipfile.is_zipfile(path)
    if not zipped and not _is_pickle(path):
        raise _no_checkpoint(path, "neither a zip archive nor a pickle")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=zipped)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"student_checkpoint: {path} needs a class that cannot be imported here: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        refused = _REFUSED.search(str(error))
        if allow_pickle or refused is None:
            raise _no_checkpoint(path, _first_line(error)) from error
        raise ValueError(
            f"student_checkpoint: {path} holds more than tensors and plain values ({refused[1]}), as old checkpoints "
            "of OpenMMLab do. Reading it can run any code that is in it: if you trust where it comes from, "
            "pass allow_pickle=True (--allow-pickle)"
        ) from error
    if not isinstance(content, Mapping):
        raise _no_checkpoint(path, f"it holds a {type(content).__name__}, not a dict")
    return content


def _is_pickle(path: Path) -> bool:
    """Whether the file starts as a pickle of protocol 2 or later does; before torch 1.6 a checkpoint was one."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _no_checkpoint(path: Path, why: str) -> ValueError:
    return ValueError(f"student_checkpoint: the file must be a checkpoint written by torch.save, got {path}: {why}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
