# SPDX-License-Identifier: Apache-2.0
"""How long blocks take on a multiprocessor, by the schedule that the compiler wrote into the code.

Each scheduler issues at most one instruction a clock, of the oldest of its warps that may: in
order, after the stall count of the instruction before and when the scoreboards that it waits for
are free. Shared accesses take one pipe of the multiprocessor, a wavefront a clock, and so do the
accesses to global memory, whose sectors then take their share of the memory's bandwidth unless the
block has accessed them before. The second-level cache is not modelled beyond that, nor are the
instructions' fetch and the register banks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .listing import Kernel
from .machine import Device
from .trace import SECTOR, Issue

# Clocks for which an instruction of a warp keeps a unit of its scheduler busy.
_FLOATING = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FMUL2", "FADD2"}
_INTEGER = {
    *("IADD3", "LOP3", "SHF", "SEL", "FSEL", "FMNMX", "ISETP", "FSETP", "PRMT", "LEA", "VIADD"),
    *("PLOP3", "IMNMX", "VIMNMX", "MOV", "P2R", "R2P", "FSWZADD", "LOP", "VIADDMNMX", "F2FP"),
}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND"}
_DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}


def unit(opcode: str, architecture: int) -> tuple[str, int]:
    """The unit of a scheduler that an instruction takes, and for how many clocks."""
    if opcode in _SPECIAL:
        return "special", 8
    if opcode in _FLOATING:
        return "floating", 2 if architecture in (75, 80) else 1
    if opcode in _INTEGER:
        return "integer", 2
    if opcode in _DOUBLE:
        return "double", 2 if architecture in (80, 90, 100) else 64
    return "", 0


@dataclass
class Run:
    """Blocks on one multiprocessor, until the last has ended."""

    clocks: int
    issued: int
    wavefronts: int
    bytes: int  # that the memory moved


@dataclass
class _Decoded:
    stall: int
    sets: int
    frees: int
    waits: tuple[int, ...]
    unit: str
    busy: int
    kind: str  # shared, load, store, barrier or ""
    latency: int
    wavefronts: int
    sectors: frozenset[int]


def _decoded(issue: Issue, kernel: Kernel, device: Device) -> _Decoded:
    instruction = issue.instruction
    base = instruction.opcode.split(".")[0]
    control = instruction.control
    name, busy = unit(base, kernel.architecture)
    kinds = {"LDS": "shared", "STS": "shared", "SHFL": "shared", "LDG": "load", "STG": "store"}
    kind = kinds.get(base, "")
    if base == "BAR" and "SYNC" in instruction.opcode:
        kind = "barrier"
    latency = device.latencies.get({"STS": "LDS"}.get(base, base), device.latencies["other"])
    waits = tuple(i for i in range(6) if control.waits >> i & 1)
    if base == "DEPBAR" and (board := instruction.operands[0]).startswith("SB"):
        waits = (*waits, int(board[2:]))
    stall = max(1, control.stall) + (device.latencies["BRA"] if issue.taken else 0)
    # Scoreboards 6 and 7 are ones that nobody waits for.
    return _Decoded(
        stall,
        7 if control.sets is None else control.sets,
        6 if control.frees is None else control.frees,
        waits,
        name,
        busy,
        kind,
        latency,
        1 if base == "SHFL" else issue.wavefronts,
        issue.sectors,
    )


class _Warp:
    def __init__(self, program: list[_Decoded], block: _Block, start: int) -> None:
        self.program = program
        self.block = block
        self.at = 0
        self.ready = start
        self.boards = [0] * 8
        self.waiting = False

    def earliest(self, units: dict[str, int]) -> int:
        following = self.program[self.at]
        ready = self.ready
        for board in following.waits:
            if self.boards[board] > ready:
                ready = self.boards[board]
        if following.unit and units[following.unit] > ready:
            ready = units[following.unit]
        return ready


class _Block:
    def __init__(self, warps: int) -> None:
        self.warps: list[_Warp] = []
        self.count = warps
        self.arrived = 0
        self.seen: set[int] = set()


_NEVER = 10**15


class _Multiprocessor:
    def __init__(self, kernel: Kernel, device: Device) -> None:
        self.kernel = kernel
        self.device = device
        self.schedulers: list[list[_Warp]] = [[] for _ in range(device.schedulers)]
        names = ("special", "floating", "integer", "double")
        self.units = [dict.fromkeys(names, 0) for _ in range(device.schedulers)]
        self.next_time = [0] * device.schedulers
        self.shared = 0
        self.memory = 0.0
        self.run = Run(0, 0, 0, 0)

    def add_blocks(self, warps: Sequence[list[Issue]], blocks: int) -> None:
        decoded: dict[int, _Decoded] = {}
        programs = []
        for issues in warps:
            program = []
            for issue in issues:
                found = decoded.get(id(issue))
                if found is None:
                    found = decoded[id(issue)] = _decoded(issue, self.kernel, self.device)
                program.append(found)
            programs.append(program)
            self.run.issued += blocks * len(issues)
        index = 0
        for _ in range(blocks):
            block = _Block(len(programs))
            for program in programs:
                # The blocks of a launch start some clocks apart.
                warp = _Warp(program, block, 37 * index)
                block.warps.append(warp)
                self.schedulers[index % len(self.schedulers)].append(warp)
                index += 1

    def simulate(self) -> Run:
        while True:
            clock = min(self.next_time)
            if clock >= _NEVER:
                return self.run
            scheduler = self.next_time.index(clock)
            self._step(scheduler, clock)

    def _step(self, scheduler: int, clock: int) -> None:
        units, warps = self.units[scheduler], self.schedulers[scheduler]
        soonest = _NEVER
        for warp in warps:
            if warp.waiting:
                continue
            earliest = warp.earliest(units)
            if earliest <= clock:
                self._issue(warp, scheduler, clock)
                self.next_time[scheduler] = clock + 1
                return
            soonest = min(soonest, earliest)
        self.next_time[scheduler] = soonest

    def _issue(self, warp: _Warp, scheduler: int, clock: int) -> None:
        found = warp.program[warp.at]
        if found.unit:
            self.units[scheduler][found.unit] = clock + found.busy
        result, operands = found.latency, 12
        if found.wavefronts:
            begin = max(clock, self.shared)
            self.shared = begin + found.wavefronts
            self.run.wavefronts += found.wavefronts
            result = self.shared - clock - 1 + found.latency
            operands = self.shared - clock + 8
        if found.sectors:
            result += self._move(warp.block, found, clock) - found.latency
        elif found.kind == "load":
            result = self.device.latencies["L2"]
        if found.unit == "special":
            operands = found.busy
        boards = warp.boards
        boards[found.sets] = max(boards[found.sets], clock + result)
        boards[found.frees] = max(boards[found.frees], clock + operands)
        warp.ready = clock + found.stall
        warp.at += 1
        if warp.at == len(warp.program):
            self.schedulers[scheduler].remove(warp)
            warp.block.count -= 1
            self.run.clocks = max(self.run.clocks, warp.ready)
            self._release(warp.block, clock)
        elif found.kind == "barrier":
            warp.waiting = True
            warp.block.arrived += 1
            self._release(warp.block, clock)

    def _move(self, block: _Block, found: _Decoded, clock: int) -> int:
        """The latency of an access to global memory."""
        new = found.sectors - block.seen
        if not new:
            return self.device.latencies["L2"]
        block.seen |= new
        moved = SECTOR * len(new)
        self.run.bytes += moved
        self.memory = max(self.memory, clock) + moved / self.device.bytes_per_clock
        return int(self.memory) - clock + self.device.latencies["DRAM"]

    def _release(self, block: _Block, clock: int) -> None:
        if block.arrived == 0 or block.arrived < block.count:
            return
        block.arrived = 0
        after = clock + self.device.latencies["BAR"]
        for warp in block.warps:
            if warp.waiting:
                warp.waiting = False
                warp.ready = max(warp.ready, after)
        for scheduler in range(len(self.next_time)):
            self.next_time[scheduler] = min(self.next_time[scheduler], after)


def simulate(kernel: Kernel, warps: Sequence[list[Issue]], blocks: int, device: Device) -> Run:
    """Blocks of these warps, which start together on one multiprocessor."""
    multiprocessor = _Multiprocessor(kernel, device)
    multiprocessor.add_blocks(warps, blocks)
    return multiprocessor.simulate()
