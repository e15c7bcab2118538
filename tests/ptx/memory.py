"""What memory kernels may touch: PyTorch's CPU allocations, made by an allocator that knows them all."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from . import build


@lru_cache(maxsize=1)
def _library() -> C.CDLL:
    root = Path(torch.__file__).parent
    flags = [f"-I{root / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10"]
    key = f"-DTORCH_{''.join(c if c.isalnum() else '_' for c in torch.__version__)}"  # one build for each version
    library = C.CDLL(str(build.library("allocator", [build.HERE / "host" / "allocator.cpp"], [], [*flags, key], link)))
    library.allocator_list.restype = C.c_int64
    library.allocator_list.argtypes = [C.c_void_p, C.c_int64]
    return library


def install() -> None:
    """From now on PyTorch allocates so. Nothing fills fresh memory, so that reading it shows."""
    _library().allocator_install()
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def held() -> Iterator[None]:
    """What is freed inside stays allocated until the end, as in the memory pool of a CUDA graph."""
    _library().allocator_hold(1)
    try:
        yield
    finally:
        _library().allocator_hold(0)


def allocations() -> list[tuple[int, int]]:
    """Begin and end of everything that is allocated now."""
    room = 4096
    while True:
        table = np.empty((room, 2), np.uint64)
        count = _library().allocator_list(table.ctypes.data, room)
        if count <= room:
            return [(int(begin), int(end)) for begin, end in table[:count]]
        room = 2 * count
