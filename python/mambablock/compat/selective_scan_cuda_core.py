# SPDX-License-Identifier: Apache-2.0
"""VMamba's compiled extension "core": the raw selective scan without a gate, on any device.

Its functions are called by position. Tensors are (batch, dim, seqlen), in any memory layout; nrows
changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
) -> list[Tensor]:
    """[y, x], as selective_scan_cuda.fwd.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
    """
    return list(forward(u, delta, A, B, C, D, delta_bias, delta_softplus))


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
    return backward(dout, x, u, delta, A, B, C, D, None, delta_bias, delta_softplus)[:-1]
