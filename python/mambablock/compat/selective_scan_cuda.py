# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's compiled extension: the raw selective scan, without autograd, on any device.

Its functions are called by position. Tensors are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambablock._layers import in_scan_dtype
from mambablock.compat._explain import explained
from mambablock.compat._raw_scan import backward, forms, forward

__all__ = ["bwd", "fwd"]


@explained(forms, may_be_complex=("A", "B", "C", "x"))
@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[y before the gate, x], and the gated y if there is a z.

    x is (batch, dim, 1, 2 * dstate), of which x[:, :, -1, 1::2] is the last state; for bwd.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    y, x = forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [y, x] if z is None else [y, x, _gated(y, z)]


@explained(forms, may_be_complex=("A", "B", "C", "x"))
@torch.no_grad()
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Any]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz if there is a z, and then the gated y if
    recompute_out_z; None for the gradient of an absent D or delta_bias.

    x and out are what fwd returned first; a dz is written to.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    *gradients, own_dz = backward(dout, x, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if z is None:
        return gradients
    gradients.append(own_dz if dz is None else dz.copy_(own_dz))
    if recompute_out_z:
        if out is None:
            out, _ = forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
        gradients.append(_gated(out, z))
    return gradients


def _gated(y: Tensor, z: Tensor) -> Tensor:
    return F.silu(in_scan_dtype(z)).mul_(y).to(z.dtype)
