"""Builds C++ with the host's compiler into a cache folder, once for every state of the sources."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-O2", "-std=c++20", "-fwrapv", "-ffp-contract=off", "-fPIC"]


def cache_folder() -> Path:
    """Where builds and compiled kernels are kept between runs."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdops-ptx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def key_of(paths: list[Path], *more: str) -> str:
    """A name for the contents of files."""
    digest = hashlib.sha256("\0".join(more).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library(name: str, sources: list[Path], headers: list[Path], flags: list[str], link: list[str]) -> Path:
    """A shared library of these sources."""
    target = cache_folder() / f"{name}-{key_of([*sources, *headers], *FLAGS, *flags, *link)}.so"
    if target.exists():
        return target

    def compiled(source: Path) -> Path:
        # Kept by themselves, so that a change of one file is compiled quickly.
        out = cache_folder() / f"{source.stem}-{key_of([source, *headers], *FLAGS, *flags)}.o"
        if not out.exists():
            made(out, ["g++", *FLAGS, *flags, "-c", str(source)])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    made(target, ["g++", "-shared", *map(str, objects)], link)
    return target


def made(target: Path, command: list[str], tail: Sequence[str] = ()) -> None:
    """Runs a compiler; two processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        part = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(part), *tail], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(part, target)


def interpreter() -> Path:
    """The interpreter's library (half a minute the first time)."""
    folder = HERE / "machine"
    return library("ptx", sorted(folder.glob("*.cpp")), sorted(folder.glob("*.h")), [], [])
