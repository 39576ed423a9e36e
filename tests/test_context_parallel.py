# SPDX-License-Identifier: Apache-2.0
"""A sequence over gloo processes, against one process that has all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mambablock import _context_parallel
from mambablock.distributed import ContextParallel
from operators import CONV, SCAN, Operator
from processes import run_on_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

# Sums of some hundred float64 terms in another order.
assert_same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

# By the number of ranks: the lengths of contiguous shards. The convolution is 4 wide, so halos span
# up to three ranks.
SHARDS = {
    1: [[11]],
    2: [[35, 34], [2, 9], [0, 5], [6, 0]],
    3: [[34, 33, 40], [5, 1, 2], [0, 3, 0], [7, 0, 1]],
    4: [[5, 33, 2, 8], [1, 1, 1, 1], [2, 0, 0, 3], [0, 0, 0, 0]],
}


def sharded(cp: ContextParallel, lengths: list[int], tensor: Tensor) -> Tensor:
    """This rank's shard along dimension 1."""
    if cp.layout == "contiguous":
        return tensor.split(lengths, 1)[cp.rank]
    pieces = tensor.chunk(2 * cp.size, 1)
    return torch.cat([pieces[cp.rank], pieces[2 * cp.size - 1 - cp.rank]], 1)


def layouts() -> Iterator[tuple[str, list[int]]]:
    ranks = dist.get_world_size()
    for lengths in SHARDS[ranks]:
        yield "contiguous", lengths
    for length in (2, 12):
        yield "zigzag", [length] * ranks


def packings(length: int) -> list[Tensor | None]:
    """None, and boundaries of sequences: some cross ranks, some have no steps."""
    inside = sorted(min(length, at) for at in (0, 3, 3, 4, length // 2))
    return [None, torch.tensor([0, *inside, length, length], dtype=torch.int32)]


def compare(
    op: Callable[..., Any],
    leaves: dict[str, Tensor],
    timed: tuple[str, ...],
    cp: Any,
    lengths: list[int],
    **options: Any,
) -> None:
    """op of whole tensors with cu_seqlens against op of shards with context_parallel."""
    whole = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    outputs = op(**whole, **options, cu_seqlens=cp.cu_seqlens)
    # The loss of each rank has weights of its own for the replicated states.
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    ranks = torch.arange(1, cp.size + 1, dtype=torch.float64)
    loss = (outputs[0] * weights[0]).sum()
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        loss = loss + ranks.sum() * (output * weight).sum()
    expected = torch.autograd.grad(loss, list(whole.values()), allow_unused=True)

    shards = {n: sharded(cp, lengths, t) if n in timed else t for n, t in leaves.items()}
    shards = {name: t.detach().clone().requires_grad_() for name, t in shards.items()}

    def run() -> tuple[list[Tensor], list[Tensor]]:
        found = op(**shards, **options, context_parallel=cp)
        loss = (found[0] * sharded(cp, lengths, weights[0])).sum()
        for output, weight in zip(found[1:], weights[1:], strict=True):
            loss = loss + ranks[cp.rank] * (output * weight).sum()
        return list(found), list(torch.autograd.grad(loss, list(shards.values())))

    found, gradients = run()
    assert_same(found[0], sharded(cp, lengths, outputs[0]))
    for got, output in zip(found[1:], outputs[1:], strict=True):
        assert_same(got, output)
        same = [torch.empty_like(got) for _ in range(cp.size)]
        dist.all_gather(same, got.detach().contiguous())
        assert all(torch.equal(same[0], other) for other in same)
    for name, gradient, of_whole in zip(shards, gradients, expected, strict=True):
        if name in timed:
            assert_same(gradient, sharded(cp, lengths, of_whole))
        else:
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            assert_same(gradient, of_whole)
    again, gradients_again = run()
    for first, second in zip([*found, *gradients], [*again, *gradients_again], strict=True):
        if first.numel() and not torch.equal(first, second):
            raise AssertionError("two runs differ")


def check_operator(op: Operator, absent: tuple[str, ...] = (), **sizes: Any) -> None:
    for (layout, lengths), reverse in itertools.product(layouts(), (False, True)):
        for cu_seqlens in packings(sum(lengths)):
            torch.manual_seed(0)
            cp = ContextParallel(dist.group.WORLD, layout=layout, cu_seqlens=cu_seqlens)
            states = None if cu_seqlens is None else len(cu_seqlens) - 1
            rows = 2 if cu_seqlens is None else 1
            inputs = op.make_inputs(rows, sum(lengths), states=states, **sizes)
            inputs = {name: t for name, t in inputs.items() if name not in absent}
            compare(op, inputs, op.activations, cp, lengths, reverse=reverse)


def check_operators(rank: int) -> None:
    check_operator(CONV)
    check_operator(CONV, ("bias", "initial_state"), width=1)
    check_operator(CONV, ("initial_state",), width=3)
    check_operator(SCAN, d_inner=6, groups=2)
    check_operator(SCAN, ("D", "z", "delta_bias", "initial_state"))
    # Each rank combines a part of the channels.
    with mock.patch.object(_context_parallel, "GATHERED_RANKS", 0):
        check_operator(CONV)
        check_operator(SCAN, d_inner=5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_operators(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(ranks, check_operators, tmp_path)
