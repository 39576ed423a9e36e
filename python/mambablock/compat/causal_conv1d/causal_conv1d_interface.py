# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d's functions (version 1.7) on mambablock's operators.

Tensors are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambablock import reference
from mambablock.compat._conv import conv, is_silu, update
from mambablock.compat._explain import Forms, explained

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]


def _forms(seq_idx: Any = None, initial_states: Any = None, **_: Any) -> Forms:
    forms = {
        "weight": "dim, width",
        "bias": "dim",
        "x": "batch, dim, seqlen",
        "seq_idx": "batch, seqlen",
        "initial_states": "batch, dim, width - 1",
        "final_states_out": "batch, dim, width - 1",
    }
    given = {"seq_idx": seq_idx, "initial_states": initial_states}
    return {name: form for name, form in forms.items() if not _is_activation(given.get(name))}


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
        activation: None, "silu" or "swish"; version 1.0 had it in seq_idx's place, 1.1 after it,
            and both are understood.

    Returns:
        The output, of x's shape and type, or (output, final states of x's type).

    Raises:
        NotImplementedError: another activation.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device, or return_final_states is given
            together with seq_idx.
        RuntimeError: as from :func:`mambablock.causal_conv1d`.
    """
    # Where older versions have the activation.
    if _is_activation(seq_idx):
        seq_idx, activation = None, str(seq_idx)
    elif _is_activation(initial_states):
        initial_states, activation = None, str(initial_states)
    owner = "causal_conv1d_fn"
    y, final_states = conv(
        *(owner, x, weight, bias, seq_idx, initial_states, is_silu(owner, activation)),
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return y if final_states is None else (y, final_states)


@explained(_forms, indices=("seq_idx",), initial_state="initial_states")
def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv1d_fn by its definition, in plain PyTorch."""
    if _is_activation(initial_states):
        initial_states, activation = None, str(initial_states)
    owner = "causal_conv1d_ref"
    y, final_states = conv(
        *(owner, x, weight, bias, seq_idx, initial_states, is_silu(owner, activation)),
        return_final_states=return_final_states,
        final_states_out=final_states_out,
        operator=reference.causal_conv1d,
    )
    return y if final_states is None else (y, final_states)


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
    silu = is_silu(owner, activation)
    return update(owner, x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)


@explained(_update_forms, indices=("cache_seqlens",), state="conv_state")
@torch.no_grad()
def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """causal_conv1d_update by its definition, in plain PyTorch."""
    owner = "causal_conv1d_update_ref"
    silu = is_silu(owner, activation)
    return update(owner, x, conv_state, weight, bias, silu, cache_seqlens, None, plain=True)


class CausalConv1dFn:
    """For callers of causal-conv1d's autograd.Function by its name."""

    apply = staticmethod(causal_conv1d_fn)


def _is_activation(argument: object) -> bool:
    return isinstance(argument, str) and argument in ("silu", "swish")
