# SPDX-License-Identifier: Apache-2.0
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

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

def build_info() -> BuildInfo: ...
def math(name: str, x: NDArray[np.float32], level: str | None = None) -> NDArray[np.float32]: ...
