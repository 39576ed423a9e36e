# SPDX-License-Identifier: Apache-2.0
"""MambaBlock(recompute=True): the same numbers from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blocks import assert_same
from compare import assert_same_bits, gradients
from mambablock import MambaBlock
from operators import Calls

pytestmark = pytest.mark.usefixtures("device")

BATCH, LENGTH = 2, 70


def make_pair(**options: Any) -> tuple[MambaBlock, MambaBlock]:
    """A block that keeps all, and one that recomputes, of the same weights."""
    torch.manual_seed(0)
    options = {"d_model": 6, "d_state": 5, "dtype": torch.float64} | options
    keeping, recomputing = MambaBlock(**options), MambaBlock(recompute=True, **options)
    recomputing.load_state_dict(keeping.state_dict())
    return keeping, recomputing


def results(block: MambaBlock, hidden: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """The outputs and their gradients."""
    leaves = [hidden.clone().requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
    y, last = block(leaves[0], *arguments, return_state=True, **options)
    return [y, *last, *gradients((y, *last), leaves)]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (BATCH, {}),
        (BATCH, {"attention_mask": [[t >= 9 * row for t in range(LENGTH)] for row in (1, 0)]}),
        (1, {"cu_seqlens": [0, 3, 3, LENGTH]}),
    ],
    ids=["plain", "padded", "packed"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_same_bits(rows: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {name: torch.tensor(values) for name, values in options.items()}
    keeping, recomputing = make_pair(dtype=dtype)
    hidden = torch.randn(rows, LENGTH, 6, dtype=dtype)
    state = keeping.allocate_state(3 if "cu_seqlens" in options else rows)
    expected = results(keeping, hidden, state, **options)
    assert_same_bits(results(recomputing, hidden, state, **options), expected)


def bytes_kept(block: MambaBlock, hidden: Tensor) -> int:
    """What autograd keeps for the backward, each storage once, without the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(hidden)
    assert y.requires_grad
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_keeps_neither_the_convolutions_output_nor_delta() -> None:
    keeping, recomputing = make_pair(d_model=32)
    hidden = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64)
    saved = bytes_kept(keeping, hidden) - bytes_kept(recomputing, hidden)
    # Both have d_inner = 64 numbers of 8 bytes a token.
    assert saved >= 2 * 64 * 8 * BATCH * LENGTH


def test_the_scan_runs_once() -> None:
    _, block = make_pair()
    hidden = torch.randn(BATCH, LENGTH, 6, dtype=torch.float64)
    with Calls() as calls:
        block(hidden).sum().backward()
    assert len(calls.of("mambablock::selective_scan")) == 1
    assert len(calls.of("mambablock::causal_conv1d")) == 2


def test_under_autocast(device: torch.device) -> None:
    keeping, recomputing = make_pair(dtype=torch.float32)
    hidden = torch.randn(BATCH, LENGTH, 6)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same_bits(results(recomputing, hidden), results(keeping, hidden))


def test_with_hooks_and_without_gradients() -> None:
    _, block = make_pair()
    calls = []
    block.x_proj.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(BATCH, LENGTH, 6, dtype=torch.float64)
    with torch.no_grad():
        block(hidden)
    assert len(calls) == 1
    block(hidden).sum().backward()
    assert len(calls) == 3


def test_compiles() -> None:
    keeping, recomputing = make_pair()
    torch.compiler.reset()
    compiled = torch.compile(recomputing, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(BATCH, LENGTH, 6, dtype=torch.float64)
    expected = torch.autograd.grad(keeping(hidden).sum(), list(keeping.parameters()))
    got = torch.autograd.grad(compiled(hidden).sum(), list(recomputing.parameters()))
    assert_same(got, expected)  # the compiler may fuse
