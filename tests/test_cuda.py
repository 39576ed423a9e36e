# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA kernels alone, emulated or on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mambablock
import test_causal_conv1d
import test_selective_scan
import test_updates
from compare import (
    assert_as_exact_as_pytorch,
    assert_float64_equal,
    boundaries,
    gradients,
)
from conftest import EMULATION
from mambablock import reference

pytestmark = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)

OPERATORS = (
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "selective_scan",
    "selective_scan_backward",
    "selective_state_update",
)


@pytest.fixture(autouse=True)
def _on(device: torch.device) -> torch.device:
    return device


@pytest.mark.skipif(not EMULATION, reason="no kernel is emulated")
@pytest.mark.parametrize("op", OPERATORS)
def test_emulated_kernels_are_in_place(op: str) -> None:
    # The first kernel of a key is the active one.
    kernels = torch._C._dispatch_dump(f"mambablock::{op}").split("\nCPU")
    assert "registered at emulated/csrc/" in kernels[1]


def packed_gradients(op: str, values: list[int], reverse: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = test_causal_conv1d if op == "causal_conv1d" else test_selective_scan
    tensors = module.make_inputs(1, 9, 5, 3, states=len(values) - 1)
    options = module.OPTIONS | {"cu_seqlens": torch.tensor(values), "reverse": reverse}
    return gradients(lambda **t: getattr(mambablock, op)(**t, **options), tensors)


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("values", "taken_for"),
    [
        ([1, 9], [0, 9]),
        ([0, 5], [0, 9]),
        ([0, 7, 5, 9], [0, 7, 7, 9]),
        ([0, 2**40, 9], [0, 9, 9]),
        ([0, -(2**40), 9], [0, 0, 9]),
        ([3, 3, 3], [0, 3, 9]),
    ],
)
def test_no_value_of_cu_seqlens_leads_out_of_bounds(
    op: str, reverse: bool, values: list[int], taken_for: list[int]
) -> None:
    got = packed_gradients(op, values, reverse)
    for name, expected in packed_gradients(op, taken_for, reverse).items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_indices_past_the_end_are_padding(dtype: torch.dtype) -> None:
    for name, tensors in (
        ("causal_conv1d_update", test_updates.conv_inputs()),
        ("selective_state_update", test_updates.scan_inputs()),
    ):
        results: list[tuple[Tensor, Tensor]] = []
        for outside in (-1, 3, 2**30):
            state = tensors["state"].clone()
            indices = torch.tensor([1, outside, 0], dtype=dtype)
            y = getattr(mambablock, name)(**(tensors | {"state": state}), state_indices=indices)
            results.append((y, state))
        assert not results[0][0][1].any()
        assert torch.equal(results[0][1][2], tensors["state"][2])
        for y, state in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(state, results[0][1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_sequences_than_a_block_has_threads(dtype: torch.dtype, reverse: bool) -> None:
    lengths = [i % 3 for i in range(700)]
    cu_seqlens = boundaries(lengths, dtype)
    conv = test_causal_conv1d.make_inputs(1, sum(lengths), 2, states=len(lengths))
    test_causal_conv1d.both(conv, cu_seqlens=cu_seqlens, reverse=reverse)
    scan = test_selective_scan.make_inputs(1, sum(lengths), 2, 1, states=len(lengths))
    test_selective_scan.both(scan, cu_seqlens=cu_seqlens, reverse=reverse)


def scan_gradients() -> dict[str, Tensor]:
    torch.manual_seed(0)
    # In a type whose backward has blocks of more than one warp.
    tensors = test_selective_scan.make_inputs(1, 150, 70, 16, dtype=torch.bfloat16)
    options: dict[str, Any] = test_selective_scan.OPTIONS
    return gradients(lambda **t: mambablock.selective_scan(**t, **options), tensors)


def conv_gradients() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = test_causal_conv1d.make_inputs(2, 150, 130, dtype=torch.float32)
    options: dict[str, Any] = test_causal_conv1d.OPTIONS
    return gradients(lambda **t: mambablock.causal_conv1d(**t, **options), tensors)


@pytest.mark.parametrize("results", [conv_gradients, scan_gradients])
def test_any_order_of_threads_gives_the_same_bits(
    results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results()
    for seed in range(100, 103):
        # A device has an order of its own each time.
        monkeypatch.setenv("MAMBABLOCK_EMULATION_SEED", str(seed))
        for name, value in results().items():
            assert torch.equal(value, expected[name]), name


emulated = pytest.mark.skipif(not EMULATION, reason="a device has what it has")


@emulated
@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("lengths", [None, [0, 3, 140, 0, 1, 46], [190]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("d_state", [1, 20])
def test_time_in_one_piece_and_in_chunks(
    multiprocessors: int,
    lengths: list[int] | None,
    reverse: bool,
    d_state: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    states = None if lengths is None else len(lengths)
    tensors = test_selective_scan.make_inputs(1, 190, 70, d_state, states=states)
    chunks = torch.ops.mambablock.selective_scan_chunks(tensors["u"], 1)
    assert (chunks > 1) == (multiprocessors > 1)
    test_selective_scan.both(tensors, cu_seqlens=cu_seqlens, reverse=reverse)


def test_chunks_of_no_groups() -> None:
    with pytest.raises(RuntimeError, match="groups must be a divisor of d_inner=4; got 0"):
        torch.ops.mambablock.selective_scan_chunks(torch.ones(2, 3, 4), 0)


@emulated
@pytest.mark.parametrize("reverse", [False, True])
def test_more_chunks_than_are_combined_at_once(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", "1000")
    tensors = test_selective_scan.make_inputs(1, 9000, 1, 1)
    assert torch.ops.mambablock.selective_scan_chunks(tensors["u"], 1) > 128
    # The reference's gradients take long here.
    options = test_selective_scan.OPTIONS | {"reverse": reverse}
    got = gradients(lambda **t: mambablock.selective_scan(**t, **options), tensors)
    monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", "1")
    expected = gradients(lambda **t: mambablock.selective_scan(**t, **options), tensors)
    assert_float64_equal(got, expected)


@emulated
@pytest.mark.parametrize("shared_memory", [64 << 10, 227 << 10])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_in_blocks_of_32_and_64_channels(
    shared_memory: int, groups: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBABLOCK_EMULATION_SHARED_MEMORY", str(shared_memory))
    tensors = test_selective_scan.make_inputs(2, 35, 140, 16, groups, dtype=dtype)
    options = test_selective_scan.OPTIONS
    exact = test_selective_scan.as_dtype(tensors, torch.float64)
    assert_as_exact_as_pytorch(
        gradients(lambda **t: mambablock.selective_scan(**t, **options), tensors),
        gradients(lambda **t: reference.selective_scan(**t, **options), tensors),
        gradients(lambda **t: reference.selective_scan(**t, **options), exact),
    )
