# SPDX-License-Identifier: Apache-2.0
"""What the warps of a block issue, with the memory that each access touches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .launches import Launch
from .listing import Instruction, Kernel
from .thread import Step, Thread

SECTOR = 32  # bytes, which global memory moves together
_SHARED = {"LDS", "STS"}
_GLOBAL = {"LDG", "STG"}


@dataclass
class Issue:
    """An instruction that a warp issues."""

    instruction: Instruction
    wavefronts: int = 0  # of shared memory and the first-level cache, 128 bytes each
    sectors: frozenset[int] = frozenset()
    taken: bool = False  # a branch that is


class _Lane(Thread):
    """A thread that keeps the addresses of its accesses."""

    def __init__(self, kernel: Kernel, launch: Launch, block: int, rank: int) -> None:
        super().__init__(kernel, launch, block, rank)
        self.addresses: dict[int, list[int | None]] = {}  # None: not active, -1: unknown

    def decode(self, instruction: Instruction) -> Step:
        step = super().decode(instruction)
        base = instruction.opcode.split(".")[0]
        if base not in _SHARED | _GLOBAL:
            return step
        found = self.addresses.setdefault(self.at[instruction.address], [])
        guard = instruction.guard
        place = next(operand for operand in instruction.operands if "[" in operand)
        terms = re.findall(r"\[([^\[\]]*)\]", place)[-1].replace("+-", "+0-").split("+")

        def access() -> int | None:
            if self.predicate(guard) is False:
                found.append(None)
            else:
                values = [self._term(term, base in _GLOBAL) for term in terms]
                known = [value for value in values if value is not None]
                found.append(sum(known) if len(known) == len(values) else -1)
            return step()

        return access

    def _term(self, term: str, is_global: bool) -> int | None:
        if match := re.fullmatch(r"0?(-?(?:0x[0-9a-f]+|\d+))", term):
            return int(match[1], 0)
        name, *modifiers = term.split(".")
        if "64" in modifiers or (is_global and name.startswith("UR") and "U32" not in modifiers):
            return self.wide(name)
        value = self.value(name)
        scale = next((int(m[1:]) for m in modifiers if re.fullmatch(r"X\d+", m)), 1)
        return None if value is None else value * scale


def width_of(instruction: Instruction) -> int:
    """The bytes that a thread's access moves."""
    for modifier in instruction.opcode.split(".")[1:]:
        if modifier in ("64", "128", "256"):
            return int(modifier) // 8
        if modifier in ("U8", "S8"):
            return 1
        if modifier in ("U16", "S16"):
            return 2
    return 4


def shared_wavefronts(addresses: Sequence[int | None], width: int) -> int:
    """How many rows of 32 banks an access takes.

    Lanes are served in phases, as many as their widths fill rows: halves of the warp for 8 bytes,
    quarters for 16. In a phase each bank gives one word, to any number of lanes; two neighbouring
    phases take the rows of one where their words fit there.
    """
    lanes = 32 * 4 // max(width, 4)
    phases = []
    for first in range(0, 32, lanes):
        words = {
            (address + offset) // 4
            for address in addresses[first : first + lanes]
            if address is not None
            for offset in range(0, max(width, 4), 4)
        }
        phases.append(words)
    total = 0
    for i in range(0, len(phases), 2):
        rows = [_rows(words) for words in phases[i : i + 2]]
        together = _rows(set[int]().union(*phases[i : i + 2]))
        total += min(sum(rows), together if together <= max(rows) else sum(rows))
    return max(total, 1)


def _rows(words: Iterable[int]) -> int:
    banks = [0] * 32
    for word in words:
        banks[word % 32] += 1
    return max(banks)


@dataclass
class _Warp:
    lanes: list[_Lane] = field(default_factory=list)

    def issues(self) -> list[Issue]:
        path = max((lane.path for lane in self.lanes), key=len)
        code = self.lanes[0].code
        visits = [0] * len(code)
        found = []
        for position, index in enumerate(path):
            instruction = code[index]
            issue = Issue(instruction)
            if position + 1 < len(path):
                issue.taken = path[position + 1] != index + 1
            base = instruction.opcode.split(".")[0]
            if base in _SHARED | _GLOBAL:
                self._touch(issue, base, index, visits[index])
            visits[index] += 1
            found.append(issue)
        return found

    def _touch(self, issue: Issue, base: str, index: int, visit: int) -> None:
        width = width_of(issue.instruction)
        addresses: list[int | None] = []
        for lane in self.lanes:
            visited = lane.addresses.get(index, [])
            addresses.append(visited[visit] if visit < len(visited) else None)
        known = [address for address in addresses if address is not None]
        if not known:
            return
        if -1 in known:
            # An address that depends on data: as if the lanes' were contiguous.
            issue.wavefronts = max(1, 32 * width // 128)
            return
        if base in _SHARED:
            issue.wavefronts = shared_wavefronts(addresses, width)
            return
        issue.sectors = frozenset(
            sector
            for address in known
            for sector in range(address // SECTOR, (address + width - 1) // SECTOR + 1)
        )
        issue.wavefronts = -(-len(issue.sectors) * SECTOR // 128)


def trace(kernel: Kernel, launch: Launch, block: int | None = None) -> list[list[Issue]]:
    """What each warp of a block issues; by default of the middle one."""
    block = launch.blocks // 2 if block is None else block
    warps = []
    for first in range(0, launch.threads, 32):
        warp = _Warp()
        for rank in range(first, min(first + 32, launch.threads)):
            lane = _Lane(kernel, launch, block, rank)
            lane.run()
            warp.lanes.append(lane)
        warps.append(warp.issues())
    return warps
