# SPDX-License-Identifier: Apache-2.0
"""A block in CUDA graphs: captured once, replayed on other values. They need a device."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from blocks import make_block
from compare import boundaries
from mambablock import MambaBlock

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True),
    pytest.mark.skipif("MAMBABLOCK_EMULATION" in os.environ, reason="graphs are not emulated"),
]

# cuBLAS may take another algorithm in a graph: float32 sums of some dozen terms in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

LENGTH = 70


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of function(), which has run before, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def float32_block() -> MambaBlock:
    return make_block(d_model=16, d_state=16, dtype=torch.float32)


@pytest.mark.parametrize("lengths", [None, [3, 0, 41, 26]], ids=["one sequence", "packed"])
@torch.no_grad()
def test_prefill(lengths: list[int] | None) -> None:
    block, hidden = float32_block(), torch.randn(1, LENGTH, 16)
    cu_seqlens = None if lengths is None else boundaries(lengths)
    found: list[Tensor] = []

    def prefill() -> None:
        y, state = block(hidden, cu_seqlens=cu_seqlens, return_state=True)
        found[:] = [y, *state]

    graph = captured(prefill)
    hidden.copy_(torch.randn_like(hidden))
    if cu_seqlens is not None:
        cu_seqlens.copy_(boundaries([30, 1, 0, 39]))
    graph.replay()
    y, state = block(hidden, cu_seqlens=cu_seqlens, return_state=True)
    assert_close(found, [y, *state])


def test_decoding() -> None:
    block, token = float32_block(), torch.randn(2, 16)
    state = block.allocate_state(2)
    found: list[Tensor] = []

    def step() -> None:
        found[:] = [block.step(token, state)]

    graph = captured(step)
    for tensor in state:
        tensor.zero_()
    hidden = torch.randn(2, 5, 16)
    steps = []
    for t in range(5):
        token.copy_(hidden[:, t])
        graph.replay()
        steps.append(found[0].clone())
    y, last = block(hidden, return_state=True)
    assert_close(torch.stack(steps, 1), y.detach())
    assert_close([*state], [tensor.detach() for tensor in last])


def test_training_step() -> None:
    block, hidden = float32_block(), torch.randn(2, LENGTH, 16)
    eager = copy.deepcopy(block)
    before = [p.detach().clone() for p in block.parameters()]

    def step(block: MambaBlock) -> None:
        block(hidden).square().mean().backward()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None

    graph = captured(partial(step, block))
    with torch.no_grad():
        for parameter, value in zip(block.parameters(), before, strict=True):
            parameter.copy_(value)
    for _ in range(3):
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        step(eager)
    assert_close([*block.parameters()], [*eager.parameters()])
