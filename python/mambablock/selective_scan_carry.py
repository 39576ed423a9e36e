# SPDX-License-Identifier: Apache-2.0
"""What a scan hands from one piece of a sequence to the next: fakes of the operators.

Forward: h after a piece whose initial state is 0, and the sum of dt, which with A gives the piece's
decay. Backward: the gradient of the piece's initial state where that of its final one is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library


def _states(a: Any, input: Tensor) -> tuple[int, int]:
    batch = input.shape[0]
    rows = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    return rows, input.shape[2]


@library.register_fake("selective_scan_carry", "u")
def _fake(a: Any) -> tuple[Tensor, Tensor]:
    library.check_shape("selective_scan_carry", "u", a.u, batch=None, length=None, d_inner=None)
    shape, dtype = _states(a, a.u), library.accumulator_dtype(a.u.dtype)
    return (
        a.u.new_empty((*shape, a.A.shape[1]), dtype=dtype),
        a.u.new_empty(shape, dtype=dtype),
    )


@library.register_fake("selective_scan_carry_backward", "dy")
def _fake_backward(a: Any) -> Tensor:
    op = "selective_scan_carry_backward"
    library.check_shape(op, "dy", a.dy, batch=None, length=None, d_inner=None)
    dtype = library.accumulator_dtype(a.dy.dtype)
    dinitial_state: Tensor = a.dy.new_empty((*_states(a, a.dy), a.A.shape[1]), dtype=dtype)
    return dinitial_state


forward = torch.ops.mambablock.selective_scan_carry.default
backward = torch.ops.mambablock.selective_scan_carry_backward.default
