# SPDX-License-Identifier: Apache-2.0
"""One decoding step of the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from .selective_scan import check_fake


@library.register_fake("selective_state_update", "u")
def _fake(a: Any) -> Tensor:
    check_fake("selective_state_update", a, "batch")
    y: Tensor = a.u.new_empty(a.u.shape)
    return y


_prepare = library.prepared("selective_state_update", activations=("u", "delta", "B", "C", "z"))


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: Tensor | None = None,
    A_is_log: bool = False,
) -> Tensor:
    """One step of :func:`selective_scan`, advancing the state in place; not differentiable.

    Args:
        state: (rows, d_inner, d_state), any of the four floating types. Changed in place, computed
            in float32 (float64 for float64 u) and rounded once.
        u, delta: (batch, d_inner), float32, bfloat16, float16 or float64, of one type.
        A: (d_inner, d_state), float32 or u's type.
        B, C: (batch, d_state) or (batch, groups, d_state), u's type.
        D, delta_bias: (d_inner), float32 or u's type.
        z: (batch, d_inner), u's type: the gate.
        delta_softplus: apply softplus to delta + delta_bias.
        state_indices: (batch), int32 or int64: each row's row of state, all distinct; a negative
            one is padding, whose y is 0. Absent, state has one row per row of u.
        A_is_log: A is a block's A_log, for which -exp(A) stands.

    Returns:
        y of u's shape and type.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    arguments = _prepare(
        *(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices, A_is_log)
    )
    y: Tensor = torch.ops.mambablock.selective_state_update(*arguments)
    return y
