# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution: public function, fake, autograd and vmap."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _library as library

_op = "causal_conv1d"
_ops = torch.ops.mambablock

# (x, weight, bias, initial_state, cu_seqlens, silu, reverse)
_channel_dims = (2, 0, 0, 2, None, None, None)
_gradient_dims = (2, 0, 0, 2)


def _check(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, **others: Tensor | None
) -> None:
    library.check_devices(_op, "x", x, weight=weight, initial_state=initial_state, **others)
    if x.dim() != 3:
        raise RuntimeError(f"{_op}: x must be (batch, length, d_inner); got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise RuntimeError(
            f"{_op}: weight must be (d_inner={x.shape[2]}, d_conv); got {tuple(weight.shape)}"
        )


@library.register_fake("causal_conv1d")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, initial_state, bias=bias, cu_seqlens=cu_seqlens)
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (states, weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(state_shape, dtype=library.accumulator_dtype(x.dtype))


@library.register_fake("causal_conv1d_backward")
def _fake_backward(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, initial_state, bias=bias, cu_seqlens=cu_seqlens, dy=dy)
    dtype = library.accumulator_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0 if initial_state is None else initial_state.shape, dtype=dtype),
    )


class _Backward(torch.autograd.Function):
    # Every argument by name: torch.compile counts them to see that there is no ctx.
    @staticmethod
    def forward(
        dy: Any,
        dfinal_state: Any,
        x: Any,
        weight: Any,
        bias: Any,
        initial_state: Any,
        cu_seqlens: Any,
        silu: Any,
        reverse: Any,
    ) -> Any:
        return _ops.causal_conv1d_backward(
            dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        library.forbid_double_backward(_op)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_backward(info, in_dims, *args)


_vmap_backward = library.channel_vmap(_op, _Backward.apply, (2, 2, *_channel_dims), _gradient_dims)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    # Where nobody differentiates again, without a Function's overhead.
    function = _Backward.apply if torch.is_grad_enabled() else _ops.causal_conv1d_backward
    dx, dweight, dbias, dinitial_state = function(  # type: ignore[no-untyped-call]
        dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, ctx.silu, ctx.reverse
    )
    return (
        dx,
        dweight,
        library.none_if_empty(dbias, bias),
        library.none_if_empty(dinitial_state, initial_state),
        None,
        None,
        None,
    )


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Any,
        weight: Any,
        bias: Any,
        initial_state: Any,
        cu_seqlens: Any,
        silu: Any,
        reverse: Any,
    ) -> Any:
        return _ops.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu, reverse)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_forward(info, in_dims, *args)


_vmap_forward = library.channel_vmap(_op, _Forward.apply, _channel_dims, (2, 2))

torch.library.register_autograd(
    "mambablock::causal_conv1d", _backward, setup_context=_setup_context
)
torch.library.register_vmap(
    "mambablock::causal_conv1d",
    library.channel_vmap(_op, _ops.causal_conv1d, _channel_dims, (2, 2)),
)
torch.library.register_vmap(
    "mambablock::causal_conv1d_backward",
    library.channel_vmap(_op, _ops.causal_conv1d_backward, (2, 2, *_channel_dims), _gradient_dims),
)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = ...,
    silu: bool = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = ...,
    silu: bool = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along time, with an optional SiLU.

    ``y[t] = act(bias + sum_w weight[:, w] * x[t - (d_conv - 1) + w])`` (Gu & Dao 2023,
    arXiv:2312.00752, section 3.4), computed in float32 (float64 for float64).

    Args:
        x: (batch, length, d_inner), float32, bfloat16, float16 or float64; any strides, native
            where the last one is 1.
        weight: (d_inner, d_conv), float32 or x's type.
        bias: (d_inner), float32 or x's type.
        silu: apply SiLU to the sum.
        initial_state: (batch, d_conv - 1, d_inner), float32 (float64 for float64): the inputs
            before the first, oldest first; zeros if absent. With cu_seqlens, one per sequence.
        cu_seqlens: (sequences + 1), int32 or int64, rising from 0 to length: packs several
            sequences into one row; batch must be 1.
        reverse: run backward in time: flip, convolve and flip, within each sequence.
        return_final_state: also return the last d_conv - 1 inputs, as initial_state holds them.

    Returns:
        y of x's shape and type, or (y, final_state). Both are differentiable, once.

    Raises:
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    (x,) = library.autocast(x)
    args = (x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    function = _Forward.apply if library.needs_gradient(*args[:4]) else _ops.causal_conv1d
    y, final_state = function(*args)  # type: ignore[no-untyped-call]
    return (y, final_state) if return_final_state else y
