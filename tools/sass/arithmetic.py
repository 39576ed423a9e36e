# SPDX-License-Identifier: Apache-2.0
"""The integer and predicate instructions that a thread's control flow depends on."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .thread import Thread, Value

MASK = 0xFFFFFFFF
Compute = Callable[["Thread", list[str], list[str]], None]

_compute: dict[str, Compute] = {}


def find(base: str) -> Compute | None:
    """The function of an opcode, on uniform registers too; None for one that is not computed."""
    return _compute.get(base) or _compute.get(base.removeprefix("U"))


def opcode(*names: str) -> Callable[[Compute], Compute]:
    def register(function: Compute) -> Compute:
        _compute.update(dict.fromkeys(names, function))
        return function

    return register


def results(base: str, modifiers: Sequence[str], operands: list[str]) -> list[str]:
    """The predicates and registers that an instruction writes."""
    words = 1
    if "128" in modifiers:
        words = 4
    elif base[0] == "D" or base == "CS2R" or {"64", "WIDE", "F64", "U64"} & {*modifiers}:
        words = 2
    found: list[str] = []
    for operand in operands:
        if match := re.fullmatch(r"(U?R)(\d+)", operand):
            return found[:2] + [f"{match[1]}{int(match[2]) + i}" for i in range(words)]
        if not re.fullmatch(r"U?P\w", operand):
            break
        if operand[-1] != "T":
            found.append(operand)
    # What follows the two predicates of a comparison are its inputs.
    return found[:2]


def split_sign(operand: str) -> tuple[str, str]:
    """A register's or constant's sign or complement, and the rest; an immediate keeps its sign."""
    if operand[0] in "-~" and not operand[1].isdigit():
        return operand[0], operand[1:]
    if operand.startswith("|"):
        return "", "unknown"
    return "", operand


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _split_predicates(operands: list[str]) -> tuple[list[str], str, list[str]]:
    """Leading predicates (carries out), the destination, and the rest."""
    first = 0
    while re.fullmatch(r"U?P\w", operands[first]):
        first += 1
    if first > 0:
        return operands[:first], operands[first], operands[first + 1 :]
    last = 1
    while re.fullmatch(r"U?P\w", operands[last]):
        last += 1
    return operands[1:last], operands[0], operands[last:]


def _addend(thread: Thread, operand: str) -> Value:
    """A term of a sum with carries: -R is ~R + 1, which can carry."""
    sign, name = split_sign(operand)
    value = thread.value(name)
    if value is None:
        return None
    return value if sign == "" else (~value & MASK) + (sign == "-")


def _add(
    thread: Thread, destination: str, carries: list[str], terms: list[Value], words: int = 1
) -> None:
    known = [term for term in terms if term is not None]
    total = sum(known) if len(known) == len(terms) else None
    thread.set(destination, total, words)
    for i, carry in enumerate(carries):
        thread.set_predicate(carry, None if total is None else total >> 32 * words > i)


@opcode("IADD3")
def _iadd3(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    carries, destination, sources = _split_predicates(operands)
    terms = [_addend(thread, source) for source in sources[:3]]
    if "X" in modifiers:
        terms += [thread.predicate(source) for source in sources[3:]]
    _add(thread, destination, carries, terms)


@opcode("VIADD")
def _viadd(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    _add(thread, operands[0], [], [thread.value(operand) for operand in operands[1:3]])


@opcode("IMAD")
def _imad(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    carries, destination, (a, b, c, *carry_in) = _split_predicates(operands)
    factors = [thread.value(a), thread.value(b)]
    wide = "WIDE" in modifiers or "HI" in modifiers
    added = thread.wide(c) if wide else thread.value(c)
    product: Value = None
    if 0 in factors:
        product = 0
    elif factors[0] is not None and factors[1] is not None:
        if wide and "U32" not in modifiers:
            product = _signed(factors[0]) * _signed(factors[1]) & (1 << 64) - 1
        else:
            product = factors[0] * factors[1]
    if "HI" in modifiers:
        known = product is not None and added is not None
        thread.set(destination, (product + added) >> 32 if known else None)  # type: ignore[operator]
        return
    terms = [product, added]
    if "X" in modifiers:
        terms += [thread.predicate(operand) for operand in carry_in]
    _add(thread, destination, carries, terms, 2 if wide else 1)


@opcode("LEA")
def _lea(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    carries, destination, sources = _split_predicates(operands)
    carry_in = [sources.pop()] if "X" in modifiers else []
    shift = thread.value(sources.pop())
    a, b = thread.value(sources[0]), _addend(thread, sources[1])
    shifted: Value = None
    if a is not None and shift is not None:
        if "HI" not in modifiers:
            shifted = a << shift & MASK
        elif "SX32" in modifiers:
            shifted = _signed(a) << shift >> 32 & MASK
        else:
            high = thread.value(sources[2])
            shifted = None if high is None else (high << 32 | a) << shift >> 32 & MASK
    _add(thread, destination, carries, [shifted, b, *(thread.predicate(p) for p in carry_in)])


@opcode("SHF")
def _shf(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    destination, *sources = operands
    low, shift, high = (thread.value(source) for source in sources)
    direction, kind = modifiers[0], next(m for m in modifiers if m[-2:] in ("32", "64"))
    # The half that the result does not come from need not be known.
    if direction == "R" and kind in ("S32", "U32") and "HI" in modifiers:
        low = 0
    elif direction == "L" and "HI" not in modifiers:
        high = 0
    if low is None or shift is None or high is None:
        thread.set(destination, None)
        return
    value = high << 32 | low
    if direction == "L":
        value <<= shift
    else:
        value = (_signed(value, 64) if kind[0] == "S" else value) >> shift
    thread.set(destination, (value >> 32 if "HI" in modifiers else value) & MASK)


def _look_up(table: int, inputs: Sequence[bool | None]) -> bool | None:
    """The bit of an eight-bit table that three bits choose, if the unknown ones do not matter."""
    index = [0]
    for known in inputs:
        index = [2 * i + bit for i in index for bit in ((0, 1) if known is None else (known,))]
    bits = {bool(table >> i & 1) for i in index}
    return bits.pop() if len(bits) == 1 else None


@opcode("LOP3")
def _lop3(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    predicates, destination, sources = _split_predicates(operands)
    table = int(sources[3], 16)
    values = [thread.value(source) for source in sources[:3]]
    # Bits are independent: all zeros and all ones tell whether an unknown one matters.
    choices = [(0, MASK) if value is None else (value,) for value in values]
    found = {_look_up_words(table, words) for words in itertools.product(*choices)}
    result = found.pop() if len(found) == 1 else None
    thread.set(destination, result)
    for predicate in predicates:
        thread.set_predicate(predicate, None if result is None else result != 0)


def _look_up_words(table: int, words: Sequence[int]) -> int:
    a, b, c = words
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & MASK


@opcode("PLOP3")
def _plop3(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    inputs = [thread.predicate(operand) for operand in operands[2:5]]
    for name, table in zip(operands[:2], operands[5:7], strict=True):
        thread.set_predicate(name, _look_up(int(table, 16), inputs))


_comparisons: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


@opcode("ISETP")
def _isetp(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    comparison = modifiers[0]
    unsigned = "U32" in modifiers
    joined = next(m for m in modifiers if m in ("AND", "OR", "XOR"))
    a, b = thread.value(operands[2]), thread.value(operands[3])
    result: bool | None = None
    if a is not None and b is not None:
        if not unsigned:
            a, b = _signed(a), _signed(b)
        if "EX" in modifiers and a == b:
            result = thread.predicate(operands[5])
        else:
            result = _comparisons[comparison](a, b)
    other = thread.predicate(operands[4])
    opposite = None if result is None else not result
    table = {"AND": 0b11000000, "OR": 0b11111100, "XOR": 0b00111100}[joined]
    for name, value in zip(operands[:2], (result, opposite), strict=True):
        thread.set_predicate(name, _look_up(table, [value, other, False]))


@opcode("SEL")
def _sel(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    destination, a, b, condition = operands
    chosen = thread.predicate(condition)
    first, second = thread.value(a), thread.value(b)
    if chosen is None:
        thread.set(destination, first if first == second else None)
    else:
        thread.set(destination, first if chosen else second)


@opcode("IMNMX", "VIMNMX", "VIADDMNMX")
def _imnmx(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    destination, *sources, minimum = operands
    values = [thread.value(source) for source in sources]
    least = thread.predicate(minimum)
    known = [value for value in values if value is not None]
    if least is None or len(known) < len(values):
        thread.set(destination, None)
        return
    if len(known) == 3:
        known = [(known[0] + known[1]) & MASK, known[2]]
    if "U32" not in modifiers:
        known = [_signed(value) for value in known]
    thread.set(destination, (min(known) if least else max(known)) & MASK)


@opcode("PRMT")
def _prmt(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    destination, low, selector, high = operands
    a, choice, c = thread.value(low), thread.value(selector), thread.value(high)
    if a is None or choice is None or c is None:
        thread.set(destination, None)
        return
    source = (c << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = choice >> 4 * i & 15
        byte = source[nibble & 7]
        result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    thread.set(destination, result)


@opcode("MOV", "R2UR", "S2R", "S2UR", "CS2R")
def _mov(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    source = operands[1]
    value = thread.special[source] if source in thread.special else thread.value(source)
    thread.set(operands[0], value, 2 if source == "SRZ" and "32" not in modifiers else 1)


@opcode("LDC")
def _ldc(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    place = operands[1].removeprefix("c[0x0][").removesuffix("]")
    words = {"64": 2, "128": 4}.get(modifiers[0] if modifiers else "", 1)
    sizes = {"U8": 1, "U16": 2}
    size = sizes.get(modifiers[0], 4 * words) if modifiers else 4
    thread.set(operands[0], thread.constant(place, size), words)


@opcode("HFMA2")
def _hfma2(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    """As a move of a constant: two half-precision immediates added to zero."""
    destination, a, b, *halves = operands
    value: Value = None
    if a.lstrip("-") == b.lstrip("-") == "RZ" and len(halves) == 2:
        try:
            high, low = (struct.unpack("<H", struct.pack("<e", float(h)))[0] for h in halves)
            value = high << 16 | low
        except ValueError:
            value = None
    thread.set(destination, value)


@opcode("P2R")
def _p2r(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    destination, _, source, mask = operands
    value, chosen = thread.value(source), thread.value(mask)
    if value is None or chosen is None:
        thread.set(destination, None)
        return
    # An unknown one counts as false: it depends on data, and no branch depends on it.
    bits = sum(bool(thread.predicates.get(f"P{i}")) << i for i in range(7))
    shift = 8 * int(modifiers[0][1]) if modifiers else 0
    thread.set(destination, value & ~(chosen << shift) | (bits & chosen) << shift)


@opcode("R2P")
def _r2p(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    value, mask = thread.value(operands[1]), thread.value(operands[2])
    shift = 8 * int(modifiers[0][1]) if modifiers else 0
    for i in range(7):
        if mask is not None and mask >> i & 1:
            known = None if value is None else bool(value >> shift + i & 1)
            thread.set_predicate(f"P{i}", known)


@opcode("VOTE")
def _vote(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    """As if all threads of the warp agreed."""
    predicates = [operand for operand in operands if "P" in operand]
    thread.set_predicate(predicates[0], thread.predicate(predicates[-1]))
    thread.set(operands[0], None)


@opcode("FCHK")
def _fchk(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    """No division takes the slow path, which is for denormal numbers and the like."""
    thread.set_predicate(operands[0], False)


# Integer divisions use the floating-point reciprocal and correct its last bits.


def _float(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


@opcode("I2F")
def _i2f(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    value = thread.wide(operands[1]) if "U64" in modifiers else thread.value(operands[1])
    if value is None or not {"U32", "U64"} & {*modifiers}:
        thread.set(operands[0], None)
        return
    bits = _bits(float(value))
    if "RP" in modifiers and _float(bits) < value:
        bits += 1
    thread.set(operands[0], bits)


@opcode("MUFU")
def _mufu(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    value = thread.value(operands[1])
    known = "RCP" in modifiers and value is not None and _float(value) > 0
    thread.set(operands[0], _bits(1 / _float(value)) if known else None)  # type: ignore[arg-type]


@opcode("F2I")
def _f2i(thread: Thread, modifiers: list[str], operands: list[str]) -> None:
    value = thread.value(operands[1])
    words = 2 if "U64" in modifiers else 1
    whole: Value = None
    if value is not None and math.isfinite(_float(value)) and _float(value) >= 0:
        whole = min(int(_float(value)), (1 << 32 * words) - 1)
    thread.set(operands[0], whole, words)
