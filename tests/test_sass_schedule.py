# SPDX-License-Identifier: Apache-2.0
"""The simulation of a multiprocessor, on machine code written by hand."""

from __future__ import annotations

import pytest
from tools.sass.launches import Launch
from tools.sass.listing import Control, Kernel, parse_sass
from tools.sass.machine import LATENCIES, Device, blocks_per_multiprocessor
from tools.sass.schedule import Run, simulate
from tools.sass.trace import shared_wavefronts, trace

NONE = 7  # for a scoreboard


def high_word(stall: int = 1, sets: int = NONE, frees: int = NONE, waits: int = 0) -> int:
    return (stall | sets << 5 | frees << 8 | waits << 11) << 41


def kernel(*lines: tuple[str, int], registers: int = 32, shared: int = 0) -> Kernel:
    text = "code for sm_90\nFunction : kernel\n"
    for i, (line, word) in enumerate([*lines, ("EXIT", high_word(5))]):
        text += f"        /*{16 * i:04x}*/  {line} ;  /* 0x{0:016x} */\n"
        text += f"                                 /* 0x{word:016x} */\n"
    ((_, _, code),) = parse_sass(text)
    return Kernel("kernel()", 90, registers, 0, shared, code)


def run(code: Kernel, threads: int = 128, blocks: int = 1, device: Device | None = None) -> Run:
    launch = Launch("kernel()", (1, 1, 1), (threads, 1, 1), 0, bytes(16))
    return simulate(code, trace(code, launch), blocks, device or Device())


def test_control_bits() -> None:
    word = high_word(stall=13, sets=2, frees=5, waits=0b010001) | 0xABCDEF  # lower bits are others'
    assert Control.decode(word) == Control(13, 2, 5, 0b010001)
    assert Control.decode(high_word(1)) == Control(1, None, None, 0)


def test_stall_counts_of_one_warp() -> None:
    code = kernel(*[("NOP", high_word(stall=6))] * 10)
    assert run(code, threads=32).clocks == 10 * 6 + 5


def test_a_scheduler_issues_one_instruction_a_clock() -> None:
    code = kernel(*[("NOP", high_word())] * 1000)
    one, four = (run(code, blocks=blocks) for blocks in (1, 4))
    assert one.clocks == pytest.approx(1000, abs=200)  # the warps start some clocks apart
    assert four.clocks == pytest.approx(4000, abs=200)
    assert four.issued == 4 * 4 * 1001


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_special_functions_take_eight_clocks_of_a_scheduler(blocks: int) -> None:
    code = kernel(*[("MUFU.EX2 R1, R2", high_word())] * 200)
    assert run(code, blocks=blocks).clocks == pytest.approx(8 * 200 * blocks, abs=200)


@pytest.mark.parametrize(
    ("producer", "latency"), [("MUFU.EX2 R1, R2", "MUFU"), ("LDS R1, [R2]", "LDS")]
)
def test_a_scoreboard_holds_back_who_waits_for_it(producer: str, latency: str) -> None:
    first = (producer, high_word(stall=2, sets=3))
    free, waiting = (
        run(kernel(first, ("FADD R3, R1, R1", high_word(waits=waits))), threads=32).clocks
        for waits in (0b000100, 0b001000)
    )
    assert waiting - free == LATENCIES[latency] - 2


def test_the_latencies_are_the_devices() -> None:
    code = kernel(("LDS R1, [R2]", high_word(sets=0)), ("FADD R3, R1, R1", high_word(waits=1)))
    device = Device()
    device.latencies["LDS"] += 100
    assert run(code, 32, device=device).clocks == run(code, 32).clocks + 100


def test_a_barrier_waits_for_the_last_warp() -> None:
    slow = kernel(
        ("S2R R0, SR_TID.X", high_word()),
        ("ISETP.GE.U32.AND P0, PT, R0, 0x20, PT", high_word()),
        ("@P0 BRA 0x40", high_word()),
        ("NOP", high_word(stall=15)),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", high_word()),
        *[("NOP", high_word(stall=10))] * 10,
    )
    # The first warp takes the NOP before the barrier, and all have a hundred clocks after it.
    assert run(slow, threads=64).clocks >= 15 + 100 + LATENCIES["BAR"]


@pytest.mark.parametrize(
    ("addresses", "width", "wavefronts"),
    [
        ([4 * i for i in range(32)], 4, 1),
        ([0] * 32, 4, 1),
        ([8 * i for i in range(32)], 4, 2),
        ([128 * i for i in range(32)], 4, 32),
        ([132 * i for i in range(32)], 4, 1),
        ([8 * i for i in range(32)], 8, 2),
        ([8 * (i // 2) for i in range(32)], 8, 1),
        ([16 * i for i in range(32)], 16, 4),
        ([32 * i for i in range(32)], 16, 8),
        ([16 * (i // 4) for i in range(32)], 16, 2),
        ([None] * 31 + [64], 16, 1),
    ],
)
def test_shared_wavefronts(addresses: list[int | None], width: int, wavefronts: int) -> None:
    assert shared_wavefronts(addresses, width) == wavefronts


@pytest.mark.parametrize(("scale", "wavefronts"), [("0x4", 1), ("0x8", 2), ("0x80", 32)])
def test_wavefronts_by_the_lanes_addresses(scale: str, wavefronts: int) -> None:
    code = kernel(
        ("S2R R0, SR_TID.X", high_word()),
        (f"IMAD R1, R0, {scale}, RZ", high_word()),
        ("LDS R2, [R1+0x40]", high_word()),
    )
    assert run(code, threads=32).wavefronts == wavefronts


def test_memory_moves_each_sector_once() -> None:
    code = kernel(
        ("S2R R0, SR_TID.X", high_word()),
        ("IMAD R4, R0, 0x8, RZ", high_word()),
        ("IMAD.MOV.U32 R5, RZ, RZ, RZ", high_word()),
        ("LDG.E.64 R6, desc[UR4][R4.64]", high_word(sets=0)),
        ("LDG.E.64 R8, desc[UR4][R4.64]", high_word(sets=1)),
        ("STG.E.64 desc[UR4][R4.64+0x1000], R6", high_word(waits=3)),
    )
    result = run(code, threads=128)
    assert result.bytes == 2 * 128 * 8
    assert result.clocks > LATENCIES["DRAM"]


def test_the_bandwidth_bounds_what_memory_moves() -> None:
    code = kernel(
        ("S2R R0, SR_TID.X", high_word()),
        ("IMAD R4, R0, 0x10, RZ", high_word()),
        ("IMAD.MOV.U32 R5, RZ, RZ, RZ", high_word()),
        *[
            (f"LDG.E.128 R8, desc[UR4][R4.64+{0x1000 * i:#x}]", high_word(sets=0))
            for i in range(50)
        ],
        ("FADD R1, R8, R8", high_word(waits=1)),
    )
    result = run(code, threads=128, device=Device(bandwidth=1e12))
    bound = result.bytes / Device(bandwidth=1e12).bytes_per_clock
    assert result.clocks == pytest.approx(bound, rel=0.1)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 128, 0, 16),  # warps
        (128, 128, 0, 4),
        (255, 128, 0, 2),
        (32, 64, 100 << 10, 2),
        (32, 64, 227 << 10, 1),
        (32, 32, 0, 32),
        (168, 64, 0, 6),
    ],
)
def test_blocks_per_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    code = kernel(("NOP", high_word()), registers=registers)
    assert blocks_per_multiprocessor(code, threads, shared) == blocks
