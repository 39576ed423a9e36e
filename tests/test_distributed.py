# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 on two gloo processes, against one process that sees the whole batch."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mambablock import MambaBlock

PROCESSES = 2

# Sums of some hundred float64 terms in another order, through two optimiser steps.
assert_same = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [MambaBlock(6, d_state=5, dtype=torch.float64, recompute=i == 1) for i in range(2)]
    return nn.Sequential(*blocks)


def train(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """The losses of some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(parameter: Tensor) -> Tensor:
    """The unsharded parameter."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def compare(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = make_model()
    alone = copy.deepcopy(model)
    batches = [torch.randn(2 * PROCESSES, 9, 6, dtype=torch.float64) for _ in range(3)]
    wrapped = wrap(model)
    losses = torch.stack(train(wrapped, [batch.chunk(PROCESSES)[rank] for batch in batches]))
    dist.all_reduce(losses)
    assert_same(losses / PROCESSES, torch.stack(train(alone, batches)))
    for got, expected in zip(wrapped.parameters(), alone.parameters(), strict=True):
        assert_same(full(got), expected)
    dist.barrier()


def worker(rank: int, wrap: Callable[[nn.Module], nn.Module], rendezvous: str) -> None:
    torch.set_num_threads(1)
    # The host name need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    try:
        compare(rank, wrap)
    finally:
        # A process group that is freed only at interpreter shutdown aborts the process.
        gc.collect()
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [data_parallel, sharded])
def test_trains_as_one_process_does(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    mp.spawn(worker, (wrap, f"file://{tmp_path}/rendezvous"), nprocs=PROCESSES)
