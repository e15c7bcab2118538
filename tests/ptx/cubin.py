"""What machine code tells about itself: registers, memory, and its listing, by the tools of Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Resources(NamedTuple):
    registers: int
    local: int  # bytes of local memory, which is where a compiler spills to
    shared: int  # bytes that the code itself declares


def resources(cubin: bytes) -> dict[str, Resources]:
    """Of every kernel, by its symbol."""
    found = {}
    for name, *numbers in _USAGE.findall(_said("cuobjdump", "--dump-resource-usage", cubin)):
        registers, stack, shared, local = map(int, numbers)
        found[name] = Resources(registers, stack + local, shared)
    return found


def listing(cubin: bytes) -> str:
    """Its instructions, one a line, with labels."""
    return _said("nvdisasm", "--print-code", cubin)


def _said(tool: str, option: str, cubin: bytes) -> str:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{tool} comes with triton, which is not installed")
    program = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(program), option, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr}")
    return done.stdout
