# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution: public function, fakes, autograd and vmap."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from . import _library as library
from . import _sharded_conv as sharded
from ._context_parallel import ContextParallel


def check_fake(op: str, a: Any, *dimensions: str) -> None:
    """The sizes of fake tensors; `dimensions` are x's before d_inner: batch and, if any, length."""
    library.check_shape(op, "x", a.x, **dict.fromkeys((*dimensions, "d_inner")))
    library.check_shape(op, "weight", a.weight, d_inner=a.x.shape[-1], d_conv=None)


@library.register_fake("causal_conv1d", "x")
def _fake(a: Any) -> tuple[Tensor, Tensor]:
    check_fake("causal_conv1d", a, "batch", "length")
    states = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    state_shape = (states, a.weight.shape[1] - 1, a.x.shape[2])
    dtype = library.accumulator_dtype(a.x.dtype)
    return a.x.new_empty(a.x.shape), a.x.new_empty(state_shape, dtype=dtype)


@library.register_fake("causal_conv1d_backward", "x")
def _fake_backward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_fake("causal_conv1d_backward", a, "batch", "length")
    return (
        a.x.new_empty(a.x.shape),
        a.weight.new_empty(a.weight.shape),
        a.x.new_empty(0) if a.bias is None else a.bias.new_empty(a.bias.shape),
        library.gradient_of_state(a.x, a.initial_state),
    )


_call = library.differentiable(
    "causal_conv1d",
    activations=("x",),
    channels={"x": 2, "weight": 0, "bias": 0, "initial_state": 2},
    outputs={"dy": 2, "dfinal_state": 2},
)


class _Options(TypedDict, total=False):
    bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool
    reverse: bool
    context_parallel: ContextParallel | None


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    return_final_state: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    return_final_state: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
    return_final_state: bool = False,
    context_parallel: ContextParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along time, with an optional SiLU.

    ``y[t] = act(bias + sum_w weight[:, w] * x[t - (d_conv - 1) + w])`` (Gu & Dao 2023,
    arXiv:2312.00752, section 3.4), computed in float32 (float64 for float64).

    Args:
        x: (batch, length, d_inner), float32, bfloat16, float16 or float64; any strides, native
            where the last one is 1.
        weight: (d_inner, d_conv), float32 or x's type.
        bias: (d_inner), float32 or x's type.
        initial_state: (batch, d_conv - 1, d_inner), float32 (float64 for float64): the inputs
            before the first, oldest first; zeros if absent. With cu_seqlens, one per sequence.
        cu_seqlens: (sequences + 1), int32 or int64, rising from 0 to length: packs several
            sequences into one row; batch must be 1.
        silu: apply SiLU to the sum.
        reverse: run backward in time: flip, convolve and flip, within each sequence.
        return_final_state: also return the last d_conv - 1 inputs, as initial_state holds them.
        context_parallel: x is a shard along length, as it describes; see
            :class:`mambablock.distributed.ContextParallel`.

    Returns:
        y of x's shape and type, or (y, final_state). Both are differentiable, once.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    arguments = (x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    if context_parallel is None:
        y, final_state = _call(*arguments)
    else:
        y, final_state = sharded.causal_conv1d(context_parallel, return_final_state, *arguments)
    return (y, final_state) if return_final_state else y
