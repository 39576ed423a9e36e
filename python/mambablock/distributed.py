# SPDX-License-Identifier: Apache-2.0
"""Mamba blocks over several devices, on torch.distributed.

:class:`ContextParallel` divides the length of a sequence, :class:`TensorParallel` the channels of a
block. They compose with each other, and with data parallelism over their mesh's other dimensions.
"""

from ._context_parallel import ContextParallel
from ._tensor_parallel import TensorParallel

__all__ = ["ContextParallel", "TensorParallel"]
