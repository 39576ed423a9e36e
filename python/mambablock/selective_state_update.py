# SPDX-License-Identifier: Apache-2.0
"""One decoding step of the selective scan."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library


@library.register_fake("selective_state_update")
def _fake(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state_indices: Tensor | None,
) -> Tensor:
    op = "selective_state_update"
    library.check_devices(
        op,
        "u",
        u,
        state=state,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        state_indices=state_indices,
    )
    if u.dim() != 2:
        raise RuntimeError(f"{op}: u must be (batch, d_inner); got {tuple(u.shape)}")
    library.check_shape(op, "delta", delta, batch=u.shape[0], d_inner=u.shape[1])
    return u.new_empty(u.shape)


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

    Returns:
        y of u's shape and type.

    Raises:
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    u, delta, B, C, z = library.autocast(u, delta, B, C, z)
    y: Tensor = torch.ops.mambablock.selective_state_update(
        state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices
    )
    return y
