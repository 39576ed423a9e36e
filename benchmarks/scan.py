# SPDX-License-Identifier: Apache-2.0
"""The scan's forward, and forward + backward: by length, d_state, dtype and implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .implementations import (
    LOOP,
    OURS,
    TRANSFORMERS,
    first_steps,
    scan,
    scan_inputs,
    scans,
)
from .measure import fitting_lengths, interleave, keep_freed_memory, threads
from .results import Results, Target, dtype_name
from .settings import D_STATE, Settings

FORWARD, TRAIN = "forward", "forward + backward"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def measure_scan(settings: Settings) -> Results:
    keep_freed_memory()
    results = Results()
    # Four large tensors in, three gradients and y out; the rest are the allocator's gaps.
    lengths = fitting_lengths(settings, 11, results.notes)
    for count in settings.threads:
        # A run at one thread fills the plots; the targets are for all.
        targets = count == settings.threads[-1]
        with threads(count):
            _by_length(lengths, count, targets, settings, results)
            _by_type_and_state(count, targets, settings, results)
            _by_implementation(count, targets, settings, results)
    return results


def _by_length(
    lengths: tuple[int, ...], count: int, targets: bool, settings: Settings, results: Results
) -> None:
    inputs = scan_inputs(lengths[-1], dtype=torch.float32)
    # The longest first, so that the shorter ones find room in the memory that it has freed.
    tasks = {length: scan(first_steps(inputs, length)) for length in reversed(lengths)}
    forward = interleave({length: task.forward for length, task in tasks.items()}, settings)
    train = interleave({length: task.train for length, task in tasks.items()}, settings)
    for passes, timings in ((FORWARD, forward), (TRAIN, train)):
        for length in lengths:
            _add(results, OURS, passes, count, timings.seconds(length), length)
    if targets:
        per_step = {length: forward.seconds(length) / length for length in lengths}
        fastest, *_, slowest = sorted(per_step, key=per_step.__getitem__)
        results.targets.append(
            Target(
                "scan",
                f"time per step, L = {lengths[0]} to {lengths[-1]}: slowest, at {slowest}",
                per_step[slowest],
                "s",
                f"fastest, at {fastest}",
                per_step[fastest],
                forward.ratio(slowest, fastest) * fastest / slowest,
                1.2,
            )
        )


def _by_type_and_state(count: int, targets: bool, settings: Settings, results: Results) -> None:
    variants = [(dtype, D_STATE) for dtype in DTYPES]
    variants += [(torch.float32, n) for n in settings.d_states if n != D_STATE]
    functions: dict[tuple[str, torch.dtype, int], Callable[[], object]] = {}
    for dtype, d_state in variants:
        task = scan(scan_inputs(settings.length, d_state=d_state, dtype=dtype))
        functions[FORWARD, dtype, d_state] = task.forward
        functions[TRAIN, dtype, d_state] = task.train
    timings = interleave(functions, settings)
    for key in functions:
        passes, dtype, d_state = key
        if key[1:] != (torch.float32, D_STATE) or settings.length not in settings.lengths:
            seconds = timings.seconds(key)
            _add(results, OURS, passes, count, seconds, settings.length, d_state, dtype)
    if targets:
        wide, short = torch.float32, torch.bfloat16
        names = (TRAIN, wide, D_STATE), (FORWARD, wide, D_STATE)
        results.at_most("scan", TRAIN, timings, names, FORWARD, 3.5)
        for passes in (FORWARD, TRAIN):
            names = (passes, short, D_STATE), (passes, wide, D_STATE)
            results.at_most("scan", f"bfloat16 {passes}", timings, names, "float32", 1.0)


def _by_implementation(count: int, targets: bool, settings: Settings, results: Results) -> None:
    for length in settings.slow_lengths:
        inputs = scan_inputs(length, dtype=torch.float32)
        tasks = {name: prepare(inputs) for name, prepare in scans().items()}
        forward = interleave({name: task.forward for name, task in tasks.items()}, settings)
        if length > settings.quadratic_length:
            tasks = {name: t for name, t in tasks.items() if name not in (LOOP, TRANSFORMERS)}
        train = interleave({name: task.train for name, task in tasks.items()}, settings)
        for passes, timings in ((FORWARD, forward), (TRAIN, train)):
            for name in timings.samples:
                if name != OURS or length not in settings.lengths:
                    _add(results, name, passes, count, timings.seconds(name), length)
        if targets and length == settings.length and TRANSFORMERS in forward.samples:
            what = f"forward, L = {length}: times faster"
            names = (OURS, TRANSFORMERS)
            results.times_faster("scan", what, forward, names, TRANSFORMERS, 40)


def _add(
    results: Results,
    implementation: str,
    passes: str,
    count: int,
    seconds: float,
    length: int,
    d_state: int = D_STATE,
    dtype: torch.dtype = torch.float32,
) -> None:
    sizes = {"length": length, "d_state": d_state, "dtype": dtype_name(dtype), "threads": count}
    results.add("scan", implementation, **{"pass": passes}, **sizes, seconds=seconds)
