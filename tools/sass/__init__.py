# SPDX-License-Identifier: Apache-2.0
"""Static analysis of the CUDA kernels: what they use and issue, without a GPU."""

from pathlib import Path

_ROOT = Path(__file__).parents[2]

# Where make cuda-check and make sass build them.
LIBRARY = _ROOT / "python/mambablock/libmambablock_cuda.so"
EMULATION = _ROOT / "build/emulation/tests/cuda_emulation/libmambablock_emulation.so"
