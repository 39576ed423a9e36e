# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d's functions (version 1.7) on mambablock's operators.

Tensors are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import accumulator_dtype
from ..causal_conv1d import causal_conv1d
from ..causal_conv1d_update import causal_conv1d_update as _update
from ._explain import Forms, explained

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

_forms: Forms = {
    "weight": "dim, width",
    "bias": "dim",
    "x": "batch, dim, seqlen",
    "seq_idx": "batch, seqlen",
    "initial_states": "batch, dim, width - 1",
    "final_states_out": "batch, dim, width - 1",
}


def _update_forms(conv_state_indices: Any = None, **_: Any) -> Forms:
    rows = "batch" if conv_state_indices is None else "rows"
    return {
        "weight": "dim, width",
        "bias": "dim",
        "x": ("batch, dim", "batch, dim, seqlen"),
        "conv_state": f"{rows}, dim, state_len",
        "cache_seqlens": "batch",
        "conv_state_indices": "batch",
    }


@explained(_forms, indices=("seq_idx",), initial_state="initial_states")
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along time, with an optional SiLU.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width), float32 or x's type.
        bias: (dim), float32 or x's type.
        seq_idx: (batch, seqlen), int32 or int64: the sequence that a step belongs to. Its steps are
            contiguous, and the convolution stays within it. A negative one is padding, whose output
            is 0. On CUDA this waits for the device.
        initial_states: (batch, dim, width - 1), the inputs before the first, oldest first.
        return_final_states: also return the last width - 1 inputs; not with seq_idx.
        final_states_out: (batch, dim, width - 1), to write those to.
        activation: None, "silu" or "swish".

    Returns:
        The output, of x's shape and type, or (output, final states of x's type).

    Raises:
        NotImplementedError: another activation.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device, or return_final_states is given
            together with seq_idx.
        RuntimeError: as from :func:`mambablock.causal_conv1d`.
    """
    owner = "causal_conv1d_fn"
    silu = _is_silu(owner, activation)
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
        return _packed(inputs, weight, bias, seq_idx, states, silu).transpose(1, 2).to(x.dtype)

    y, last = causal_conv1d(
        inputs, weight, bias=bias, silu=silu, initial_state=states, return_final_state=True
    )
    y = y.transpose(1, 2).to(x.dtype)
    if not return_final_states:
        return y
    final_states = last.transpose(1, 2).to(x.dtype)
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _packed(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor,
    states: Tensor | None,
    silu: bool,
) -> Tensor:
    """The convolution of (batch, length, dim) by sequences, all rows being packed into one."""
    batch, length, dim = inputs.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"causal_conv1d_fn: seq_idx must be (batch, seqlen); got {seq_idx.shape}")
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * length])])
    if states is not None and length > 0:
        # A row's state is that of its first sequence.
        first = begins.flatten().cumsum(0).view(batch, length)[:, 0] - 1
        per_sequence = states.new_zeros(len(starts), states.shape[1], dim)
        states = per_sequence.index_copy(0, first, states)
    y = causal_conv1d(
        inputs.reshape(1, batch * length, dim),
        weight,
        bias=bias,
        silu=silu,
        initial_state=states if length > 0 else None,
        cu_seqlens=cu_seqlens,
    )
    return y.view(batch, length, dim).masked_fill((seq_idx < 0)[..., None], 0)


@explained(_update_forms, indices=("cache_seqlens", "conv_state_indices"), state="conv_state")
@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution's next step or steps, rolling the state in place; not differentiable.

    Args:
        x: (batch, dim), or (batch, dim, seqlen) for several steps.
        conv_state: (batch, dim, state_len) of any of x's types, state_len >= width - 1: the last
            inputs. Changed in place.
        weight: (dim, width), float32 or x's type.
        bias: (dim), float32 or x's type.
        activation: None, "silu" or "swish".
        cache_seqlens: (batch), int32 or int64: conv_state is a circular buffer that so many inputs
            have been written to; the next one goes to cache_seqlens % state_len.
        conv_state_indices: (batch), int32 or int64: each row's row of conv_state, which may have
            more. A negative one is padding: its output is 0, no state changes.

    Returns:
        The output, of x's shape and type.

    Raises:
        NotImplementedError: another activation.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device; the state is then as it was.
        RuntimeError: as from :func:`mambablock.causal_conv1d_update`.
    """
    owner = "causal_conv1d_update"
    silu = _is_silu(owner, activation)
    check.floating(owner, "conv_state", conv_state)
    state_len, past = conv_state.shape[-1], weight.shape[1] - 1
    if state_len < past:
        raise ValueError(
            f"{owner}: conv_state must hold at least width - 1 = {past} inputs; "
            f"got {tuple(conv_state.shape)}"
        )
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    if cache_seqlens is None and state_len == past:
        y = torch.empty_like(steps)
        for t in range(steps.shape[-1]):
            y[..., t] = _update(
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
    y = causal_conv1d(
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
    return y.reshape(x.shape)


def _positions(cache_seqlens: Tensor, begin: int, end: int, rows: Tensor) -> Tensor:
    """Where the buffer holds inputs cache_seqlens + begin to + end, for each channel."""
    steps = torch.arange(begin, end, device=rows.device)
    positions = (cache_seqlens[:, None] + steps) % rows.shape[2]
    return positions[:, None].expand(-1, rows.shape[1], -1)


def _is_silu(function: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(
            f"{function}: activation must be None, 'silu' or 'swish'; got {activation!r}"
        )
    return activation is not None
