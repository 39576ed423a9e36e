# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective state space block for PyTorch, with its own C++ and CUDA kernels."""

from . import reference
from ._build_info import build_info
from .bidirectional import BidirectionalMambaBlock
from .block import MambaBlock, MambaState
from .causal_conv1d import causal_conv1d
from .causal_conv1d_update import causal_conv1d_update
from .linear import linear
from .mamba_step import mamba_step
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update

__all__ = [
    "BidirectionalMambaBlock",
    "MambaBlock",
    "MambaState",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "linear",
    "mamba_step",
    "reference",
    "selective_scan",
    "selective_state_update",
]
