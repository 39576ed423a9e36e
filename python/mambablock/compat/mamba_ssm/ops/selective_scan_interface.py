# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba-1 functions and module (version 2.3) on mambablock's operators.

Sequences are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._layers import in_scan_dtype, recomputed_but_scan
from ..causal_conv1d import causal_conv1d
from ..selective_scan import selective_scan
from ..selective_state_update import selective_state_update as _update
from ._explain import Forms, explained
from .mamba_simple import Mamba

__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn", "selective_state_update"]

_per_time = ("dim, dstate", "batch, dstate, seqlen", "batch, groups, dstate, seqlen")
_scan_forms: Forms = {
    "A": "dim, dstate",
    "u": "batch, dim, seqlen",
    "delta": "batch, dim, seqlen",
    "B": _per_time,
    "C": _per_time,
    "D": "dim",
    "z": "batch, dim, seqlen",
    "delta_bias": "dim",
}
_inner_forms: Forms = {
    "conv1d_weight": "dim, 1, width",
    "conv1d_bias": "dim",
    "xz": "batch, 2 * dim, seqlen",
    "delta_proj_weight": "dim, dt_rank",
    "x_proj_weight": "rows, dim",
    "out_proj_weight": "d_model, dim",
    "out_proj_bias": "d_model",
    **_scan_forms,
    "B_proj_bias": "dstate",
    "C_proj_bias": "dstate",
    "b_rms_weight": "dstate",
    "c_rms_weight": "dstate",
    "dt_rms_weight": "dim",
}


def _update_forms(state: Any, A: Any, state_batch_indices: Any = None, **_: Any) -> Forms:
    heads = getattr(state, "ndim", 3) == 4 or getattr(A, "ndim", 2) == 3
    channels = "heads, dim" if heads else "dim"
    rows = "batch" if state_batch_indices is None else "rows"
    return {
        "A": f"{channels}, dstate",
        "x": f"batch, {channels}",
        "dt": f"batch, {channels}",
        "state": f"{rows}, {channels}, dstate",
        "B": ("batch, dstate", "batch, groups, dstate"),
        "C": ("batch, dstate", "batch, groups, dstate"),
        "D": channels,
        "z": f"batch, {channels}",
        "dt_bias": channels,
        "state_batch_indices": "batch",
    }


@explained(_scan_forms)
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan (Gu & Dao 2023, arXiv:2312.00752, algorithm 2).

    Args:
        u, delta: (batch, dim, seqlen).
        A: (dim, dstate), real.
        B, C: (batch, dstate, seqlen), (batch, groups, dstate, seqlen), or constant in time:
            (dim, dstate), whose gradient takes memory for every step.
        D: (dim).
        z: (batch, dim, seqlen): the gate.
        delta_bias: (dim).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.

    Returns:
        The output, of u's shape and type, or (output, last state (batch, dim, dstate) in float32).
        Both are differentiable, the state too.

    Raises:
        NotImplementedError: A is complex.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
        RuntimeError: as from :func:`mambablock.selective_scan`.
    """
    check.floating("selective_scan_fn", "u", u)
    _forbid_complex("selective_scan_fn", A)
    y, last_state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, last_state) if return_last_state else y


@explained(_inner_forms, x="xz", weight="conv1d_weight", bias="conv1d_bias")
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba block after its input projection.

    Args:
        xz: (batch, 2 * dim, seqlen), x first.
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim).
        x_proj_weight: (dt_rank + 2 * dstate, dim), in the order delta, B, C.
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight: (d_model, dim).
        out_proj_bias: (d_model).
        A, B, C, D, delta_bias, delta_softplus: as in selective_scan_fn; B or C, if absent, comes
            from x_proj.
        B_proj_bias, C_proj_bias: (dstate), added to a B or C from x_proj.
        checkpoint_lvl: 1 recomputes the convolution and delta in the backward, 0 saves them.
        b_rms_weight, c_rms_weight: (dstate), of an RMS norm of B and C.
        dt_rms_weight: (dim), of an RMS norm of delta, before its bias.
        b_c_dt_rms_eps: these norms' epsilon.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        NotImplementedError: A is complex.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device, or another checkpoint_lvl.
        RuntimeError: as from :func:`mambablock.selective_scan`.
    """
    owner = "mamba_inner_fn"
    _forbid_complex(owner, A)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{owner}: checkpoint_lvl must be 0 or 1; got {checkpoint_lvl!r}")
    rank, state_size, eps = delta_proj_weight.shape[1], A.shape[1], b_c_dt_rms_eps
    _check_projections(
        xz,
        [rank + i * state_size for i in range((B is None) + (C is None), 3)],
        x_proj_weight=x_proj_weight,
        delta_proj_weight=delta_proj_weight,
        out_proj_weight=out_proj_weight,
    )

    def inner(x: Tensor, z: Tensor) -> Tensor:
        x = causal_conv1d(x, conv1d_weight.squeeze(1), bias=conv1d_bias, silu=True)
        projected = F.linear(x, x_proj_weight)
        delta = F.linear(projected[..., :rank], delta_proj_weight)
        own_B, own_C = projected[..., rank : rank + state_size], projected[..., -state_size:]
        if dt_rms_weight is not None:
            delta = _rms_norm(delta, dt_rms_weight, eps)
        y, _ = _scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            A,
            _given_or_own(B, own_B, B_proj_bias, b_rms_weight, eps),
            _given_or_own(C, own_C, C_proj_bias, c_rms_weight, eps),
            D,
            z.transpose(1, 2),
            delta_bias,
            delta_softplus,
        )
        return y.transpose(1, 2)

    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    recompute = checkpoint_lvl == 1 and torch.is_grad_enabled()
    y = recomputed_but_scan(inner, x, z) if recompute else inner(x, z)
    bias = None if out_proj_bias is None else out_proj_bias.to(y.dtype)
    return F.linear(y, out_proj_weight, bias)


@explained(_update_forms, indices=("state_batch_indices",), u="x", delta="dt", delta_bias="dt_bias")
@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """The scan's next step, advancing the state in place; not differentiable.

    Args:
        state: (batch, dim, dstate), or (batch, heads, dim, dstate) where the other arguments' dim
            is (heads, dim) too; any floating type. Changed in place.
        x, dt, z: (batch, dim).
        A: (dim, dstate), real.
        B, C: (batch, dstate) or (batch, groups, dstate).
        D, dt_bias: (dim).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch), int32 or int64: each row's row of state, which may have more.
            A negative one is padding: its output is 0, no state changes.

    Returns:
        The output, of x's shape and type.

    Raises:
        NotImplementedError: A is complex.
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device; the state is then as it was.
        RuntimeError: as from :func:`mambablock.selective_state_update`.
    """
    check.floating("selective_state_update", "x", x)
    _forbid_complex("selective_state_update", A)
    shape, out_dtype = x.shape, x.dtype
    gate = [] if z is None else [z]
    if state.dim() == 4:
        heads = state.shape[1:3]
        shapes = [t.shape[1:] for t in (x, dt, *gate)]
        shapes += [t.shape[:2] for t in (A, D, dt_bias) if t is not None]
        if any(shape != heads for shape in shapes):
            raise ValueError("selective_state_update: all must have the heads and dim of state")
        state = state.view(state.shape[0], -1, state.shape[3])
        x, dt, *gate = (t.flatten(1) for t in (x, dt, *gate))
        A = A.flatten(0, 1)
        D = None if D is None else D.flatten()
        dt_bias = None if dt_bias is None else dt_bias.flatten()
    dtype = _common_dtype(x, dt, B, C, *gate)
    x, dt, B, C, *gate = (t.to(dtype) for t in (x, dt, B, C, *gate))
    y = _update(
        state,
        x,
        dt,
        in_scan_dtype(A),
        B,
        C,
        D=_upcast(D),
        z=gate[0] if gate else None,
        delta_bias=_upcast(dt_bias),
        delta_softplus=dt_softplus,
        state_indices=state_batch_indices,
    )
    return y.view(shape).to(out_dtype)


def _forbid_complex(function: str, A: Tensor) -> None:
    if A.is_complex():
        raise NotImplementedError(f"{function}: A must be real; got {A.dtype}")


def _check_projections(xz: Tensor, rows: list[int], **weights: Tensor) -> None:
    """mamba_inner_fn's matrices; x_proj may have rows of a B or C that is given all the same."""
    for name, weight in weights.items():
        if weight.dim() != 2 or weight.device != xz.device:
            expected = f"a matrix on {xz.device}"
        elif weight.dtype != xz.dtype and not check.autocasts(xz.device.type):
            expected = f"{xz.dtype} as xz"
        elif name == "x_proj_weight" and weight.shape[0] not in rows:
            expected = f"of {rows[0]} rows, for delta and each of B and C that is not given"
        else:
            continue
        got = f"{tuple(weight.shape)} of {weight.dtype} on {weight.device}"
        raise ValueError(f"mamba_inner_fn: {name} must be {expected}; got {got}")


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _upcast(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else in_scan_dtype(parameter)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    upcast = in_scan_dtype(x)
    return F.rms_norm(upcast, weight.shape, weight.to(upcast.dtype), eps).to(x.dtype)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    gate = [] if z is None else [z]
    dtype = _common_dtype(u, delta, B, C, *gate)
    inputs, dt, *gate = (t.transpose(1, 2).to(dtype) for t in (u, delta, *gate))
    per_time = (_channels_last(t.to(dtype), inputs) for t in (B, C))
    y, last_state = selective_scan(
        inputs,
        dt,
        in_scan_dtype(A),
        *(_in_groups(t, u.shape[1]) if B.dim() != C.dim() else t for t in per_time),
        D=_upcast(D),
        z=gate[0] if gate else None,
        delta_bias=_upcast(delta_bias),
        delta_softplus=delta_softplus,
        return_final_state=True,
    )
    return y.transpose(1, 2).to(u.dtype), last_state


def _channels_last(tensor: Tensor, inputs: Tensor) -> Tensor:
    """B or C as (batch, length, dstate) or (batch, length, groups, dstate)."""
    if tensor.dim() == 2:
        return tensor.expand(*inputs.shape, -1)
    return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)


def _in_groups(tensor: Tensor, groups: int) -> Tensor:
    """B or C, of fewer groups or none, as (batch, length, groups, dstate)."""
    grouped = tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
    repeated = grouped.unsqueeze(3).expand(-1, -1, -1, groups // grouped.shape[2], -1)
    return repeated.flatten(2, 3)


def _given_or_own(
    given: Tensor | None, own: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    """B or C as selective_scan_fn takes it, from x_proj's (batch, length, dstate) if not given."""
    if given is None:
        given = (own if bias is None else own + bias.to(own.dtype)).transpose(1, 2)
    if norm is None:
        return given
    states = -1 if given.dim() == 2 else -2
    return _rms_norm(given.movedim(states, -1), norm, eps).movedim(-1, states)
