# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's selective_state_update (version 2.3) on mambablock's operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambablock import _checks as check
from mambablock import reference
from mambablock._layers import in_scan_dtype
from mambablock.compat._explain import Forms, explained
from mambablock.compat._scan import common_dtype, upcast
from mambablock.selective_state_update import selective_state_update as _update

__all__ = ["selective_state_update", "selective_state_update_ref"]


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
    return _in_rows(
        "selective_state_update",
        _update,
        *(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices),
    )


@explained(_update_forms)
@torch.no_grad()
def selective_state_update_ref(
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
) -> Tensor:
    """selective_state_update by its definition, in plain PyTorch."""
    return _in_rows(
        "selective_state_update_ref",
        reference.selective_state_update,
        *(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None),
    )


def _in_rows(
    owner: str,
    operator: Callable[..., Tensor],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    """The operator on heads and dim as one dimension, in the inputs' common type."""
    check.floating(owner, "x", x)
    if A.is_complex():
        raise NotImplementedError(f"{owner}: A must be real; got {A.dtype}")
    shape, out_dtype = x.shape, x.dtype
    gate = [] if z is None else [z]
    if state.dim() == 4:
        heads = state.shape[1:3]
        shapes = [t.shape[1:] for t in (x, dt, *gate)]
        shapes += [t.shape[:2] for t in (A, D, dt_bias) if t is not None]
        if any(shape != heads for shape in shapes):
            raise ValueError(f"{owner}: all must have the heads and dim of state")
        state = state.view(state.shape[0], -1, state.shape[3])
        x, dt, *gate = (t.flatten(1) for t in (x, dt, *gate))
        A = A.flatten(0, 1)
        D = None if D is None else D.flatten()
        dt_bias = None if dt_bias is None else dt_bias.flatten()
    dtype = common_dtype(x, dt, B, C, *gate)
    x, dt, B, C, *gate = (t.to(dtype) for t in (x, dt, B, C, *gate))
    y = operator(
        state,
        x,
        dt,
        in_scan_dtype(A),
        B,
        C,
        D=upcast(D),
        z=gate[0] if gate else None,
        delta_bias=upcast(dt_bias),
        delta_softplus=dt_softplus,
        state_indices=state_batch_indices,
    )
    return y.view(shape).to(out_dtype)
