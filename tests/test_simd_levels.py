# SPDX-License-Identifier: Apache-2.0
"""The operators' tests again at each SIMD level below the one in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mambablock


def lower_levels() -> list[str]:
    info = mambablock.build_info()
    built: list[str] = info["simd_levels_built"]
    return built[: built.index(info["simd_level"])]


NAMES = ("causal_conv1d", "selective_scan", "updates", "linear", "mamba_step", "operator_contract")


@pytest.mark.parametrize("level", lower_levels())
def test_operators(level: str) -> None:
    tests = [f"tests/test_{name}.py" for name in NAMES]
    command = [sys.executable, "-m", "pytest", "-x", "-k", "not gradcheck and not opcheck"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MAMBABLOCK_SIMD": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
