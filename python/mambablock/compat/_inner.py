# SPDX-License-Identifier: Apache-2.0
"""The Mamba block between its outer projections, as mamba-ssm's and Vision Mamba's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._layers import in_scan_dtype, recomputed_but_scan
from ..causal_conv1d import causal_conv1d
from ..selective_scan import selective_scan
from ._scan import scan

__all__ = ["Norms", "inner", "out_proj"]


class Norms(NamedTuple):
    """Weights of RMS norms: of B and C (dstate), of delta (dim) before its bias."""

    B: Tensor | None = None
    C: Tensor | None = None
    delta: Tensor | None = None
    eps: float = 1e-6


def inner(
    owner: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    scans: Sequence[tuple[Tensor, bool]],
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    checkpoint_lvl: int = 1,
    norms: Norms = Norms(),  # noqa: B008
    reverse: bool = False,
    plain: bool = False,
    out_proj_weight: Tensor | None = None,
) -> Tensor:
    """The sum of the gated scans, (batch, seqlen, dim); arguments as mamba_inner_fn has them.

    Args:
        owner: whose name errors have.
        scans: of each scan its A, and whether it runs backward in time.
        reverse: the convolution runs backward in time.
        plain: by the operators' definitions.
        out_proj_weight: to be checked, if the caller has one.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{owner}: checkpoint_lvl must be 0 or 1; got {checkpoint_lvl!r}")
    A = scans[0][0]
    rank, rows = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    _check_projections(
        owner,
        xz,
        [rank + i * rows for i in range((B is None) + (C is None), 3)],
        x_proj_weight=x_proj_weight,
        delta_proj_weight=delta_proj_weight,
        out_proj_weight=out_proj_weight,
    )
    conv: Any = reference.causal_conv1d if plain else causal_conv1d
    operator = reference.selective_scan if plain else selective_scan

    def mix(x: Tensor, z: Tensor) -> Tensor:
        x = conv(x, conv1d_weight.squeeze(1), bias=conv1d_bias, silu=True, reverse=reverse)
        projected = F.linear(x, x_proj_weight)
        delta = F.linear(projected[..., :rank], delta_proj_weight)
        own_B, own_C = projected[..., rank : rank + rows], projected[..., -rows:]
        if norms.delta is not None:
            delta = _rms_norm(delta, norms.delta, norms.eps)
        arguments = (
            _given_or_own(B, own_B, A, B_proj_bias, norms.B, norms.eps),
            _given_or_own(C, own_C, A, C_proj_bias, norms.C, norms.eps),
            *(D, z.transpose(1, 2), delta_bias, delta_softplus),
        )
        x, delta = x.transpose(1, 2), delta.transpose(1, 2)
        first, *others = (
            scan(x, delta, own_A, *arguments, reverse=backward, operator=operator)[0]
            for own_A, backward in scans
        )
        return sum(others, first).transpose(1, 2)

    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    recompute = checkpoint_lvl == 1 and torch.is_grad_enabled() and not plain and not A.is_complex()
    return recomputed_but_scan(mix, x, z) if recompute else mix(x, z)


def out_proj(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y, weight, None if bias is None else bias.to(y.dtype))


def _check_projections(owner: str, xz: Tensor, rows: list[int], **weights: Tensor | None) -> None:
    """The matrices; x_proj may have rows of a B or C that is given all the same."""
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dim() != 2 or weight.device != xz.device:
            expected = f"a matrix on {xz.device}"
        elif weight.dtype != xz.dtype and not check.autocasts(xz.device.type):
            expected = f"{xz.dtype} as xz"
        elif name == "x_proj_weight" and weight.shape[0] not in rows:
            expected = f"of {rows[0]} rows, for delta and each of B and C that is not given"
        else:
            continue
        got = f"{tuple(weight.shape)} of {weight.dtype} on {weight.device}"
        raise ValueError(f"{owner}: {name} must be {expected}; got {got}")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    upcast = in_scan_dtype(x)
    return F.rms_norm(upcast, weight.shape, weight.to(upcast.dtype), eps).to(x.dtype)


def _given_or_own(
    given: Tensor | None,
    own: Tensor,
    A: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
) -> Tensor:
    """B or C as selective_scan_fn takes it, from x_proj's (batch, length, dstate) if not given."""
    if given is None:
        own = own if bias is None else own + bias.to(own.dtype)
        if A.is_complex():
            pairs = own.to(A.real.dtype).unflatten(-1, (A.shape[1], 2))
            own = torch.view_as_complex(pairs.contiguous())
        given = own.transpose(1, 2)
    if norm is None:
        return given
    states = -1 if given.dim() == 2 else -2
    return _rms_norm(given.movedim(states, -1), norm, eps).movedim(-1, states)
