# SPDX-License-Identifier: Apache-2.0
"""torch.compile and torch.export of the block over lengths and batches, and checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, make_block
from compare import assert_same_bits, gradients
from mambablock import MambaBlock, MambaState


def results(
    function: Callable[..., Any], block: MambaBlock, hidden: Tensor, state: MambaState
) -> list[Tensor]:
    """The outputs and their gradients."""
    leaves = [hidden.requires_grad_(), *block.parameters()]
    y, last = function(hidden, state, return_state=True)
    return [y, *last, *gradients((y, *last), leaves)]


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The default code generator takes seconds to compile, so it runs one case.
@pytest.mark.parametrize(
    ("dynamic", "backend", "compilations"),
    [(True, "inductor", 1), (None, "aot_eager", 2), (False, "aot_eager", 5)],
)
def test_compiles_once_for_all_lengths(
    dynamic: bool | None, backend: str, compilations: int
) -> None:
    # Wide enough that inductor does not specialise its matrix products on their sizes.
    block = make_block(d_model=32, bias=True)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=counter)
    for length in (7, 64, 65, 130, 9):
        hidden, state = torch.randn(2, length, 32, dtype=torch.float64), block.allocate_state(2)
        assert_same(results(compiled, block, hidden, state), results(block, block, hidden, state))
    assert counter.frame_count == compilations


class Streaming(nn.Module):
    def __init__(self, block: MambaBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        return self.block(x, state, return_state=True)


def test_exports_for_any_batch_and_length() -> None:
    block = make_block(bias=True)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=4096)
    program = torch.export.export(
        Streaming(block),
        (torch.randn(2, 7, 6, dtype=torch.float64), block.allocate_state(2)),
        dynamic_shapes=({0: batch, 1: length}, MambaState({0: batch}, {0: batch})),
    )
    scan = torch.ops.mambablock.selective_scan.default
    saves_states = [node.args[-1] for node in program.graph.nodes if node.target is scan]
    assert saves_states == [False]
    module = program.module()
    for rows, steps in ((1, 1), (2, 7), (5, 130)):
        hidden = torch.randn(rows, steps, 6, dtype=torch.float64)
        state = MambaState(*(torch.randn_like(s) for s in block.allocate_state(rows)))
        assert_same(module(hidden, state), Streaming(block)(hidden, state))


def test_checkpoint() -> None:
    block = make_block(bias=True)
    hidden, state = torch.randn(2, 9, 6, dtype=torch.float64), block.allocate_state(2)
    wrapped = partial(checkpoint, block, use_reentrant=False)
    expected = results(block, block, hidden, state)
    # The same operations twice.
    assert_same_bits(results(wrapped, block, hidden, state), expected)
