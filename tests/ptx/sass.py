"""Reads nvdisasm's listings: the loops of a kernel, what they load and store, and how many loads are under way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_FUNCTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\S*):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)(?:\s+(.*?))?\s*;")
_TARGET = re.compile(r"`\((\S+?)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")


class Instruction(NamedTuple):
    opcode: str  # with its suffixes
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That an access moves for each lane."""
        suffixes = self.opcode.split(".")
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((size for suffix, size in sizes.items() if suffix in suffixes), 4)

    @property
    def registers(self) -> set[int]:
        """That it names; those of a pair or a quad which it does not name are not here."""
        return set(map(int, _REGISTER.findall(self.operands)))

    @property
    def loaded(self) -> set[int]:
        """Registers that a load from global memory fills."""
        first = _REGISTER.match(self.operands)
        if self.name != "LDG" or first is None:
            return set()
        return set(range(int(first.group(1)), int(first.group(1)) + max(1, self.bytes // 4)))


class Code(NamedTuple):
    """Of a kernel, or of one of its loops without the loops inside it."""

    instructions: list[Instruction]
    repeats: bool

    @property
    def loads(self) -> list[int]:
        """Bytes of each load of data: from global memory, or several words at once from shared memory.

        Single words in shared memory are statistics and partial sums.
        """
        return [i.bytes for i in self.instructions if i.name == "LDG" or (i.name == "LDS" and i.bytes > 4)]

    @property
    def stores(self) -> list[int]:
        """Bytes of each store to global memory."""
        return [i.bytes for i in self.instructions if i.name == "STG"]

    @property
    def loads_in_flight(self) -> int | None:
        """The most loads from global memory to registers that are under way when one of them is first used.

        A loop is gone through twice, since a load may be used in the next iteration. None: it has no such loads.
        """
        under_way: list[set[int]] = []
        most = None
        for instruction in self.instructions * (1 + self.repeats):
            if any(load & instruction.registers for load in under_way):
                most = max(most or 0, len(under_way))
                under_way = [load for load in under_way if not load & instruction.registers]
            if instruction.loaded:
                under_way.append(instruction.loaded)
        return most


class Function(NamedTuple):
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[range]:
        """From each label to the last branch back to it."""
        ends: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
            first = self.labels.get(target.group(1), i + 1) if target else i + 1
            if first <= i:
                ends[first] = i + 1
        return [range(first, end) for first, end in sorted(ends.items())]

    def hot(self) -> list[Code]:
        """The loops that load more than half as many bytes an iteration as the one that loads most, in widest loads.

        A loop counts without those inside it; it is no hot loop where one inside it is. That leaves out the loops for
        what remains of a row, and those around a hot one. All of the code, where nothing is loaded in a loop.
        """
        loops = sorted(self.loops(), key=len)
        codes = [Code([self.instructions[i] for i in self._own(loop, loops)], True) for loop in loops]
        widest = max((max(code.loads, default=0) for code in codes), default=0)
        if widest == 0:
            return [Code(self.instructions, False)]
        counts = [code.loads.count(widest) for code in codes]
        chosen: list[tuple[range, Code]] = []
        for loop, code, count in zip(loops, codes, counts):
            around = any(loop.start <= inner.start and inner.stop <= loop.stop for inner, _ in chosen)
            if 2 * count > max(counts) and not around:
                chosen.append((loop, code))
        return [code for _, code in sorted(chosen, key=lambda pair: pair[0].start)]

    @staticmethod
    def _own(loop: range, loops: list[range]) -> Iterator[int]:
        inner = [x for x in loops if x != loop and loop.start <= x.start and x.stop <= loop.stop]
        return (i for i in loop if not any(i in x for x in inner))


def functions(listing: str) -> dict[str, Function]:
    """Every kernel of a listing by its symbol."""
    found: dict[str, Function] = {}
    current = None
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            current = found[match.group(1)] = Function(match.group(1), [], {})
        elif current is None:
            continue
        elif match := _LABEL.match(line):
            current.labels[match.group(1)] = len(current.instructions)
        elif match := _INSTRUCTION.match(line):
            current.instructions.append(Instruction(match.group(2), match.group(3) or ""))
    return found
