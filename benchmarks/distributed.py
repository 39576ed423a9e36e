# SPDX-License-Identifier: Apache-2.0
"""One long sequence over two processes of one thread each, against one process of one thread."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambablock import MambaBlock, selective_scan
from mambablock.distributed import ContextParallel

from .measure import FORWARD, STEP, Timings, proc_bytes, return_freed_memory
from .results import Results
from .settings import D_CONV, D_STATE, Settings

RANKS, D_MODEL = 2, 512
ALONE, SHARDED = "1 process", f"{RANKS} processes"


class BytesSent(TorchDispatchMode):
    """What a rank sends to others by the functional collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "all_gather_into_tensor" in name:
            self.total += args[0].nbytes * (RANKS - 1)
        elif "all_reduce" in name:  # reduce-scatter, then all-gather
            self.total += 2 * args[0].nbytes * (RANKS - 1) / RANKS
        return func(*args, **(kwargs or {}))


def formula(d_inner: int) -> dict[str, int]:
    """The bytes that a rank sends of a block in float32, batch 1, to each other rank."""
    lengths, halo, summary = 8, 4 * (D_CONV - 1) * d_inner, 4 * d_inner * (D_STATE + 1)
    forward = lengths + halo + summary
    return {FORWARD: forward, STEP: forward + halo + 4 * d_inner * D_STATE}


def measure_distributed(settings: Settings) -> Results:
    if not dist.is_gloo_available():
        return Results(notes=["torch has no gloo: distributed is left out"])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (settings, folder), nprocs=RANKS)
        samples, peaks, sent = torch.load(f"{folder}/found")
    results, length = Results(), settings.distributed_length
    timings = Timings(samples)
    for (name, passes), seconds in timings.samples.items():
        del seconds
        figure = {"pass": passes, "length": length, "seconds": timings.seconds((name, passes))}
        results.add("distributed", name, **figure)
    for passes in (f"block, {FORWARD}", f"block, {STEP}"):
        keys = (SHARDED, passes), (ALONE, passes)
        what = f"{passes}, L = {length}: times faster"
        results.add_time_target("distributed", what, timings, keys, ALONE, 1.75, faster=True)
    for name, peak in peaks.items():
        figure = {"pass": f"block, {STEP}, peak", "length": length, "value": peak, "unit": "B"}
        results.add("distributed", name, **figure)
    what = f"peak of a block's training step on a rank, L = {length}"
    results.add_target("distributed", what, peaks[SHARDED], "B", ALONE, peaks[ALONE], 0.6)
    for passes, expected in formula(2 * D_MODEL).items():
        what = f"sent by a rank in a block's {passes}"
        results.add_target("distributed", what, sent[passes], "B", "formula", expected, 1.0)
    return results


def _measure(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    return_freed_memory()
    functions, peaks, sent = _functions(rank, settings.distributed_length)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    for done in range(settings.distributed_rounds + 1):
        for key, function in functions.items():
            dist.barrier()
            start = time.perf_counter()
            if rank == 0 or key[0] == SHARDED:
                function()
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)  # the slowest rank's
            if done > 0:  # the first warms up
                samples[key].append(seconds.item())
    for name in peaks:
        function = functions[name, f"block, {STEP}"]
        dist.barrier()
        peak = torch.tensor(_peak(function) if rank == 0 or name == SHARDED else 0)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        peaks[name] = int(peak)
    for passes in sent:
        with BytesSent() as count:
            functions[SHARDED, f"block, {passes}"]()
        sent[passes] = count.total
    if rank == 0:
        torch.save((samples, peaks, sent), f"{folder}/found")
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def _functions(rank: int, length: int) -> tuple[dict[tuple[str, str], Callable[[], Any]], Any, Any]:
    cp = ContextParallel(dist.group.WORLD)
    block = MambaBlock(D_MODEL)
    whole = torch.randn(1, length, D_MODEL)
    scan_tensors = [torch.randn(1, length, s) for s in [2 * D_MODEL] * 2 + [D_STATE] * 2]
    A = -torch.rand(2 * D_MODEL, D_STATE)

    def scan(options: dict[str, Any], train: bool, *tensors: Tensor) -> None:
        u, delta, B, C = (t.detach().requires_grad_(train) for t in tensors)
        with torch.set_grad_enabled(train):
            y = selective_scan(u, delta, A, B, C, delta_softplus=True, **options)
            if train:
                y.sum().backward()

    def run_block(options: dict[str, Any], train: bool, x: Tensor) -> None:
        block.zero_grad()
        with torch.set_grad_enabled(train):
            y = block(x.detach().requires_grad_(train), **options)
            if train:
                y.sum().backward()

    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    for what, function, tensors in (("scan", scan, scan_tensors), ("block", run_block, [whole])):
        shards = [t.chunk(RANKS, 1)[rank].contiguous() for t in tensors]
        for train, passes in ((False, FORWARD), (True, STEP)):
            for name, options, given in (
                (ALONE, {}, tensors),
                (SHARDED, {"context_parallel": cp}, shards),
            ):
                functions[name, f"{what}, {passes}"] = (
                    lambda f=function, o=options, t=train, g=given: f(o, t, *g)
                )
    return functions, {ALONE: 0, SHARDED: 0}, {FORWARD: 0.0, STEP: 0.0}


def _peak(function: Callable[[], object]) -> int:
    """By how many bytes the process's resident memory rises at most."""
    gc.collect()
    return_freed_memory()
    before = proc_bytes("self/status", "VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    function()
    return proc_bytes("self/status", "VmHWM") - before
