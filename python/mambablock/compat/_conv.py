# SPDX-License-Identifier: Apache-2.0
"""The convolution as causal-conv1d lays it out, on the operators or their definitions.

Tensors are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._library import accumulator_dtype
from ..causal_conv1d import causal_conv1d
from ..causal_conv1d_update import causal_conv1d_update

__all__ = ["Sequences", "conv", "is_silu", "update"]


def is_silu(owner: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(
            f"{owner}: activation must be None, 'silu' or 'swish'; got {activation!r}"
        )
    return activation is not None


class Sequences:
    """The sequences of seq_idx (batch, seqlen), all rows being packed into one."""

    def __init__(self, owner: str, seq_idx: Tensor, batch: int, length: int) -> None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"{owner}: seq_idx must be (batch, seqlen); got {seq_idx.shape}")
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        self.count = len(starts)
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([batch * length])])
        # A row's state is that of its first sequence.
        self.first = begins.flatten().cumsum(0).view(batch, length)[:, :1].squeeze(1) - 1
        self.padding = (seq_idx < 0)[..., None]

    def states(self, states: Tensor | None) -> Tensor | None:
        """The rows' states (batch, width - 1, dim), as the sequences' own."""
        if states is None or len(self.first) == 0 or self.count == 0:
            return None
        return states.new_zeros(self.count, *states.shape[1:]).index_copy(0, self.first, states)


def conv(
    owner: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    *,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    operator: Callable[..., Any] = causal_conv1d,
) -> tuple[Tensor, Tensor | None]:
    """The output of x's shape and type, and, if asked for, the last width - 1 inputs."""
    if final_states_out is not None:
        check.floating(owner, "final_states_out", final_states_out)
        check.device(owner, "final_states_out", final_states_out, "x", x)
    if seq_idx is not None:
        check.device(owner, "seq_idx", seq_idx, "x", x)
    inputs = x.transpose(1, 2)
    states = None
    if initial_states is not None:
        states = initial_states.transpose(1, 2).to(accumulator_dtype(x.dtype))
    if seq_idx is not None:
        if return_final_states:
            raise ValueError(f"{owner}: return_final_states must be False with seq_idx; got True")
        sequences = Sequences(owner, seq_idx, *inputs.shape[:2])
        packed = operator(
            inputs.reshape(1, -1, inputs.shape[2]),
            weight,
            bias=bias,
            silu=silu,
            initial_state=sequences.states(states),
            cu_seqlens=sequences.cu_seqlens,
        )
        y = packed.view(inputs.shape).masked_fill(sequences.padding, 0)
        return y.transpose(1, 2).to(x.dtype), None

    y, last = operator(
        inputs, weight, bias=bias, silu=silu, initial_state=states, return_final_state=True
    )
    y = y.transpose(1, 2).to(x.dtype)
    if not return_final_states:
        return y, None
    final_states = last.transpose(1, 2).to(x.dtype)
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


def update(
    owner: str,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    *,
    plain: bool = False,
) -> Tensor:
    """The output of x's shape and type; conv_state advances in place."""
    check.floating(owner, "conv_state", conv_state)
    state_len, past = conv_state.shape[-1], weight.shape[1] - 1
    if state_len < past:
        raise ValueError(
            f"{owner}: conv_state must hold at least width - 1 = {past} inputs; "
            f"got {tuple(conv_state.shape)}"
        )
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    if cache_seqlens is None and state_len == past and not plain:
        y = torch.empty_like(steps)
        for t in range(steps.shape[-1]):
            y[..., t] = causal_conv1d_update(
                conv_state.transpose(1, 2),
                steps[..., t],
                weight,
                bias=bias,
                silu=silu,
                state_indices=conv_state_indices,
            )
        return y.view(x.shape)

    rows = conv_state
    if conv_state_indices is not None:
        rows = conv_state.index_select(0, conv_state_indices.clamp(min=0))
    if cache_seqlens is None:
        history = rows[..., state_len - past :]
        updated = torch.cat([rows, steps.to(rows.dtype)], dim=-1)[..., -state_len:]
    else:
        history = rows.gather(2, _positions(cache_seqlens, -past, 0, rows))
        # Of more steps than the buffer holds, the last are kept.
        kept = steps[..., -state_len:].to(rows.dtype)
        first = steps.shape[-1] - kept.shape[-1]
        updated = rows.scatter(2, _positions(cache_seqlens, first, steps.shape[-1], rows), kept)
    operator: Any = reference.causal_conv1d if plain else causal_conv1d
    y = operator(
        steps.transpose(1, 2),
        weight,
        bias=bias,
        silu=silu,
        initial_state=history.transpose(1, 2).to(accumulator_dtype(x.dtype)),
    ).transpose(1, 2)
    if conv_state_indices is None:
        conv_state.copy_(updated)
    else:
        real = conv_state_indices >= 0
        y = y.masked_fill(~real[:, None, None], 0)
        conv_state[conv_state_indices[real]] = updated[real]
    result: Tensor = y.reshape(x.shape)
    return result


def _positions(cache_seqlens: Tensor, begin: int, end: int, rows: Tensor) -> Tensor:
    """Where the buffer holds inputs cache_seqlens + begin to + end, for each channel."""
    steps = torch.arange(begin, end, device=rows.device)
    positions = (cache_seqlens[:, None] + steps) % rows.shape[2]
    return positions[:, None].expand(-1, rows.shape[1], -1)
