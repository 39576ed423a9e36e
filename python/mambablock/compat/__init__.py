# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's and causal-conv1d's modules, in folders as theirs, on mambablock's operators."""

from . import causal_conv1d, mamba_ssm
from ._install import install

__all__ = ["causal_conv1d", "install", "mamba_ssm"]
