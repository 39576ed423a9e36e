# SPDX-License-Identifier: Apache-2.0
"""Executes one thread of a launch on a kernel's machine code.

Only integers and predicates are computed, from the launch's parameters: the control flow of these
kernels depends on nothing else. Values from memory or floating point are unknown (None), and so is
what is computed of them; a branch on them is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from . import arithmetic
from .launches import Launch
from .listing import Instruction, Kernel

MASK = 0xFFFFFFFF
Value = int | None
Step = Callable[[], int | None]  # the index of the next instruction, if it is not the next one

# Where the parameters begin in constant bank 0.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 75: 0x160, 90: 0x210}
# Opcodes without a result that do not branch.
NO_RESULT = {
    *("ST", "STG", "STS", "STL", "RED", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR"),
    *("LDGDEPBAR", "LDGSTS", "MEMBAR", "ERRBAR", "YIELD", "CCTL", "ENDCOLLECTIVE", "BMOV"),
}


class UnknownBranchError(Exception):
    """The thread's control flow depends on unknown values."""


class Thread:
    """One thread of a launch."""

    def __init__(self, kernel: Kernel, launch: Launch, block: int, rank: int) -> None:
        self.registers: dict[str, Value] = {"RZ": 0, "URZ": 0}
        self.predicates: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.read: dict[str, Callable[[], Value]] = {}
        grid, shape = launch.grid, launch.block
        self.special = {
            "SR_TID.X": rank % shape[0],
            "SR_TID.Y": rank // shape[0] % shape[1],
            "SR_TID.Z": rank // shape[0] // shape[1],
            "SR_CTAID.X": block % grid[0],
            "SR_CTAID.Y": block // grid[0] % grid[1],
            "SR_CTAID.Z": block // grid[0] // grid[1],
            "SR_LANEID": rank % 32,
            "SR_CgaCtaId": 0,
            "SRZ": 0,
        }
        first = PARAMETERS[kernel.architecture]
        self.constants = bytearray(first) + launch.parameters
        for i, size in enumerate((*shape, *grid)):
            self.constants[4 * i : 4 * i + 4] = size.to_bytes(4, "little")
        self.at = {instruction.address: i for i, instruction in enumerate(kernel.code)}
        self.code = kernel.code
        self.steps: list[Step | None] = [None] * len(kernel.code)
        self.path: list[int] = []

    def run(self, limit: int = 2_000_000) -> None:
        """Executes until the thread returns, and keeps the indices of its instructions."""
        index = 0
        for _ in range(limit):
            self.path.append(index)
            step = self.steps[index]
            if step is None:
                step = self.steps[index] = self.decode(self.code[index])
            following = step()
            if following is None:
                index += 1
            elif following < 0:
                return
            else:
                index = following
        raise UnknownBranchError(f"no end after {limit} instructions")

    # Operands

    def value(self, operand: str) -> Value:
        """A 32-bit operand with its sign or complement."""
        read = self.read.get(operand)
        if read is None:
            read = self.read[operand] = self._reader(operand, self._word, MASK)
        return read()

    def wide(self, operand: str) -> Value:
        """A 64-bit operand: a pair of registers, or constants."""
        return self._reader(operand, self._pair, (1 << 64) - 1)()

    def _reader(
        self, operand: str, read: Callable[[str], Callable[[], Value]], mask: int
    ) -> Callable[[], Value]:
        sign, name = arithmetic.split_sign(operand)
        plain = read(name)
        if sign == "":
            return plain

        def signed() -> Value:
            found = plain()
            return None if found is None else (-found if sign == "-" else ~found) & mask

        return signed

    def _word(self, name: str) -> Callable[[], Value]:
        if re.fullmatch(r"U?R(\d+|Z)", name):
            # Nothing depends on a register that has not been written.
            return lambda: self.registers.get(name, 0)
        if match := re.fullmatch(r"c\[0x0\]\[(.*)\]", name):
            place = match[1]
            return lambda: self.constant(place, 4)
        if re.fullmatch(r"[+-]?(0x[0-9a-f]+|\d+)", name):
            number = int(name, 0) & MASK
            return lambda: number
        return lambda: None

    def _pair(self, name: str) -> Callable[[], Value]:
        if match := re.fullmatch(r"(U?R)(\d+)", name):
            read_low, read_high = self._word(name), self._word(f"{match[1]}{int(match[2]) + 1}")

            def pair() -> Value:
                low, high = read_low(), read_high()
                return None if low is None or high is None else high << 32 | low

            return pair
        if match := re.fullmatch(r"c\[0x0\]\[(.*)\]", name):
            place = match[1]
            return lambda: self.constant(place, 8)
        return self._word(name)

    def constant(self, place: str, size: int) -> Value:
        """What is in constant bank 0 at "0x210", "R4+0x210" or "UR4"."""
        offset = 0
        for part in place.split("+"):
            word = self.value(part)
            if word is None:
                return None
            offset += word
        if offset + size > len(self.constants):
            return None
        return int.from_bytes(self.constants[offset : offset + size], "little")

    def predicate(self, operand: str) -> bool | None:
        found = self.predicates.get(operand.lstrip("!"))
        return found if found is None or not operand.startswith("!") else not found

    def set(self, name: str, value: Value, words: int = 1) -> None:
        match = re.fullmatch(r"(U?R)(\d+)", name)
        if match is None:
            return
        for i in range(words):
            word = None if value is None else value >> 32 * i & MASK
            self.registers[f"{match[1]}{int(match[2]) + i}"] = word

    def set_predicate(self, name: str, value: bool | None) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = value

    # Instructions

    def decode(self, instruction: Instruction) -> Step:
        base, *modifiers = instruction.opcode.split(".")
        jump = getattr(self, f"_jump_{base.lower()}", None)
        guard = instruction.guard
        if jump is not None:

            def step() -> int | None:
                taken = self.predicate(guard)
                if taken is None:
                    raise UnknownBranchError(
                        f"{instruction.opcode} at 0x{instruction.address:x} depends on data"
                    )
                following: int | None = jump(instruction) if taken else None
                return following

            return step
        if base in NO_RESULT:
            return lambda: None
        operands = [operand.removesuffix(".reuse") for operand in instruction.operands]
        written = arithmetic.results(base, modifiers, operands)
        compute = arithmetic.find(base)
        if compute is None and guard == "PT":
            return partial(self._forget, written)

        def act() -> None:
            taken = self.predicate(guard)
            if taken is False:
                return
            if taken is None or compute is None:
                self._forget(written)
            else:
                compute(self, modifiers, operands)

        return act

    def _forget(self, written: list[str]) -> None:
        for name in written:
            (self.predicates if "P" in name else self.registers)[name] = None

    def _jump_bra(self, instruction: Instruction) -> int | None:
        *conditions, target = instruction.operands
        if "DIV" in instruction.opcode:
            return None
        taken = [self.predicate(condition) for condition in conditions]
        if None in taken:
            raise UnknownBranchError(f"BRA at 0x{instruction.address:x} depends on data")
        return self.at[int(target, 16)] if all(taken) else None

    def _jump_call(self, instruction: Instruction) -> int:
        return self.at[int(instruction.operands[-1], 16)]

    def _jump_ret(self, instruction: Instruction) -> int:
        target = self.value(instruction.operands[0].split()[0])
        if target is None:
            raise UnknownBranchError(f"RET at 0x{instruction.address:x} depends on data")
        return self.at[target]

    def _jump_exit(self, instruction: Instruction) -> int:
        return -1
