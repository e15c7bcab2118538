"""Compiles the Triton kernels for GPUs that need not be there, and reads the resources that ptxas reports."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdops._triton import cwd_loss, pkd_loss
from kdops._triton.plan import MERGE, Group, Map, _groups
from kdops._triton.scale import scale_kernel
from kdops._triton.tiles import fill_strides, fill_table

SHARED_LIMIT = 48 * 1024  # what any architecture gives a block without asking
_POINTERS = ("table", "parts", "stats", "losses", "go", "source", "out")
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes
    loads: dict[int, int]  # bytes of a load from global memory: how many such loads the code has


def nchw(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return (c * h * w, h * w, w, 1)


def channels_last(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return (c * h * w, 1, w * c, c)


def crop(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return (c * (h + 2) * (w + 2), (h + 2) * (w + 2), w + 2, 1)


def group(shapes: tuple, strides: Any, student: torch.dtype, teacher: torch.dtype | None = None) -> Group:
    """The launch that such levels get, gradient included."""
    dtypes = (student, teacher or student, student)
    (result,) = _groups(tuple(tuple(Map(s, strides(*s), dtype, 0) for dtype in dtypes) for s in shapes))
    return result


def kernels(launch: Group, norm: int = 1) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every kernel of both losses with the constants of a launch."""
    forward = {k: v for k, v in launch.constants.items() if k != "G_MODE"}
    acc = {"ACC": launch.constants["ACC"]}
    yield cwd_loss.cwd_moments, forward
    yield cwd_loss.cwd_merge, {**acc, "NORM": norm, **MERGE}
    for split in (False, True):
        yield cwd_loss.cwd_sums, {**forward, **launch.units, "SPLIT": split, "MEAN": True}
        yield cwd_loss.cwd_online, {**forward, **cwd_loss.ONLINE, "SPLIT": split, "MEAN": True}
        yield cwd_loss.cwd_finish, {**acc, "NORMALISED": split, "MEAN": True, "ROWS": 256, "num_warps": 4}
        yield cwd_loss.cwd_gradient, {**launch.constants, **launch.units, "NORMALISED": split, "MEAN": True}
    yield pkd_loss.pkd_moments, forward
    yield pkd_loss.pkd_merge, {**acc, "NORM": norm, "MEAN": True, **MERGE}
    yield pkd_loss.pkd_gradient, {**launch.constants, **launch.units, "MEAN": True}


def flat_kernels() -> Iterator[tuple[Any, dict[str, Any]]]:
    """The kernels that know nothing of a launch."""
    yield fill_table, {"num_warps": 1}
    yield fill_strides, {"num_warps": 1}
    yield scale_kernel, {"BLOCK": 2048, "num_warps": 8}


def compiled(kernel: Any, constants: dict[str, Any], launch: Group, architecture: int) -> Resources:
    """Compile one kernel of a launch for sm_`architecture` and measure the outcome."""
    names = kernel.arg_names
    acc = "*" + _NAMES[launch.acc]
    types = {"table": "*i64", "source": "*bf16", "out": "*bf16"}
    types = {n: types.get(n, acc) if n in _POINTERS else "i64" for n in names if n not in constants}
    return measured(kernel, types, constants, architecture, aligned=("size",))  # of scale_kernel, mostly even


def measured(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, aligned: tuple[str, ...] = ()
) -> Resources:
    """The same for arguments of these types; pointers and what is named are multiples of 16."""
    if not known(architecture):
        pytest.skip(f"Triton {triton.__version__} does not know sm_{architecture}")
    options = {k: v for k, v in constants.items() if k in ("num_warps", "maxnreg")}
    constants = {k: v for k, v in constants.items() if k not in options}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    even = [i for i, n in enumerate(names) if n in aligned or signature[n].startswith("*")]
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 3):
        attributes = {(i,): [["tt.divisibility", 16]] for i in even}
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    else:
        from triton.compiler.compiler import AttrsDescriptor

        signature = {k: v for k, v in signature.items() if v != "constexpr"}
        source = ASTSource(kernel, signature, constants, AttrsDescriptor(tuple(even), ()))
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    report = _ptxas(binary.asm["ptx"])
    widths = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spilled=sum(int(x) for x in re.findall(r"(\d+) bytes spill", report)),
        shared=binary.metadata.shared,
        loads=Counter(int(vector or 1) * int(bits) // 8 for vector, bits in widths),
    )


def known(architecture: int) -> bool:
    """Whether the wheel's tools know sm_`architecture`; where ptxas does not, its LLVM would end the process."""
    return _run_ptxas(".version 7.0\n.target sm_80\n.address_size 64\n", f"sm_{architecture}")[0]


def _ptxas(ptx: str) -> str:
    """What `ptxas -v` of the triton wheel prints."""
    taken, report = _run_ptxas(ptx, re.search(r"\.target\s+(sm_\w+)", ptx).group(1))
    if not taken:
        raise RuntimeError(f"no ptxas of the triton wheel takes this kernel: {report}")
    return report


@lru_cache(maxsize=8)
def _run_ptxas(ptx: str, target: str) -> tuple[bool, str]:
    """Whether a ptxas of the wheel takes it, and its words; wheels may carry a second one for the newest targets."""
    tools = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in tools:
            command = [str(tool), "-v", f"-arch={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return True, done.stdout + done.stderr
    return False, done.stderr
