# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d's raw operators as functions that allocate their outputs; without autograd."""

from __future__ import annotations

from torch import Tensor

from mambablock.compat import causal_conv1d_cuda

__all__ = [
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
]


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The output; final_states_out is written to. As causal_conv1d_cuda.causal_conv1d_fwd."""
    y = causal_conv1d_cuda.causal_conv1d_fwd(
        x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
    )
    assert y is not None
    return y


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dinitial_states). As causal_conv1d_cuda.causal_conv1d_bwd."""
    found = causal_conv1d_cuda.causal_conv1d_bwd(
        *(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx),
        *(return_dinitial_states, silu_activation),
    )
    assert found is not None
    return found


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """The output; conv_state advances in place. As causal_conv1d_cuda.causal_conv1d_update."""
    y = causal_conv1d_cuda.causal_conv1d_update(
        x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
    )
    assert y is not None
    return y
