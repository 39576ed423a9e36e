# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d (version 1.7) on mambablock's operators."""

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.7.0"
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
