# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d's compiled extension: its raw operators, without autograd, on any device.

Its functions are called by position, in one of the ways that its versions have had: the number of
arguments tells which. Tensors are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambablock._library import accumulator_dtype
from mambablock.compat._conv import Sequences, conv, update
from mambablock.compat._explain import Forms, explained

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]

# What follows the common first arguments, by the number of all.
_forward_options: dict[int, tuple[str, ...]] = {
    4: ("silu",),
    5: ("seq_idx", "silu"),
    7: ("seq_idx", "initial_states", "final_states_out", "silu"),
    8: ("seq_idx", "initial_states", "out", "final_states_out", "silu"),
}
_states = ("seq_idx", "initial_states", "dfinal_states")
_backward_options: dict[int, tuple[str, ...]] = {
    6: ("dx", "silu"),
    7: ("seq_idx", "dx", "silu"),
    10: (*_states, "dx", "return_dinitial_states", "silu"),
    12: (*_states, "dx", "dweight", "dbias", "dinitial_states", "silu"),
}
_update_options: dict[int, tuple[str, ...]] = {
    5: ("silu",),
    6: ("silu", "cache_seqlens"),
    7: ("silu", "cache_seqlens", "conv_state_indices"),
    8: ("out", "silu", "cache_seqlens", "conv_state_indices"),
}


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
    """The output of x's shape and type, or None if `out` is given, which is then written to.

    After (x, weight, bias) come (silu), (seq_idx, silu), (seq_idx, initial_states,
    final_states_out, silu) or (seq_idx, initial_states, out, final_states_out, silu).

    Raises:
        TypeError: another number of arguments, or an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    options = _named("causal_conv1d_fwd", _forward_options, 3, rest)
    return _forward(x, weight, bias, **options)


def causal_conv1d_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any
) -> tuple[Tensor | None, ...] | None:
    """Gradients (dx, dweight, dbias), with dinitial_states where initial_states are an argument;
    None if dweight is given, where all are then written to.

    After (x, weight, bias, dout) come (dx, silu), (seq_idx, dx, silu), (seq_idx, initial_states,
    dfinal_states, dx, return_dinitial_states, silu) or (seq_idx, initial_states, dfinal_states, dx,
    dweight, dbias, dinitial_states, silu). A dx is written to.

    Raises:
        TypeError: another number of arguments, or an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    options = _named("causal_conv1d_bwd", _backward_options, 4, rest)
    has_states, fills = "initial_states" in options, "dweight" in options
    places = [options.pop(name, None) for name in ("dx", "dweight", "dbias", "dinitial_states")]
    wants_states = options.pop("return_dinitial_states", fills)
    found = _backward(x, weight, bias, dout, **options)
    found = [
        gradient if place is None or gradient is None else place.copy_(gradient)
        for gradient, place in zip(found, places, strict=True)
    ]
    if fills:
        return None
    if not wants_states:
        found[3] = None
    return tuple(found if has_states else found[:3])


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor | None:
    """The output of x's shape and type, or None if `out` is given; conv_state advances in place.

    After (x, conv_state, weight, bias) come (silu), (silu, cache_seqlens), (silu, cache_seqlens,
    conv_state_indices) or (out, silu, cache_seqlens, conv_state_indices).

    Raises:
        TypeError: another number of arguments, or an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    options = _named("causal_conv1d_update", _update_options, 4, rest)
    return _update(x, conv_state, weight, bias, **options)


def _named(
    owner: str, options: dict[int, tuple[str, ...]], fixed: int, rest: tuple[Any, ...]
) -> dict[str, Any]:
    names = options.get(len(rest) + fixed)
    if names is None:
        *others, last = map(str, options)
        raise TypeError(
            f"{owner}: expected {', '.join(others)} or {last} arguments, by position; "
            f"got {len(rest) + fixed}"
        )
    return dict(zip(names, rest, strict=True))


_forms: Forms = {
    "weight": "dim, width",
    "bias": "dim",
    "x": "batch, dim, seqlen",
    "dout": "batch, dim, seqlen",
    "seq_idx": "batch, seqlen",
    "initial_states": "batch, dim, width - 1",
    "dfinal_states": "batch, dim, width - 1",
    "out": "batch, dim, seqlen",
    "final_states_out": "batch, dim, width - 1",
}


@explained(_forms, ("seq_idx",), owner="causal_conv1d_fwd", initial_state="initial_states")
@torch.no_grad()
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    out: Tensor | None = None,
    final_states_out: Tensor | None = None,
) -> Tensor | None:
    y, _ = conv(
        *("causal_conv1d_fwd", x, weight, bias, seq_idx, initial_states, silu),
        return_final_states=final_states_out is not None,
        final_states_out=final_states_out,
    )
    if out is None:
        return y
    out.copy_(y)
    return None


@explained(
    _forms,
    ("seq_idx",),
    owner="causal_conv1d_bwd",
    dy="dout",
    dfinal_state="dfinal_states",
    initial_state="initial_states",
)
@torch.no_grad()
def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    *,
    silu: bool,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    dfinal_states: Tensor | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias and dinitial_states, None for an absent argument's."""
    inputs, dy = x.transpose(1, 2), dout.transpose(1, 2).to(x.dtype)
    dtype = accumulator_dtype(x.dtype)
    states, dstates = (
        None if t is None else t.transpose(1, 2).to(dtype) for t in (initial_states, dfinal_states)
    )
    shape, cu_seqlens = inputs.shape, None
    sequences = None
    if seq_idx is not None:
        sequences = Sequences("causal_conv1d_bwd", seq_idx, *shape[:2])
        cu_seqlens, states = sequences.cu_seqlens, sequences.states(states)
        dy = dy.masked_fill(sequences.padding, 0).reshape(1, -1, shape[2])
        inputs = inputs.reshape(1, -1, shape[2])
    dx, dweight, dbias, dinitial = torch.ops.mambablock.causal_conv1d_backward(
        dy, dstates, inputs, weight, bias, states, cu_seqlens, silu, False
    )
    if sequences is not None and states is not None:
        dinitial = dinitial.index_select(0, sequences.first)
    return [
        dx.view(shape).transpose(1, 2),
        dweight,
        None if bias is None else dbias,
        None if states is None else dinitial.transpose(1, 2).to(x.dtype),
    ]


def _update_forms(conv_state_indices: Any = None, **_: Any) -> Forms:
    rows = "batch" if conv_state_indices is None else "rows"
    return {
        "weight": "dim, width",
        "bias": "dim",
        "x": ("batch, dim, seqlen", "batch, dim"),
        "conv_state": f"{rows}, dim, state_len",
        "cache_seqlens": "batch",
        "conv_state_indices": "batch",
    }


@explained(
    _update_forms,
    ("cache_seqlens", "conv_state_indices"),
    owner="causal_conv1d_update",
    state="conv_state",
)
@torch.no_grad()
def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    owner = "causal_conv1d_update"
    y = update(owner, x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    if out is None:
        return y
    out.copy_(y)
    return None
