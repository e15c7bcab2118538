"""Loads PTX and runs its entries on memory of this process."""

from __future__ import annotations

import ctypes as C
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from . import build


class PtxError(RuntimeError):
    """A launch that did what no kernel may do; the text tells what and where."""


class _Allocation(C.Structure):
    _fields_ = [("begin", C.c_uint64), ("end", C.c_uint64)]


class _Launch(C.Structure):
    _fields_ = [
        *((name, C.c_int32 * 3) for name in ("grid", "block")),
        *((name, C.c_int32) for name in ("cluster", "cooperative", "shared_bytes", "parameter_bytes")),
        ("parameters", C.c_void_p),
        ("allocation_count", C.c_int64),
        ("allocations", C.c_void_p),
        ("seed", C.c_uint64),
        ("most_steps", C.c_int64),
        *((name, C.c_int32) for name in ("quantum", "races", "perturb", "count", "poisoned", "reversed")),
    ]


@lru_cache(maxsize=1)
def _library() -> C.CDLL:
    library = C.CDLL(str(build.interpreter()))
    for name, arguments in (
        ("ptx_load", [C.c_char_p, C.POINTER(C.c_void_p)]),
        ("ptx_describe", [C.c_void_p]),
        ("ptx_launch", [C.c_void_p, C.c_char_p, C.POINTER(_Launch)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = C.c_void_p, arguments
    for name in ("ptx_free", "ptx_unload"):
        getattr(library, name).restype, getattr(library, name).argtypes = None, [C.c_void_p]
    return library


def _text(pointer: int | None) -> str | None:
    if not pointer:
        return None
    text = C.string_at(pointer).decode(errors="replace")
    _library().ptx_free(pointer)
    return text


@dataclass
class Options:
    """How launches are run. seed 0: warps in order, each until it must wait."""

    seed: int = 0
    quantum: int = 0  # at most so many instructions between two switches of warps; 0: no bound
    races: bool = True
    perturb: bool = False  # approximate instructions are off within their documented bounds
    count: bool = False  # count what each instruction moves
    poisoned: bool = False  # fresh global memory holds the allocator's pattern
    reversed: bool = False  # of lanes that store to one address in one instruction, the lowest wins
    most_steps: int = 2_000_000_000


@dataclass
class Finding:
    """What was found at one instruction, and how often."""

    kind: str
    what: str
    count: int
    pc: int
    text: str
    file: str
    line: int
    other: dict[str, Any] | None  # the other instruction of a race

    def __str__(self) -> str:
        place = f"{os.path.basename(self.file)}:{self.line}" if self.file else f"instruction {self.pc}"
        text = f"{self.kind} (x{self.count}): {self.what}\n    at {place}: {self.text}"
        if self.other:
            file, line = os.path.basename(self.other["file"]), self.other["line"]
            other = f"{file}:{line}" if file else f"instruction {self.other['pc']}"
            text += f"\n    the other at {other}: {self.other['text']}"
        return text


@dataclass
class Result:
    """Of a launch: findings, and with Options.count what each instruction moved."""

    entry: str
    grid: tuple
    block: tuple
    shared: int
    cluster: int
    cooperative: bool
    steps: int
    same_values: int
    findings: list[Finding] = field(default_factory=list)
    instructions: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self) -> set[str]:
        return {f.kind for f in self.findings}

    def __str__(self) -> str:
        return f"{self.entry}, grid {self.grid}, block {self.block}:\n" + "\n".join(map(str, self.findings))


class Module:
    """PTX text, parsed."""

    def __init__(self, ptx: str) -> None:
        self.text = ptx
        handle = C.c_void_p()
        error = _text(_library().ptx_load(ptx.encode(), C.byref(handle)))
        if error:
            raise PtxError(f"PTX cannot be parsed: {error}")
        self._handle = handle
        self.entries: dict[str, dict[str, Any]] = json.loads(_text(_library().ptx_describe(handle)), strict=False)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _library().ptx_unload(self._handle)

    def launch(
        self,
        entry: str,
        grid: tuple,
        block: tuple,
        parameters: bytes,
        allocations: list[tuple[int, int]],
        *,
        shared: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        options: Options | None = None,
    ) -> Result:
        """Run an entry. ``parameters`` are laid out as it wants; ``allocations`` are all that it may touch.

        What is found is in the result; `checked` raises it.
        """
        options = options or Options()
        if entry not in self.entries:
            raise PtxError(f"no entry {entry}; there are {', '.join(self.entries)}")
        expected = self.entries[entry]["parameter_bytes"]
        if len(parameters) != expected:
            raise PtxError(f"{entry} takes {expected} bytes of parameters, got {len(parameters)}")
        table = (_Allocation * max(1, len(allocations)))(*allocations)
        buffer = C.create_string_buffer(bytes(parameters), max(1, len(parameters)))
        grid, block = (tuple(grid) + (1, 1, 1))[:3], (tuple(block) + (1, 1, 1))[:3]
        launch = _Launch(
            (C.c_int32 * 3)(*grid),
            (C.c_int32 * 3)(*block),
            *(cluster, int(cooperative), shared, len(parameters), C.addressof(buffer)),
            *(len(allocations), C.addressof(table), options.seed, options.most_steps, options.quantum),
            *map(int, (options.races, options.perturb, options.count, options.poisoned, options.reversed)),
        )
        text = _text(_library().ptx_launch(self._handle, entry.encode(), C.byref(launch)))
        got = json.loads(text, strict=False)
        if got["fatal"]:
            raise PtxError(f"{entry}: {got['fatal']}")
        findings = [Finding(**f) for f in got["findings"]]
        counted = (got["steps"], got["same_values"], findings, got["instructions"])
        return Result(entry, grid, block, shared, cluster, cooperative, *counted)


def checked(result: Result) -> Result:
    """The result of a launch in which nothing was found."""
    if result.findings:
        raise PtxError(str(result))
    return result
