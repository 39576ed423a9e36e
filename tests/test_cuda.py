# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA kernels alone, emulated or on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import (
    assert_as_exact_as_pytorch,
    assert_float64_equal,
    assert_matches_reference,
    assert_same_bits,
    boundaries,
    packing,
    results,
)
from operators import CONV, OPERATORS, OVER_TIME, SCAN, Operator, Tensors, over_time, updates

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True),
]

OVERLOADS = [op.overload for op in OPERATORS] + [op.backward for op in OVER_TIME]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_emulated_kernels_are_in_place(overload: torch._ops.OpOverload) -> None:
    # The first kernel of a key is the active one.
    kernels = torch._C._dispatch_dump(overload.name()).split("\nCPU")
    assert "registered at emulated/csrc/" in kernels[1]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("version", "got"), [(12080, "one for CUDA 12.8"), (0, "no driver"), (13010, None)]
)
def test_a_driver_too_old_is_one_sentence(version: int, got: str | None) -> None:
    """In a process of its own, since a driver is checked once."""
    program = (
        "import sys, torch, mambablock\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "mambablock.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, os.environ["MAMBABLOCK_EMULATION"]],
        env=os.environ | {"MAMBABLOCK_EMULATION_DRIVER": str(version)},
        capture_output=True,
        text=True,
    )
    last = result.stderr.strip().split("\n")[-1]
    if got is None:
        assert result.returncode == 0
    else:
        assert last == (
            "RuntimeError: mambablock: the NVIDIA driver must be one for CUDA 13.0 or newer, since "
            f"the library was built with CUDA 13.0; got {got}; update the driver, or build "
            "mambablock with an older nvcc"
        )


def packed_results(op: Operator, values: list[int], reverse: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = op.make_inputs(1, 9, 5, 3, states=len(values) - 1)
    return results(op, tensors, cu_seqlens=torch.tensor(values), reverse=reverse)


@over_time
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
    op: Operator, reverse: bool, values: list[int], taken_for: list[int]
) -> None:
    expected = packed_results(op, taken_for, reverse)
    assert_same_bits(packed_results(op, values, reverse), expected)


@updates
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_indices_past_the_end_are_padding(op: Operator, dtype: torch.dtype) -> None:
    tensors = op.make_inputs()
    padding, *past_the_end = (
        results(op, tensors | {"state_indices": torch.tensor([1, outside, 0], dtype=dtype)})
        for outside in (-1, 3, 2**30)
    )
    assert not padding["y"][1].any()
    assert torch.equal(padding["state"][2], tensors["state"][2])
    for got in past_the_end:
        assert_same_bits(got, padding)


@over_time
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_sequences_than_a_block_has_threads(
    op: Operator, dtype: torch.dtype, reverse: bool
) -> None:
    lengths = [i % 3 for i in range(700)]
    tensors = op.make_inputs(1, sum(lengths), 2, 1 if op is SCAN else 4, states=len(lengths))
    assert_matches_reference(op, tensors, cu_seqlens=boundaries(lengths, dtype), reverse=reverse)


# The scan's in a type whose backward has blocks of more than one warp.
SEVERAL_WARPS = [(CONV, (2, 150, 130), torch.float32), (SCAN, (1, 150, 70, 16), torch.bfloat16)]


@pytest.mark.parametrize(("op", "sizes", "dtype"), SEVERAL_WARPS, ids=str)
def test_any_order_of_threads_gives_the_same_bits(
    op: Operator, sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = op.make_inputs(*sizes, dtype=dtype)
    expected = results(op, tensors)
    for seed in range(100, 103):
        # A device has an order of its own each time.
        monkeypatch.setenv("MAMBABLOCK_EMULATION_SEED", str(seed))
        assert_same_bits(results(op, tensors), expected)


@pytest.mark.usefixtures("emulated")
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
    states, cu_seqlens = packing(lengths)
    tensors = SCAN.make_inputs(1, 190, 70, d_state, states=states)
    chunks = torch.ops.mambablock.selective_scan_chunks(tensors["u"], 1)
    assert (chunks > 1) == (multiprocessors > 1)
    assert_matches_reference(SCAN, tensors, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("d_state", [16, 20])
def test_logarithm_of_A_in_chunks(d_state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", "1000")
    tensors = SCAN.make_inputs(1, 190, 70, d_state)
    tensors["A"] = torch.randn(70, d_state)
    assert torch.ops.mambablock.selective_scan_chunks(tensors["u"], 1) > 1
    assert_matches_reference(SCAN, tensors, A_is_log=True)


def test_chunks_of_no_groups() -> None:
    with pytest.raises(RuntimeError, match="groups must be a divisor of d_inner=4; got 0"):
        torch.ops.mambablock.selective_scan_chunks(torch.ones(2, 3, 4), 0)


def in_chunks_and_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, scan: Any, tensors: Tensors, least: int = 2, **options: Any
) -> list[dict[str, Tensor]]:
    found = []
    for multiprocessors in (1000, 1):
        monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", str(multiprocessors))
        chunks = torch.ops.mambablock.selective_scan_chunks(tensors["u"], 1)
        assert (chunks >= least) == (multiprocessors > 1)
        found.append(results(scan, tensors, **options))
    return found


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("reverse", [False, True])
def test_more_chunks_than_are_combined_at_once(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference's gradients take long here.
    tensors = SCAN.make_inputs(1, 9000, 1, 1)
    found = in_chunks_and_in_one_piece(monkeypatch, SCAN, tensors, least=129, reverse=reverse)
    assert_float64_equal(*found)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("state", ["zero", "small"])
@pytest.mark.parametrize(
    ("dtype", "dt", "small"), [(torch.float32, 1.5, 1e-30), (torch.float64, 12.0, 1e-250)]
)
@pytest.mark.parametrize("sign", [1, -1], ids=["A > 0", "dt < 0"])
@pytest.mark.parametrize("lengths", [None, [3, 187]])
@pytest.mark.parametrize("d_state", [1, 20])
def test_overflowing_decay_of_a_chunk(
    state: str,
    dtype: torch.dtype,
    dt: float,
    small: float,
    sign: int,
    lengths: list[int] | None,
    d_state: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decay of a chunk overflows, though no state does, nor the decay of any step."""
    states, cu_seqlens = packing(lengths)
    tensors = SCAN.make_inputs(1, 190, 70, d_state, states=states, dtype=dtype)
    tensors = {n: tensors[n].abs() for n in ("u", "delta", "A", "B", "C", "initial_state")}
    tensors["A"].clamp_(0.95, 1).mul_(sign)
    tensors["delta"].fill_(sign * dt)
    if state == "zero":
        # Zero before the last steps, and its gradient is zero after the first.
        tensors["u"][:, :170], tensors["initial_state"] = 0, None
    else:
        # It grows in the second of three chunks, over 64 steps.
        tensors["u"].zero_()
        tensors["delta"][:, :64] = tensors["delta"][:, 128:] = 0
        tensors["initial_state"].fill_(small)

    def scan(**tensors: Tensor) -> tuple[Tensor, ...]:
        y, last = SCAN(**tensors, delta_softplus=False, cu_seqlens=cu_seqlens)
        used = y[:, :20] if state == "zero" else (last * small).sum()
        return used, y.detach(), last.detach()

    got, expected = in_chunks_and_in_one_piece(monkeypatch, scan, tensors)
    for name, value in expected.items():
        assert value.isfinite().all(), name
        # The decays of 64 steps multiplied, of exponents that add up to 96 (768 in float64).
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=0)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("lengths", [None, [100, 248, 100]])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "initial_state"])
def test_nan_reaches_the_chunks_of_its_sequence(
    lengths: list[int] | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the fourth of seven chunks over another one into the next, where the sequence ends.
    states, cu_seqlens = packing(lengths)
    tensors = SCAN.make_inputs(1, 448, 70, 2, states=states)
    channel_or_state_or_step = {"A": 0, "initial_state": (states or 1) // 2}.get(name, (0, 230))
    tensors[name][channel_or_state_or_step] = float("nan")
    got, expected = in_chunks_and_in_one_piece(
        monkeypatch, SCAN, tensors, least=7, cu_seqlens=cu_seqlens
    )
    assert expected["output 0"][:, 340].isnan().any()
    for output, value in expected.items():
        torch.testing.assert_close(
            got[output], value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=output
        )


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("shared_memory", [64 << 10, 227 << 10])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_in_blocks_of_32_and_64_channels(
    shared_memory: int, groups: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBABLOCK_EMULATION_SHARED_MEMORY", str(shared_memory))
    assert_as_exact_as_pytorch(SCAN, SCAN.make_inputs(2, 35, 140, 16, groups, dtype=dtype))
