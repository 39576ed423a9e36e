# SPDX-License-Identifier: Apache-2.0
"""A static account of the CUDA kernels: what they issue per state-step, told without a GPU."""

from pathlib import Path

_ROOT = Path(__file__).parents[2]

# Where make cuda-check and make sass have them built.
LIBRARY = _ROOT / "python/mambablock/libmambablock_cuda.so"
EMULATION = _ROOT / "build/emulation/tests/cuda_emulation/libmambablock_emulation.so"
