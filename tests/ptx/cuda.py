"""The CUDA kernels as PTX: nvcc compiles them, the host shim of tests/cuda_shim hands every launch over."""

from __future__ import annotations

import ctypes as C
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest

from . import build, mode
from .interpreter import Module

_ROOT = build.HERE.parent.parent
_LAUNCHER = C.CFUNCTYPE(C.c_void_p, C.c_char_p, *[C.c_int] * 5, C.c_void_p, C.c_int)
_said: list = []  # the text of the last failure, alive until the shim has copied it


def _compiled(source: Path, target: str) -> str:
    headers = [p for p in (_ROOT / "csrc").rglob("*.h")]
    out = build.cache_folder() / f"{source.stem}-{target}-{build.key_of([source, *headers])}.ptx"
    if not out.exists():
        flags = ["-ptx", "-std=c++17", "-O3", "-lineinfo", f"-arch={target}", f"-I{_ROOT / 'csrc'}"]
        build.made(out, ["nvcc", *flags, str(source)])
    return out.read_text()


def texts(target: str) -> list[str]:
    """The PTX of every file with kernels."""
    sources = [s for s in sorted((_ROOT / "csrc/cuda").glob("*.cu")) if s.stem != "launch"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda s: _compiled(s, target), sources))


@lru_cache(maxsize=1)
def _entries() -> dict[str, Module]:
    """Every kernel by its symbol. The simulated device of the shim has clusters, so the target is sm_90 at least."""
    target = "sm_90a" if mode.architecture in (80, 90) else f"sm_{mode.architecture}"
    modules = [Module(text) for text in texts(target)]
    return {entry: module for module in modules for entry in module.entries}


@_LAUNCHER
def _launch(
    kernel: bytes, blocks: int, threads: int, shared: int, cluster: int, cooperative: int, problem: int, size: int
):
    try:
        name = kernel.decode()
        where = {"shared": shared, "cluster": cluster, "cooperative": bool(cooperative)}
        mode.launch(_entries()[name], name, (blocks,), (threads,), C.string_at(problem, size), **where)
        return None
    except Exception as error:  # nothing may pass through C++ that is not its own
        _said[:] = [C.create_string_buffer(f"{type(error).__name__}: {error}".encode())]
        return C.addressof(_said[0])


def take_over(shim: C.CDLL) -> None:
    """From now on the shim's launches are interpreted."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    mode.options.count = True
    _entries()
    shim.shim_set_launcher(C.cast(_launch, C.c_void_p))


def bytes_moved() -> tuple[int, int]:
    """Loaded from and stored to the maps, which alone are read and written with these instructions."""
    loads, stores = ("cp.async.cg", "ld.global.nc"), ("st.global.cs",)
    return _bytes_of(loads), _bytes_of(stores)


def _bytes_of(opcodes: tuple[str, ...]) -> int:
    instructions = [i for result in mode.results for i in result.instructions]
    return sum(i["bytes"] for i in instructions if any(opcode in i["text"] for opcode in opcodes))


def order(seed: int) -> None:
    """As the shim's orders: 0 first come first served; others random, some in small steps."""
    mode.options.seed, mode.options.quantum = seed, (0, 40)[seed % 2]
