# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d: sizes, and outputs larger than the caches."""

from __future__ import annotations

import pytest
import torch

import mambablock
from compare import assert_matches_reference
from operators import CONV

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 127, 128, 129, 131, 261])
@pytest.mark.parametrize("width", [1, 2, 4, 5, 70])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_widths(length: int, width: int, reverse: bool) -> None:
    assert_matches_reference(CONV, CONV.make_inputs(length=length, width=width), reverse=reverse)


@pytest.mark.parametrize("d_inner", [1, 8, 31, 128, 129, 300])
@pytest.mark.parametrize("silu", [False, True])
def test_channels(d_inner: int, silu: bool) -> None:
    assert_matches_reference(CONV, CONV.make_inputs(1, 6, d_inner), silu=silu)


def test_outputs_larger_than_the_caches() -> None:
    """Non-temporal stores write the same bits as others."""
    length, d_inner = 4100, 4128  # over 64 MiB of float32; a last vector of channels in each half
    x = torch.randn(1, length, d_inner, requires_grad=True)
    weight = torch.randn(d_inner, 4)
    y = mambablock.causal_conv1d(x, weight, silu=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for half in (slice(d_inner // 2), slice(d_inner // 2, None)):
        part = x.detach()[..., half].contiguous().requires_grad_()
        y_part = mambablock.causal_conv1d(part, weight[half], silu=True)
        (dx_part,) = torch.autograd.grad(y_part.sum(), part)
        assert torch.equal(y[..., half], y_part)
        assert torch.equal(dx[..., half], dx_part)
