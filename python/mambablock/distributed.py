# SPDX-License-Identifier: Apache-2.0
"""Mamba blocks over several devices, on torch.distributed."""

from ._context_parallel import ContextParallel

__all__ = ["ContextParallel"]
