# SPDX-License-Identifier: Apache-2.0
"""The execution of one thread, on machine code written by hand."""

from __future__ import annotations

import pytest
from tools.sass.launches import Launch
from tools.sass.listing import Kernel, parse_sass
from tools.sass.thread import Thread, UnknownBranchError

# As the compiler divides: by a reciprocal in floating point, then corrected.
DIVISION = """
I2F.U32.RP R0, R5
ISETP.NE.U32.AND P2, PT, R5, RZ, PT
MUFU.RCP R0, R0
VIADD R2, R0, 0xffffffe
F2I.FTZ.U32.TRUNC.NTZ R3, R2
IMAD.MOV.U32 R2, RZ, RZ, RZ
IMAD.MOV R6, RZ, RZ, -R3
IMAD R7, R6, R5, RZ
IMAD.HI.U32 R3, R3, R7, R2
IMAD.HI.U32 R2, R3, R4, RZ
IMAD.MOV R3, RZ, RZ, -R2
IMAD R0, R5, R3, R4
ISETP.GE.U32.AND P0, PT, R0, R5, PT
@P0 IMAD.IADD R0, R0, 0x1, -R5
@P0 VIADD R2, R2, 0x1
ISETP.GE.U32.AND P1, PT, R0, R5, PT
@P1 VIADD R2, R2, 0x1
@!P2 LOP3.LUT R2, RZ, R5, RZ, 0x33, !PT
EXIT
"""

# A 64-bit counter, which starts at the first parameter and falls by 2^31 while it is above zero.
LOOP = """
FFMA R8, R8, R9, R10
IADD3 R4, P1, R4, -0x80000000, RZ
IADD3.X R5, R5, -0x1, RZ, P1, !PT
ISETP.GT.U32.AND P0, PT, R4, RZ, PT
ISETP.GT.AND.EX P0, PT, R5, RZ, PT, P0
@P0 BRA 0x20
EXIT
"""

UNKNOWN = """
LDG.E R6, desc[UR4][R4.64]
ISETP.NE.AND P0, PT, R6, RZ, PT
@P0 BRA 0x20
EXIT
"""


def thread(body: str, first: int, second: int) -> Thread:
    lines = ["LDC R4, c[0x0][0x210]", "LDC R5, c[0x0][0x214]", *body.split("\n")[1:-1]]
    text = "code for sm_90\nFunction : kernel\n"
    for i, line in enumerate(lines):
        text += f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n"
    ((_, _, code),) = parse_sass(text)
    kernel = Kernel("kernel()", 90, 10, 0, 0, code)
    parameters = first.to_bytes(4, "little") + second.to_bytes(4, "little")
    return Thread(kernel, Launch("kernel()", (1, 1, 1), (32, 1, 1), 0, parameters), 0, 0)


@pytest.mark.parametrize("numerator", [0, 1, 255, 256, 2**31 + 17, 2**32 - 1])
@pytest.mark.parametrize("denominator", [1, 3, 32, 999, 2**31, 2**32 - 1])
def test_division(numerator: int, denominator: int) -> None:
    walk = thread(DIVISION, numerator, denominator)
    walk.run()
    assert walk.value("R2") == numerator // denominator


@pytest.mark.parametrize("times", [1, 2, 6])
def test_loop(times: int) -> None:
    start = (times - 1) * 2**31 + 7
    walk = thread(LOOP, start % 2**32, start >> 32)
    walk.run()
    assert walk.path == [0, 1, *[*range(2, 8)] * times, 8]


def test_a_branch_on_data_is_an_error() -> None:
    with pytest.raises(UnknownBranchError, match="BRA at 0x40 depends on data"):
        thread(UNKNOWN, 0, 0).run()
