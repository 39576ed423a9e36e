# SPDX-License-Identifier: Apache-2.0
"""The selective scan: public function, fake, autograd and vmap."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _library as library

_op = "selective_scan"
_ops = torch.ops.mambablock

# (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens); B and C with groups
_channel_dims = (2, 2, 0, 2, 2, 0, 2, 0, 1, None)
_gradient_dims = (2, 2, 0, 2, 2, 0, 2, 0, 1)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: Tensor | None
) -> None:
    library.check_devices(_op, "u", u, delta=delta, A=A, B=B, C=C, **others)
    if u.dim() != 3:
        raise RuntimeError(f"{_op}: u must be (batch, length, d_inner); got {tuple(u.shape)}")
    batch, length, d_inner = u.shape
    library.check_shape(_op, "delta", delta, batch=batch, length=length, d_inner=d_inner)
    if A.dim() != 2 or A.shape[0] != d_inner:
        raise RuntimeError(f"{_op}: A must be (d_inner={d_inner}, d_state); got {tuple(A.shape)}")
    groups = {"groups": B.shape[2]} if B.dim() == 4 else {}
    for name, tensor in (("B", B), ("C", C)):
        library.check_shape(
            _op, name, tensor, batch=batch, length=length, **groups, d_state=A.shape[1]
        )


@library.register_fake("selective_scan")
def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    batch, length, d_inner = u.shape
    d_state = A.shape[1]
    dtype = library.accumulator_dtype(u.dtype)
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tile = library.TIME_TILE["cuda" if u.is_cuda else "cpu"]
    tiles = (length + tile - 1) // tile
    saved_shape = (batch, tiles * d_state, d_inner) if save_states else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty((states, d_inner, d_state), dtype=dtype),
        u.new_empty(saved_shape, dtype=dtype),
    )


@library.register_fake("selective_scan_backward")
def _fake_backward(
    dy: Tensor,
    dfinal_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    _check(u, delta, A, B, C, dy=dy, dfinal_state=dfinal_state)
    return tuple(
        u.new_empty(0, dtype=library.accumulator_dtype(u.dtype) if i == 8 else u.dtype)
        if tensor is None
        else tensor.new_empty(tensor.shape)
        for i, tensor in enumerate((u, delta, A, B, C, D, z, delta_bias, initial_state))
    )


def _with_groups(args: tuple[Any, ...], in_dims: tuple[Any, ...], first: int) -> list[Any]:
    """The arguments with B and C, from position `first`, given a dimension of groups if without."""
    grouped = list(args)
    for i in (first, first + 1):
        mapped = in_dims[i] is not None
        if args[i].dim() - mapped == 3:
            # Behind batch and length, wherever the mapped dimension is.
            grouped[i] = args[i].unsqueeze(2 if not mapped or in_dims[i] > 2 else 3)
            if mapped and in_dims[i] == 2:
                grouped[i] = args[i].movedim(2, 0).unsqueeze(3).movedim(0, 2)
    return grouped


class _Backward(torch.autograd.Function):
    # Every argument by name: torch.compile counts them to see that there is no ctx.
    @staticmethod
    def forward(
        dy: Any,
        dfinal_state: Any,
        u: Any,
        delta: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        z: Any,
        delta_bias: Any,
        initial_state: Any,
        cu_seqlens: Any,
        saved_states: Any,
        delta_softplus: Any,
        reverse: Any,
    ) -> Any:
        return _ops.selective_scan_backward(
            dy,
            dfinal_state,
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            initial_state,
            cu_seqlens,
            saved_states,
            delta_softplus,
            reverse,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        library.forbid_double_backward(_op)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_backward(_Backward.apply, info, in_dims, *args)


def _vmap_backward(function: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    grouped = _with_groups(args, in_dims, 5)
    rule = library.channel_vmap(
        _op, function, (2, 1, *_channel_dims, 2, None, None), _gradient_dims
    )
    outputs, out_dims = rule(info, _without_dims(in_dims, args, grouped), *grouped)
    if grouped[5] is not args[5]:
        # dB and dC lose the groups that B and C were given: (batch, length, mapped, 1, d_state).
        outputs = (*outputs[:3], outputs[3].squeeze(3), outputs[4].squeeze(3), *outputs[5:])
    return outputs, out_dims


def _without_dims(in_dims: Any, args: Any, grouped: Any) -> Any:
    """in_dims of the arguments after _with_groups."""
    return tuple(
        dim + 1 if dim is not None and dim > 2 and new is not old else dim
        for dim, old, new in zip(in_dims, args, grouped, strict=True)
    )


def _vmap_forward(function: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    grouped = _with_groups(args, in_dims, 3)
    rule = library.channel_vmap(_op, function, (*_channel_dims, None, None, None), (2, 1, 2))
    return rule(info, _without_dims(in_dims, args, grouped), *grouped)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.save_states = inputs
    saved_states = output[2]
    ctx.mark_non_differentiable(saved_states)
    ctx.save_for_backward(*tensors, saved_states)


def _backward(ctx: Any, dy: Tensor, dfinal_state: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, saved_states = ctx.saved_tensors
    options = (ctx.delta_softplus, ctx.reverse)
    if not ctx.save_states:
        saved_states = _ops.selective_scan(*tensors, *options, True)[2]
    # Where nobody differentiates again, without a Function's overhead.
    function = _Backward.apply if torch.is_grad_enabled() else _ops.selective_scan_backward
    gradients = function(dy, dfinal_state, *tensors, saved_states, *options)  # type: ignore[no-untyped-call]
    named = (
        library.none_if_empty(gradient, of)
        for gradient, of in zip(gradients, tensors[:9], strict=True)
    )
    return (*named, None, None, None, None)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        u: Any,
        delta: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        z: Any,
        delta_bias: Any,
        initial_state: Any,
        cu_seqlens: Any,
        delta_softplus: Any,
        reverse: Any,
        save_states: Any,
    ) -> Any:
        return _ops.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            initial_state,
            cu_seqlens,
            delta_softplus,
            reverse,
            save_states,
        )

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_forward(_Forward.apply, info, in_dims, *args)


def _setup_op_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.save_states = inputs
    ctx.save_for_backward(*tensors, output[2])


torch.library.register_autograd(
    "mambablock::selective_scan", _backward, setup_context=_setup_op_context
)
torch.library.register_vmap(
    "mambablock::selective_scan",
    lambda info, in_dims, *args: _vmap_forward(_ops.selective_scan, info, in_dims, *args),
)
torch.library.register_vmap(
    "mambablock::selective_scan_backward",
    lambda info, in_dims, *args: _vmap_backward(_ops.selective_scan_backward, info, in_dims, *args),
)


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space recurrence (Gu & Dao 2023, arXiv:2312.00752, algorithm 2).

    With ``dt = delta + delta_bias``, through softplus if asked, per channel and state::

        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * u[t] * B[t]
        y[t] = sum_n C[t] * h[t] + D * u[t],   times silu(z[t]) if z is given

    computed in float32 (float64 for float64) whatever the activations' type.

    Args:
        u, delta: (batch, length, d_inner), float32, bfloat16, float16 or float64, of one type; any
            strides, native where the last one is 1.
        A: (d_inner, d_state), float32 or u's type; negative in a stable model.
        B, C: (batch, length, d_state), or (batch, length, groups, d_state) where channels share
            them in `groups` equal runs; u's type.
        D: (d_inner), float32 or u's type: the skip connection.
        z: (batch, length, d_inner), u's type: the gate.
        delta_bias: (d_inner), float32 or u's type.
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: (batch, d_inner, d_state), float32 (float64 for float64); zeros if absent.
            With cu_seqlens, one per sequence.
        cu_seqlens: (sequences + 1), int32 or int64, rising from 0 to length: packs several
            sequences into one row; batch must be 1.
        reverse: run backward in time: flip, scan and flip, within each sequence.
        return_final_state: also return h after the last step, as initial_state holds it.

    Returns:
        y of u's shape and type, or (y, final_state). Both are differentiable, once.

    Raises:
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    u, delta, B, C, z = library.autocast(u, delta, B, C, z)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    # An exported program runs forward only, even where it was traced with gradients on.
    train = library.needs_gradient(*tensors[:9]) and not torch.compiler.is_exporting()
    function = _Forward.apply if train else _ops.selective_scan
    y, final_state, _ = function(*tensors, delta_softplus, reverse, train)  # type: ignore[no-untyped-call]
    return (y, final_state) if return_final_state else y
