# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device, in bfloat16: the scan, the convolution and the block's training step."""

from __future__ import annotations

from functools import partial

import torch

from mambablock import MambaBlock

from .correctness import TOLERANCES, check_against_cpu, compare
from .implementations import (
    CAUSAL_CONV1D,
    LINEARS,
    MAMBA_SSM,
    OURS,
    conv,
    conv_inputs,
    cuda_convs,
    cuda_scans,
    linears_task,
    mixer_task,
    scan,
    scan_inputs,
    under_autocast,
)
from .measure import BACKWARD, FORWARD, STEP, Timings, interleave, passes_of
from .results import Results, dtype_name
from .settings import CudaSettings

DTYPE = torch.bfloat16
COPY = "copy of the same bytes"
CHECKED_CHANNELS = 64


def measure_scan(settings: CudaSettings) -> Results:
    results = Results()
    with torch.device(settings.device):
        _scan_next_to_others(settings, results)
        _scan_by_length(settings, results)
        _longest_scan(settings, results)
    return results


def _scan_next_to_others(settings: CudaSettings, results: Results) -> None:
    batch, length, channels = settings.batch, settings.length, settings.channels
    inputs = scan_inputs(length, d_inner=channels, dtype=DTYPE, batch=batch)
    check_against_cpu("selective_scan", scan, inputs)
    tasks = {name: prepare(inputs) for name, prepare in cuda_scans().items()}
    timings = interleave(passes_of(tasks, FORWARD, BACKWARD), settings)
    _add(results, "scan", timings, batch, length, channels)
    for passes, limit in ((FORWARD, 0.20e-3), (BACKWARD, 0.50e-3)):
        seconds = timings.seconds((OURS, passes))
        results.add_target("scan", passes, seconds, "s", "limit on an H200", limit)
        keys = (OURS, passes), (MAMBA_SSM, passes)
        what = f"{passes}: times faster"
        results.add_time_target("scan", what, timings, keys, MAMBA_SSM, 2, faster=True)


def _scan_by_length(settings: CudaSettings, results: Results) -> None:
    """The same steps, in many short sequences to one long one."""
    steps, channels = settings.steps, settings.channels
    inputs = scan_inputs(steps, d_inner=channels, dtype=DTYPE)
    check_against_cpu("selective_scan of one long sequence", scan, inputs)
    tasks = {
        length: scan(
            {n: t.reshape(-1, length, t.shape[2]) if t.dim() == 3 else t for n, t in inputs.items()}
        )
        for length in settings.lengths
    }
    timings = interleave(passes_of(tasks, FORWARD, BACKWARD), settings)
    for length, task in tasks.items():
        own = Timings({(OURS, p): timings.samples[length, p] for p in (FORWARD, BACKWARD)})
        _add(results, "scan", own, task.leaves[0].shape[0], length, channels)
    for passes in (FORWARD, BACKWARD):
        keys = (steps, passes), (steps // settings.batch, passes)
        what = f"{passes} of {steps:,} steps in one sequence"
        against = f"in {settings.batch} sequences"
        results.add_time_target("scan", what, timings, keys, against, 1.5)


def _longest_scan(settings: CudaSettings, results: Results) -> None:
    length, channels = settings.longest, settings.longest_channels
    inputs = scan_inputs(length, d_inner=channels, dtype=DTYPE)
    task = scan(inputs)
    name = f"forward, L = {length:,}, {channels:,} channels: error"
    # Of some channels, which do not depend on the others.
    some = {n: t if n in ("B", "C") else t[..., :CHECKED_CHANNELS] for n, t in inputs.items()}
    some["A"] = inputs["A"][:CHECKED_CHANNELS]
    expected = scan({n: t.cpu().float() for n, t in some.items()}).forward()[0]
    got = task.forward()[0][..., :CHECKED_CHANNELS]
    error = compare(name, got, expected, TOLERANCES[DTYPE])
    timings = interleave(passes_of({OURS: task}, FORWARD), settings)
    _add(results, "scan", timings, 1, length, channels)
    results.add_target("scan", name, error, "", "of the largest value", TOLERANCES[DTYPE])


def measure_conv(settings: CudaSettings) -> Results:
    """Next to a copy within the device that reads and writes as many bytes."""
    results = Results()
    batch, length, channels = settings.batch, settings.conv_length, settings.channels
    with torch.device(settings.device):
        inputs = conv_inputs(length, d_inner=channels, dtype=DTYPE, batch=batch)
        check_against_cpu("causal_conv1d", conv, inputs)
        tasks = {name: prepare(inputs) for name, prepare in cuda_convs().items()}
        x = inputs["x"].flatten()
        # The forward reads x and writes y; the backward reads x and dy and writes dx.
        sources = {FORWARD: x, BACKWARD: torch.cat([x, x[: len(x) // 2]])}
        functions = passes_of(tasks, FORWARD, BACKWARD)
        for passes, source in sources.items():
            functions[COPY, passes] = partial(torch.empty_like(source).copy_, source)
        timings = interleave(functions, settings)
    _add(results, "conv", timings, batch, length, channels)
    for passes, share in ((FORWARD, 0.85), (BACKWARD, 0.75)):
        what = f"{passes}: share of the bandwidth"
        keys = (OURS, passes), (COPY, passes)
        results.add_time_target("conv", what, timings, keys, COPY, share, faster=True)
        keys = (OURS, passes), (CAUSAL_CONV1D, passes)
        what = f"{passes}: times faster"
        results.add_time_target("conv", what, timings, keys, CAUSAL_CONV1D, 1.2, faster=True)
    return results


def measure_block(settings: CudaSettings) -> Results:
    """Under autocast, with float32 parameters."""
    results = Results()
    batch, length, d_model = settings.batch, settings.length, settings.channels
    with torch.device(settings.device):
        block = MambaBlock(d_model)
        x = torch.randn(batch, length, d_model, dtype=DTYPE)
        tasks = {OURS: mixer_task(block, block, x), LINEARS: linears_task(block, x)}
        tasks = {name: under_autocast(task, settings.device) for name, task in tasks.items()}
        timings = interleave(passes_of(tasks, FORWARD, STEP), settings)
    _add(results, "block", timings, batch, length, d_model)
    keys = (OURS, STEP), (LINEARS, STEP)
    results.add_time_target("block", STEP, timings, keys, "its four F.linear", 1.35)
    return results


def _add(
    results: Results,
    section: str,
    timings: Timings[tuple[str, str]],
    batch: int,
    length: int,
    channels: int,
) -> None:
    sizes = {"batch": batch, "length": length, "channels": channels, "dtype": dtype_name(DTYPE)}
    results.add_timings(section, timings, **sizes)
