# SPDX-License-Identifier: Apache-2.0
"""selective_scan: sizes, groups, and the range of its values."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

import mambablock
from compare import assert_matches_reference, assert_same_bits, results
from mambablock import reference
from operators import DTYPES, SCAN, SCAN_UPDATE, Operator, as_dtype

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(length: int, reverse: bool) -> None:
    assert_matches_reference(SCAN, SCAN.make_inputs(length=length), reverse=reverse)


@pytest.mark.parametrize("d_inner", [1, 7, 8, 16, 33, 64, 65, 130])
@pytest.mark.parametrize("d_state", [1, 2, 5, 16])
def test_sizes(d_inner: int, d_state: int) -> None:
    assert_matches_reference(SCAN, SCAN.make_inputs(1, 5, d_inner, d_state))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups(groups: int) -> None:
    assert_matches_reference(SCAN, SCAN.make_inputs(2, 7, 6, 3, groups))


SCANS = pytest.mark.parametrize("op", [SCAN, SCAN_UPDATE], ids=str)


@SCANS
@pytest.mark.parametrize("d_state", [1, 16, 20])
@pytest.mark.parametrize("A_dtype", [torch.float64, torch.float32])
def test_logarithm_of_A(op: Operator, d_state: int, A_dtype: torch.dtype) -> None:
    tensors = op.make_inputs(2, 35, 6, d_state) if op is SCAN else op.make_inputs(2, 6, d_state)
    tensors["A"] = torch.randn(6, d_state, dtype=A_dtype)
    assert_matches_reference(op, tensors, A_is_log=True)


@SCANS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A_dtype", ["accumulator", "as activations"])
def test_logarithm_of_A_gives_the_bits_of_exp(
    op: Operator, dtype: torch.dtype, A_dtype: str
) -> None:
    if "MAMBABLOCK_EMULATION" in os.environ:
        pytest.skip("emulated kernels have the C library's exp, which is not PyTorch's on the CPU")
    tensors = op.make_inputs(2, dtype=dtype)
    A_log = torch.randn_like(tensors["A"])
    if A_dtype == "as activations":
        A_log = A_log.to(dtype)

    def with_exp(A: torch.Tensor, **others: torch.Tensor) -> object:
        return op(A=-torch.exp(A.to(tensors["D"].dtype)), **others)

    tensors["A"] = A_log
    assert_same_bits(results(partial(op, A_is_log=True), tensors), results(with_exp, tensors))


def test_wide_range_of_dt_and_unstable_A() -> None:
    tensors = SCAN.make_inputs(1, 56, 3, 2)
    tensors["delta"] = (
        torch.linspace(-30, 25, 56, dtype=torch.float64).view(1, -1, 1).expand(1, 56, 3)
    )
    tensors["A"] = torch.tensor([[-1.0, -16.0], [0.001, 0.0], [-300.0, -1e-6]], dtype=torch.float64)
    assert_matches_reference(SCAN, tensors)
    y = mambablock.selective_scan(**as_dtype(tensors, torch.float32), delta_softplus=True)
    expected = reference.selective_scan(**tensors, delta_softplus=True)
    # Rounding of dt * A, up to 25 * 16, moves the decay by 400 roundings at most.
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_growing_state_with_a_big_bias() -> None:
    tensors = SCAN.make_inputs(1, 40, 3, 2, dtype=torch.float32)
    tensors["A"] = torch.tensor([[0.5, 0.1], [2.0, -1.0], [40.0, 0.0]])
    tensors["delta_bias"] = torch.tensor([5.0, 3.0, 1.0])
    y, state = SCAN(**tensors)
    expected, expected_state = SCAN.reference(**tensors)
    # exp(5 * 0.5 * 40) is near float32's end, and the last channel beyond it: infinite in both.
    assert torch.equal(state.isfinite(), expected_state.isfinite())
    assert not state.isfinite().all()
    finite = expected.isfinite() & (expected.abs() < 1e30)
    # Forty decays multiplied, each to a few roundings of its exponent of up to 3.
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_past_2_31_elements() -> None:
    length, d_inner = 2**20 + 70, 2048
    u, B = torch.randn(1, 2 * d_inner), torch.randn(1, length, 1).bfloat16()
    wide = u.bfloat16()[:, None].expand(1, length, -1)[..., ::2]
    tensors = {"u": wide, "delta": wide, "A": -torch.rand(d_inner, 1), "B": B, "C": B}
    y, state = SCAN(**tensors)
    assert y.numel() > 2**31
    half = length // 2
    first, second = (
        {n: t if n == "A" else t[:, steps] for n, t in tensors.items()}
        for steps in (slice(half), slice(half, None))
    )
    _, middle = SCAN(**first)
    end, final = SCAN(**second, initial_state=middle)
    assert torch.equal(y[:, half:], end)
    assert torch.equal(state, final)
