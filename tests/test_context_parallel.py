# SPDX-License-Identifier: Apache-2.0
"""A sequence over gloo processes, against one process that has all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from blocks import make_block, random_state
from mambablock import MambaBlock, MambaState, _context_parallel, _sharded_scan
from mambablock.distributed import ContextParallel
from operators import CONV, SCAN, Calls, Operator
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


def check_block(rank: int) -> None:
    ranks = dist.get_world_size()
    lengths = SHARDS[ranks][0]
    torch.manual_seed(0)
    for recompute, cu_seqlens in itertools.product((False, True), packings(sum(lengths))):
        block = make_block(bias=True, recompute=recompute)
        cp = ContextParallel(dist.group.WORLD, cu_seqlens=cu_seqlens)
        rows = 2 if cu_seqlens is None else len(cu_seqlens) - 1
        state = random_state(block, rows)
        x = torch.randn(2 if cu_seqlens is None else 1, sum(lengths), 6, dtype=torch.float64)
        leaves = {"hidden_states": x, "conv": state.conv, "ssm": state.ssm}
        leaves |= dict(block.named_parameters())

        def run(
            hidden_states: Tensor,
            conv: Tensor,
            ssm: Tensor,
            block: MambaBlock = block,
            context_parallel: ContextParallel | None = None,
            cu_seqlens: Tensor | None = None,
            **parameters: Tensor,
        ) -> tuple[Tensor, ...]:
            options = {"context_parallel": context_parallel, "cu_seqlens": cu_seqlens}
            arguments = (hidden_states, MambaState(conv, ssm))
            y, states = torch.func.functional_call(
                block, parameters, arguments, options | {"return_state": True}
            )
            return y, *states

        compare(run, leaves, ("hidden_states",), cp, lengths)
        exchanges_once(block, cp, sharded(cp, lengths, x))
    compiled = torch.compile(make_block(recompute=True), fullgraph=True, backend="aot_eager")
    cp, shard = ContextParallel(dist.group.WORLD), torch.randn(2, 9, 6, dtype=torch.float64)
    shard.requires_grad_()
    leaves = [shard, *compiled.parameters()]
    outputs = [f(shard, context_parallel=cp) for f in (compiled, compiled._orig_mod)]
    gradients = [torch.autograd.grad(y.sum(), leaves) for y in outputs]
    assert_same(outputs[0], outputs[1])
    assert_same(gradients[0], gradients[1])


def exchanges_once(block: MambaBlock, cp: ContextParallel, shard: Tensor) -> None:
    """The backward exchanges gradients alone, also where it recomputes the block; no rank is given
    as much as the sequence."""
    with Calls() as forward:
        y = block(shard, context_parallel=cp)
    with Calls() as backward:
        y.sum().backward()
    # Lengths and last inputs of the convolution, the scan's summary, the lengths again if packed.
    gathers = 3 if cp.cu_seqlens is None else 4
    name = "_c10d_functional::all_gather_into_tensor"
    assert len(forward.of(name)) == gathers
    assert len(backward.of(name)) == 2
    block.zero_grad()


def check_errors(rank: int) -> None:
    """Each on every rank, at once."""
    ranks, world = dist.get_world_size(), dist.group.WORLD
    block = make_block()
    x = torch.randn(1, 4, 6, dtype=torch.float64)

    def call(length: int = 4, **options: Any) -> Any:
        return lambda: block(x[:, :length], context_parallel=ContextParallel(world, **options))

    def mesh() -> Any:
        names = ("a", "b")
        found = dist.device_mesh.init_device_mesh("cpu", (1, ranks), mesh_dim_names=names)
        return ContextParallel(found)

    def scan(**options: Any) -> Any:
        inputs = SCAN.make_inputs(1)
        cp = ContextParallel(world, check=True)
        return lambda: SCAN.function(**(inputs | options), context_parallel=cp)

    wrong_end = torch.tensor([0, 4 * ranks + 1])
    mask = torch.ones(1, 4, dtype=torch.bool)
    cp = ContextParallel(world)
    for function, error, text in (
        (lambda: ContextParallel(world, layout="ring"), ValueError, "layout must be .*'ring'"),
        (lambda: ContextParallel(3), TypeError, "mesh must be a DeviceMesh or a .*; got 3"),
        (mesh, ValueError, "mesh must have one dimension; got 2"),
        (lambda: ContextParallel(world, cu_seqlens=[0]), TypeError, "cu_seqlens must be a Tensor"),
        (lambda: ContextParallel(world, cu_seqlens=mask), ValueError, r"cu_seqlens must be \(seq"),
        (call(cu_seqlens=wrong_end), ValueError, "cu_seqlens must end with the global length"),
        (call(cu_seqlens=torch.tensor([0, 3, 2, 4 * ranks])), ValueError, "cu_seqlens must rise"),
        (call(3, layout="zigzag"), ValueError, "length must be .* equal"),
        (call(4 if rank else 2, layout="zigzag"), ValueError, r"length must be .*; got \[2, 4"),
        (lambda: setattr(cp, "rank", 1), AttributeError, "rank must not be assigned"),
        (
            lambda: block(x, context_parallel=cp, attention_mask=mask),
            ValueError,
            "attention_mask and a ContextParallel must not",
        ),
        (
            lambda: block(x, context_parallel=cp, cu_seqlens=torch.tensor([0, 4])),
            ValueError,
            "cu_seqlens must be given to it",
        ),
        (lambda: block(x, context_parallel=world), TypeError, "must be a ContextParallel; got"),
        (
            scan(D=torch.zeros(4 + rank, dtype=torch.float64)),
            ValueError,
            r"selective_scan's D must be the same on every rank; got .*\(4\) on rank 0 and .*\(5\)",
        ),
        (scan(z=None) if rank else scan(), ValueError, "z must be the same .* None on rank 1"),
    ):
        with pytest.raises(error, match=text) as raised:
            function()
        assert "ContextParallel" in str(raised.value)
        dist.barrier()


def check_others(rank: int) -> None:
    check_block(rank)
    check_errors(rank)


def test_block_and_errors(tmp_path: Path) -> None:
    run_on_ranks(2, check_others, tmp_path)


class Held(Exception):
    """What a rank sends, where another one's part of it is not there yet."""


def test_fold_of_many_ranks() -> None:
    """512 ranks in one process: each composes a part of the channels, by 9 steps."""
    ranks, channels, d_state = 512, 1024, 3
    A = -torch.rand(d_state, channels, dtype=torch.float64)
    carry = torch.randn(ranks, 1, d_state, channels, dtype=torch.float64)
    dt_sum = torch.rand(ranks, 1, 1, channels, dtype=torch.float64)
    expected, h = [], torch.zeros_like(carry[0])
    for rank in range(ranks):
        expected.append(h)
        h = torch.exp(A * dt_sum[rank]) * h + carry[rank]
    steps: list[int] = []

    def combine(summaries: Tensor, first: int, wanted: range) -> tuple[Tensor, Tensor | None]:
        state, dt = summaries.split([d_state, 1], dim=-2)
        part = A[:, first : first + state.shape[-1]]
        with mock.patch.object(_sharded_scan, "decayed", wraps=_sharded_scan.decayed) as counted:
            after = _sharded_scan.composed(state, dt, part, None)
        steps.append(counted.call_count)
        return torch.cat([torch.zeros_like(after[:1]), after[:-1]]), None

    arrived: list[Tensor] = []  # of each exchange: (from, to, ...)

    def swap(cp: Any, sent: Tensor) -> Tensor:
        if cp.exchanges == len(arrived):
            raise Held(sent)
        cp.exchanges += 1
        return arrived[cp.exchanges - 1][:, cp.rank]

    def all_ranks() -> list[Any]:
        found: list[Any] = []
        for rank in range(ranks):
            cp = SimpleNamespace(size=ranks, rank=rank, layout="contiguous", exchanges=0)
            summary = torch.cat([carry[rank], dt_sum[rank]], dim=-2)[None]
            try:
                found.append(_context_parallel.exchange(cp, summary, False, combine)[0])
            except Held as held:
                found.append(held.args[0])
        return found

    with mock.patch.object(_context_parallel, "swap", swap):
        arrived.append(torch.stack(all_ranks()))
        arrived.append(torch.stack(all_ranks()))
        found = all_ranks()
    assert set(steps) == {9}
    assert_same(torch.cat(found), torch.stack(expected))
