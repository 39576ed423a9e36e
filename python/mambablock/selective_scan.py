# SPDX-License-Identifier: Apache-2.0
"""The selective scan: public function, fakes, autograd and vmap."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from . import _library as library
from . import _sharded_scan as sharded
from ._context_parallel import ContextParallel


def check_fake(op: str, a: Any, *dimensions: str) -> None:
    """The sizes of fake tensors; `dimensions` are u's before d_inner: batch and, if any, length."""
    library.check_shape(op, "u", a.u, **dict.fromkeys((*dimensions, "d_inner")))
    *sizes, d_inner = a.u.shape
    steps = dict(zip(dimensions, sizes, strict=True))
    library.check_shape(op, "delta", a.delta, **steps, d_inner=d_inner)
    library.check_shape(op, "A", a.A, d_inner=d_inner, d_state=None)
    groups = {"groups": a.B.shape[-2]} if a.B.dim() == len(steps) + 2 else {}
    for name, tensor in (("B", a.B), ("C", a.C)):
        library.check_shape(op, name, tensor, **steps, **groups, d_state=a.A.shape[1])


@library.register_fake("selective_scan", "u")
def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_fake("selective_scan", a, "batch", "length")
    batch, length, d_inner = a.u.shape
    d_state = a.A.shape[1]
    dtype = library.accumulator_dtype(a.u.dtype)
    states = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    apart, as_activations = library.SAVED_STATES["cuda" if a.u.is_cuda else "cpu"]
    saved = (length + apart - 1) // apart
    saved_shape = (batch, saved * d_state, d_inner) if a.save_states else (0,)
    return (
        a.u.new_empty(a.u.shape),
        a.u.new_empty((states, d_inner, d_state), dtype=dtype),
        a.u.new_empty(saved_shape, dtype=a.u.dtype if a.u.dtype in as_activations else dtype),
    )


@library.register_fake("selective_scan_backward", "u")
def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    check_fake("selective_scan_backward", a, "batch", "length")
    inputs = (a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias)
    return (
        *(a.u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs),
        library.gradient_of_state(a.u, a.initial_state),
    )


_call = library.differentiable(
    "selective_scan",
    activations=("u", "delta", "B", "C", "z"),
    channels={
        "u": 2,
        "delta": 2,
        "A": 0,
        "B": 2,
        "C": 2,
        "D": 0,
        "z": 2,
        "delta_bias": 0,
        "initial_state": 1,
    },
    outputs={"dy": 2, "dfinal_state": 1, "saved_states": 2},
    grouped=("B", "C"),
)


class _Options(TypedDict, total=False):
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    reverse: bool
    A_is_log: bool
    context_parallel: ContextParallel | None


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    return_final_state: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    return_final_state: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    A_is_log: bool = False,
    return_final_state: bool = False,
    context_parallel: ContextParallel | None = None,
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
        initial_state: (batch, d_inner, d_state), float32 (float64 for float64); zeros if absent.
            With cu_seqlens, one per sequence.
        cu_seqlens: (sequences + 1), int32 or int64, rising from 0 to length: packs several
            sequences into one row; batch must be 1.
        delta_softplus: apply softplus to delta + delta_bias.
        reverse: run backward in time: flip, scan and flip, within each sequence.
        A_is_log: A is a block's A_log, for which -exp(A) stands, taken in float32 (float64 for
            float64 u).
        return_final_state: also return h after the last step, as initial_state holds it.
        context_parallel: the activations are shards along length, as it describes; see
            :class:`mambablock.distributed.ContextParallel`.

    Returns:
        y of u's shape and type, or (y, final_state). Both are differentiable, once.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    arguments = (*tensors, delta_softplus, reverse, A_is_log)
    if context_parallel is None:
        y, final_state, _ = _call(*arguments)
    else:
        y, final_state = sharded.selective_scan(context_parallel, return_final_state, *arguments)
    return (y, final_state) if return_final_state else y
