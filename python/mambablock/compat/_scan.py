# SPDX-License-Identifier: Apache-2.0
"""The scan as mamba-ssm lays it out, and with a complex A.

Sequences are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layers import in_scan_dtype
from ..selective_scan import selective_scan

__all__ = ["channels_last", "common_dtype", "per_time_forms", "scan", "upcast"]


def per_time_forms(A: Any, tensor: Any) -> tuple[str, ...]:
    """The forms of B and C: where A is complex, they are too, or real and imaginary parts."""
    pairs = getattr(A, "is_complex", bool)() and not getattr(tensor, "is_complex", bool)()
    steps = "2 * seqlen" if pairs else "seqlen"
    return "dim, dstate", f"batch, dstate, {steps}", f"batch, groups, dstate, {steps}"


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    operator: Callable[..., Any] = selective_scan,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's selective scan: y of u's shape and type, and the last state.

    B and C are (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen). A complex
    A takes a plain loop over time; real B and C are then of twice the seqlen, with real and
    imaginary parts in turn. `operator` is selective_scan or its definition.
    """
    if A.is_complex():
        return _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    *tensors, D, z, delta_bias = channels_last(u, delta, A, B, C, D, z, delta_bias)
    y, last_state = operator(
        *tensors,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        reverse=reverse,
        return_final_state=True,
    )
    return y.transpose(1, 2).to(u.dtype), last_state


def channels_last(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Any, ...]:
    """The same in the layout and the types that the operator takes."""
    gate = [] if z is None else [z]
    dtype = common_dtype(u, delta, B, C, *gate)
    inputs, dt, *gate = (t.transpose(1, 2).to(dtype) for t in (u, delta, *gate))
    per_time = (_channels_last(t.to(dtype), inputs) for t in (B, C))
    B, C = (_in_groups(t, u.shape[1]) if B.dim() != C.dim() else t for t in per_time)
    D, delta_bias = upcast(D), upcast(delta_bias)
    return inputs, dt, in_scan_dtype(A), B, C, D, gate[0] if gate else None, delta_bias


def _complex_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """h is complex, and y twice its real part, as if each state had its conjugate beside it."""
    batch, dim, length = u.shape
    dtype = A.real.dtype
    inputs, dt = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (_complex_per_step(t, dtype, batch, dim, length) for t in (B, C))
    h = A.new_zeros(batch, dim, A.shape[1])
    outputs: list[Tensor] = [inputs[..., 0]] * length
    for t in range(length - 1, -1, -1) if reverse else range(length):
        step = dt[..., t, None]
        h = torch.exp(step * A) * h + step * inputs[..., t, None] * B[..., t]
        outputs[t] = 2 * (C[..., t] * h).sum(-1).real
    y = torch.stack(outputs, dim=-1) if length > 0 else inputs
    if D is not None:
        y = y + D.to(dtype)[:, None] * inputs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def common_dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def upcast(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else in_scan_dtype(parameter)


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


def _complex_per_step(
    tensor: Tensor, dtype: torch.dtype, batch: int, dim: int, length: int
) -> Tensor:
    """B or C as complex (batch, dim or 1, dstate, seqlen)."""
    if tensor.dim() == 2:
        return tensor[None, :, :, None].expand(batch, -1, -1, length)
    if not tensor.is_complex():
        tensor = torch.view_as_complex(tensor.to(dtype).unflatten(-1, (length, 2)).contiguous())
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return tensor.repeat_interleave(dim // tensor.shape[1], dim=1)
