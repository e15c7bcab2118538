"""Small kernels around a few lines of PTX, for the interpreter's own tests."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from .interpreter import Module, Options, Result, checked

HEADER = ".version 8.7\n.target sm_100a\n.address_size 64\n"
REGISTERS = """
  .reg .pred %p<16>;
  .reg .b16 %h<32>;
  .reg .b32 %r<64>, %t, %lane, %warp, %block;
  .reg .b64 %d<32>, %a<8>;
"""


def source(body: str, pointers: int, declarations: str = "") -> str:
    """An entry whose pointers are in %a0, %a1 ...; %t, %lane, %warp and %block say who a thread is."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "\n".join(f"  ld.param.u64 %a{i}, [p{i}];" for i in range(pointers))
    who = "  mov.u32 %t, %tid.x;\n  mov.u32 %lane, %laneid;\n  mov.u32 %warp, %warpid;\n  mov.u32 %block, %ctaid.x;"
    return (
        f"{HEADER}\n{declarations}\n.visible .entry k({parameters})\n{{{REGISTERS}{loads}\n{who}\n{body}\n  ret;\n}}\n"
    )


def execute(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    declarations: str = "",
    shared: int = 0,
    cluster: int = 1,
    cooperative: bool = False,
    options: Options | None = None,
) -> Result:
    """Run a snippet on arrays, which it may read and write in place."""
    module = Module(source(body, len(arrays), declarations))
    assert module.entries["k"]["unsupported"] == [], module.entries["k"]["unsupported"]
    addresses = [a.ctypes.data for a in arrays]
    ranges = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]
    parameters = struct.pack(f"{len(arrays)}Q", *addresses)
    where = {"shared": shared, "cluster": cluster, "cooperative": cooperative, "options": options}
    return module.launch("k", (blocks,), (threads,), parameters, ranges, **where)


def aligned(count: int, dtype: Any, boundary: int = 128) -> np.ndarray:
    """Zeros that start at a boundary, as GPU allocations do."""
    size = np.dtype(dtype).itemsize
    whole = np.zeros(count * size + boundary, np.uint8)
    start = -whole.ctypes.data % boundary
    return whole[start : start + count * size].view(dtype)


#: Bits of a register by the size of what it holds.
_REGISTER = {1: "h", 2: "h", 4: "r", 8: "d"}


def apply(opcode: str, *operands: Any, result: Any, options: Options | None = None) -> np.ndarray:
    """An instruction on every element: ``operands`` are arrays, or text such as an immediate; ``result`` is a dtype.

    In ``opcode`` a "@" stands for the operands where they are not simply "d, a, b".
    """
    arrays = [np.ascontiguousarray(x) for x in operands if not isinstance(x, str)]
    count = arrays[0].size
    out = np.zeros(count, result)
    body, names = [f"  mov.u32 %r60, {count};", "  setp.ge.u32 %p15, %t, %r60;", "  @%p15 ret;"], []
    for i, array in enumerate(arrays):
        size = array.itemsize
        body += [f"  mul.wide.u32 %d31, %t, {size};", f"  add.u64 %d31, %d31, %a{i};"]
        names.append(f"%{_REGISTER[size]}{i + 1}")
        body.append(f"  ld.global.b{8 * size} {names[-1]}, [%d31];")
    given = iter(names)
    texts = [x if isinstance(x, str) else next(given) for x in operands]
    target = f"%{_REGISTER[out.itemsize]}0"
    line = (
        opcode.replace("@", ", ".join([target, *texts])) if "@" in opcode else f"{opcode} {target}, {', '.join(texts)};"
    )
    body += [line, f"  mul.wide.u32 %d31, %t, {out.itemsize};", f"  add.u64 %d31, %d31, %a{len(arrays)};"]
    body.append(f"  st.global.b{8 * out.itemsize} [%d31], {target};")
    threads = -(-count // 32) * 32
    checked(execute("\n".join(body), *arrays, out, threads=threads, options=options))
    return out


#: Orders of warps and lanes in which a right kernel gives the same.
ORDERS = [Options(seed=s, quantum=q) for s, q in ((0, 0), (1, 0), (2, 1), (3, 7), (4, 20))]
ordered = pytest.mark.parametrize("options", ORDERS, ids=lambda o: f"seed{o.seed}-{o.quantum}")


def buffers(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Numbers from 1, and zeros."""
    x, y = aligned(count, np.uint32), aligned(count, np.uint32)
    x[:] = np.arange(1, count + 1)
    return x, y


def kinds(body: str, *arrays: np.ndarray, **options: Any) -> set[str]:
    """What is found in a snippet."""
    return execute(body, *arrays, **options).kinds()


#: An mbarrier at [%r3] that all threads know of, shared memory at %r1; %p1 is set in thread 0. And a wait for a phase.
MBARRIER = """  .shared .align 8 .b64 full;
  .shared .align 256 .b8 s[2048];
  mov.u32 %r1, s;
  mov.u32 %r3, full;
  setp.eq.u32 %p1, %t, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r3], {count};
  @%p1 fence.mbarrier_init.release.cluster;
  bar.sync 0;
"""
WAIT = "wait{0}:\n  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], {1};\n  @!%p2 bra wait{0};\n"
