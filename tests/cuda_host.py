"""The CUDA kernels on the CPU: builds them against the host shim and calls them as operators on CPU tensors."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
BLOCK, CLUSTER, WAVES, CHANNELS_LAST = 1, 2, 3, 4


class LaunchRecord(NamedTuple):
    blocks: int
    cluster: int
    cooperative: int
    shared_bytes: int


class Shim:
    """The loaded library: operators under torch.ops.kdops_shim, and the made-up device."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        for name in ("shim_loaded", "shim_stored"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.shim_launches.restype = ctypes.c_char_p
        self.ops = torch.ops.kdops_shim

    def device(self, architecture: int = 90, multiprocessors: int = 4, shared: int = 227 << 10, l2: int = 50 << 20) -> None:
        self._library.shim_set_device(architecture, multiprocessors, shared, l2)

    def order(self, seed: int) -> None:
        """In which order threads take turns: 0 first come first served, else random."""
        self._library.shim_set_order(seed)

    def reset(self) -> None:
        self._library.shim_reset()

    @property
    def bytes(self) -> tuple[int, int]:
        """Loaded from and stored to the maps since the last reset."""
        return self._library.shim_loaded(), self._library.shim_stored()

    @property
    def launches(self) -> list[LaunchRecord]:
        text = self._library.shim_launches().decode()
        return [LaunchRecord(*map(int, launch.split(","))) for launch in text.split(";") if launch]


@lru_cache(maxsize=1)
def shim() -> Shim:
    """Builds the shim (half a minute the first time) and loads it."""
    sources = [ROOT / "csrc/cuda" / name for name in ("ops.cpp", "call.cpp", "plan.cpp")]
    sources += [ROOT / "tests/cuda_shim" / name for name in ("shim.cpp", "kernels.cpp")]
    path = cpp_extension.load(
        name="kdops_shim",
        sources=[str(s) for s in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/cuda_shim")],
        extra_cflags=["-O2", "-g0", "-DKDOPS_HOST_SHIM", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-ffp-contract=off"],
        is_python_module=False,
        is_standalone=False,
        verbose=False,
    )
    return Shim(path)


def run(op: str, student: list, teacher: list, *parameters: Any, path: int, save: int) -> tuple:
    """One forward: loss, stats, grads."""
    return getattr(shim().ops, f"{op}_cuda")(student, teacher, *parameters, save, path)
