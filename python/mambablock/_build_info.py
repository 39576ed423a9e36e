# SPDX-License-Identifier: Apache-2.0
"""What the operator library says of itself."""

from __future__ import annotations

import ctypes
import json
from typing import TypedDict, cast

from ._library import FOLDER, LIBRARY


class CudaInfo(TypedDict):
    version: str
    architectures: list[str]


class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    torch_stable_abi: str
    simd_levels_built: list[str]
    simd_level: str
    cuda: CudaInfo | None


def build_info() -> BuildInfo:
    """What was built, with what, and the SIMD level in use.

    Returns:
        version of the package, compiler, cxx_standard, torch_stable_abi (the oldest torch that the
        library runs with), simd_levels_built, simd_level (the processor's highest of these, or what
        the environment variable MAMBABLOCK_SIMD asks for), and cuda: nvcc's version and the
        architectures built, or None where there is no CUDA library.

    Raises:
        RuntimeError: MAMBABLOCK_SIMD names no level that this processor has.
    """
    function = ctypes.CDLL(str(FOLDER / LIBRARY)).mambablock_build_info
    function.restype = ctypes.c_char_p
    info = json.loads(function().decode())
    if "error" in info:
        raise RuntimeError(info["error"])
    return cast(BuildInfo, info)
