# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba-1 part (version 2.3) on mambablock's operators."""

from .models.mixer_seq_simple import MambaLMHeadModel
from .modules.mamba_simple import Mamba
from .ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from .ops.triton.selective_state_update import selective_state_update

__version__ = "2.3.2"
__all__ = [
    "Mamba",
    "MambaLMHeadModel",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_state_update",
]


def __getattr__(name: str) -> object:
    if name in ("Mamba2", "Mamba3"):
        raise ImportError(f"cannot import name {name!r} from mambablock, which has Mamba-1 only")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
