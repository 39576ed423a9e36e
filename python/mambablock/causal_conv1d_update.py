# SPDX-License-Identifier: Apache-2.0
"""One decoding step of the causal convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from .causal_conv1d import check_fake


@library.register_fake("causal_conv1d_update", "x")
def _fake(a: Any) -> Tensor:
    check_fake("causal_conv1d_update", a, "batch")
    y: Tensor = a.x.new_empty(a.x.shape)
    return y


_prepare = library.prepared("causal_conv1d_update", activations=("x",))


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One step of :func:`causal_conv1d`, rolling the state in place; not differentiable.

    Args:
        state: (rows, d_conv - 1, d_inner), any of the four floating types: the last inputs, oldest
            first. Changed in place.
        x: (batch, d_inner), float32, bfloat16, float16 or float64.
        weight: (d_inner, d_conv), float32 or x's type.
        bias: (d_inner), float32 or x's type.
        silu: apply SiLU to the sum.
        state_indices: (batch), int32 or int64: each row's row of state, all distinct; a negative
            one is padding, whose y is 0. Absent, state has one row per row of x.

    Returns:
        y of x's shape and type.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    y: Tensor = torch.ops.mambablock.causal_conv1d_update(
        *_prepare(state, x, weight, bias, silu, state_indices)
    )
    return y
