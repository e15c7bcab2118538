"""The counters of kernels as rows of a CSV file, and what is worse, better, new and gone between two sets of rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kdops.files import write_atomically

PATH = Path(__file__).with_name("counters.csv")
ARCHITECTURES = (80, 90, 100)


class Limit(NamedTuple):
    """How much worse a counter may become, as a part of what it was, before a row fails."""

    below: float  # 0: no worse at all
    more_is_worse: bool = True


LIMITS = {
    "launches": Limit(0),  # of a step
    "instructions": Limit(0.05),  # of PTX, for each element of a map: a warp's for 32 of them
    "read_sectors": Limit(0.05),  # of 32 bytes of global memory, instruction by instruction
    "read_least": Limit(0.05),  # if every instruction's bytes lay side by side
    "written_sectors": Limit(0.05),
    "written_least": Limit(0.05),
    "waves": Limit(0.05),  # of shared memory
    "waves_least": Limit(0.05),  # without conflicts of banks
    "registers": Limit(0.05),
    "local_bytes": Limit(0),  # where a compiler spills to
    "shared_bytes": Limit(0.05),  # of a block
    "loop_instructions": Limit(0.05),  # of machine code, in the hot loops, for each pair of elements
    "load_bytes": Limit(0, more_is_worse=False),  # of a load in the hot loops, on average
    "store_bytes": Limit(0, more_is_worse=False),
    "loads_in_flight": Limit(0, more_is_worse=False),  # when the first of them is used, in the worst hot loop
}


class Step(NamedTuple):
    """A forward and a backward, or a part of one."""

    backend: str
    loss: str
    shape: str
    dtype: str
    layout: str
    architecture: int

    def __str__(self) -> str:
        return f"{self.backend} {self.loss} {self.shape} {self.dtype} {self.layout} sm_{self.architecture}"


@dataclass(frozen=True)
class Row:
    """All launches of a kernel in a step. What an architecture was only compiled for has no counts."""

    step: Step
    kernel: str
    compiler: str
    counters: dict[str, float] = field(hash=False)

    @property
    def key(self) -> tuple[Step, str]:
        return self.step, self.kernel


class Change(NamedTuple):
    """Of a counter; None: the row is not there."""

    step: Step
    kernel: str
    counter: str
    old: float | None
    new: float | None

    @property
    def worse(self) -> float:
        """By which part; below 0: better."""
        old, new = self.old or 0.0, self.new or 0.0
        by = new - old if LIMITS[self.counter].more_is_worse else old - new
        return by / old if old else by and float("inf") * by

    @property
    def exceeds(self) -> bool:
        return self.worse > 0 and self.worse >= LIMITS[self.counter].below

    def __str__(self) -> str:
        part = f" ({(self.new or 0) / self.old - 1:+.1%})" if self.old else ""
        return f"{self.kernel:22} {self.counter:18} {shown(self.old)} -> {shown(self.new)}{part}"


@dataclass
class Comparison:
    """Of stored rows with fresh ones of some of their steps."""

    failures: list[Change] = field(default_factory=list)
    reports: list[Change] = field(default_factory=list)  # would fail, but another compiler made the stored row
    others: list[Change] = field(default_factory=list)
    compilers: set[tuple[str, str]] = field(default_factory=set)  # stored and fresh, where they differ

    @property
    def all(self) -> list[Change]:
        return [*self.failures, *self.reports, *self.others]

    @property
    def differs(self) -> str:
        """Which compilers the rows come from, where they are not the same."""
        return "; ".join(f"rows of {old} compared with {new}" for old, new in sorted(self.compilers))


def compare(old: Iterable[Row], new: Iterable[Row]) -> Comparison:
    """Steps that have not been counted afresh are left out; a kernel that is not stored is so many launches more."""
    fresh = {row.key: row for row in new}
    steps = {step for step, _ in fresh}
    stored = {row.key: row for row in old if row.step in steps}
    compiler_of = {row.step: row.compiler for row in stored.values()}
    result = Comparison()
    for key in [*stored, *(key for key in fresh if key not in stored)]:
        before, now = stored.get(key), fresh.get(key)
        compilers = (compiler_of.get(key[0], ""), now.compiler if now else compiler_of[key[0]])
        same = compilers[0] in ("", compilers[1])
        if not same:
            result.compilers.add(compilers)
        for change in _changes(key, before, now):
            chosen = (result.failures if same else result.reports) if change.exceeds else result.others
            chosen.append(change)
    return result


def _changes(key: tuple[Step, str], before: Row | None, now: Row | None) -> list[Change]:
    if before is None or now is None:
        old, new = (row.counters.get("launches", 1) if row else None for row in (before, now))
        return [Change(*key, "launches", old, new)]
    names = [name for name in LIMITS if name in before.counters and name in now.counters]
    changes = [Change(*key, name, before.counters[name], now.counters[name]) for name in names]
    return [change for change in changes if change.old != change.new]


def totals(rows: Iterable[Row]) -> list[Row]:
    """What the kernels of each step count together."""
    steps: dict[Step, list[Row]] = {}
    for row in rows:
        steps.setdefault(row.step, []).append(row)
    names = [name for name in LIMITS if name.endswith("_sectors") or name in ("launches", "instructions", "waves")]
    return [
        Row(step, "all", each[0].compiler, {name: sum(row.counters[name] for row in each) for name in names})
        for step, each in steps.items()
        if all("launches" in row.counters for row in each)
    ]


def shown(value: float | None) -> str:
    """A counter to read."""
    return "none" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def read(path: Path = PATH) -> list[Row]:
    """The rows of a file."""
    with path.open(newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    step = Step(*(line[name] for name in Step._fields[:-1]), int(line["architecture"]))
    counters = {name: float(line[name]) for name in LIMITS if line[name]}
    return Row(step, line["kernel"], line["compiler"], counters)


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Put rows into a file, sorted."""
    ordered = sorted(rows, key=lambda row: row.key)

    def fill(part: Path) -> None:
        with part.open("w", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow([*Step._fields, "kernel", "compiler", *LIMITS])
            for row in ordered:
                counters = [f"{row.counters[n]:.10g}" if n in row.counters else "" for n in LIMITS]
                out.writerow([*row.step, row.kernel, row.compiler, *counters])

    write_atomically(path, fill)
