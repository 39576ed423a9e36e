# SPDX-License-Identifier: Apache-2.0
"""VMamba's compiled extension "oflex": the raw selective scan whose y may be float32.

Its functions are called by position. Tensors are (batch, dim, seqlen), in any memory layout; delta
and its bias may have fewer channels, each for a run of u's. nrows changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambablock._layers import in_scan_dtype
from mambablock.compat._explain import explained
from mambablock.compat._raw_scan import backward, forms, forward

__all__ = ["bwd", "fwd"]


@explained(forms)
@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
) -> list[Tensor]:
    """[y, x], as selective_scan_cuda.fwd; y is not rounded to u's type if out_float.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    delta, delta_bias = _repeated(delta, delta_bias, u)
    inputs = in_scan_dtype(u) if out_float else u
    return list(forward(inputs, delta, A, B, C, D, delta_bias, delta_softplus))


@explained(forms)
@torch.no_grad()
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Any]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]; None for an absent D or delta_bias.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    runs = u.shape[1] // max(delta.shape[1], 1)
    repeated, bias = _repeated(delta, delta_bias, u)
    inputs = u.to(torch.promote_types(u.dtype, dout.dtype))
    du, ddelta, *rest, dbias, _ = backward(
        dout, x, inputs, repeated, A, B, C, D, None, bias, delta_softplus
    )
    if runs > 1:
        ddelta = ddelta.unflatten(1, (-1, runs)).sum(2)
        dbias = None if dbias is None else dbias.unflatten(0, (-1, runs)).sum(1)
    return [du.to(u.dtype), ddelta, *rest, dbias]


def _repeated(delta: Tensor, delta_bias: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None]:
    runs = u.shape[1] // max(delta.shape[1], 1)
    if runs > 1:
        delta = delta.repeat_interleave(runs, dim=1)
        delta_bias = None if delta_bias is None else delta_bias.repeat_interleave(runs)
    return delta, delta_bias
