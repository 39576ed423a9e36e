# SPDX-License-Identifier: Apache-2.0
"""Runs a test's body on several gloo processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _process(rank: int, ranks: int, body: Callable[[int], None], rendezvous: str) -> None:
    torch.set_num_threads(1)
    # The host name need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A rank that waits for another fails, instead of hanging.
    options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=rendezvous, **options)
    try:
        body(rank)
    finally:
        # A process group that is freed only at interpreter shutdown aborts the process.
        gc.collect()
        dist.destroy_process_group()


def run_on_ranks(ranks: int, body: Callable[[int], None], folder: Path) -> None:
    """body(rank) on each; the first that fails ends all, with its traceback."""
    mp.spawn(_process, (ranks, body, f"file://{folder}/rendezvous"), nprocs=ranks)
