# SPDX-License-Identifier: Apache-2.0
"""The scan's forward, and forward + backward: by length, d_state, dtype and implementation."""

from __future__ import annotations

import torch

from .implementations import LOOP, OURS, TRANSFORMERS, first_steps, scan, scan_inputs, scans
from .measure import (
    FORWARD,
    TRAIN,
    in_fresh_process,
    interleave,
    keep_freed_memory,
    passes_of,
    with_fitting_lengths,
)
from .results import Results, Target, at_each_thread_count, dtype_name
from .settings import D_STATE, Settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEEPING, DEFAULT = "keeps freed memory", "glibc's default"


def measure_scan(settings: Settings) -> Results:
    default = in_fresh_process(at_each_thread_count, _with_default_allocator, settings)
    keep_freed_memory()
    settings, notes = with_fitting_lengths(settings)
    results = at_each_thread_count(_scan, settings)
    results.extend(default)
    results.notes += notes
    return results


def _with_default_allocator(settings: Settings) -> Results:
    """As users have it: freed memory goes back to the system, and costs page faults when reused."""
    results = Results()
    task = scan(scan_inputs(settings.length, dtype=torch.float32))
    seconds = interleave({TRAIN: task.train}, settings).seconds(TRAIN)
    _add(results, OURS, TRAIN, seconds, settings.length, allocator=DEFAULT)
    return results


def _scan(settings: Settings) -> Results:
    results = Results()
    _by_length(settings, results)
    _by_type_and_state(settings, results)
    _by_implementation(settings, results)
    return results


def _by_length(settings: Settings, results: Results) -> None:
    lengths = settings.lengths
    inputs = scan_inputs(lengths[-1], dtype=torch.float32)
    # The longest first, so that the shorter ones find room in the memory that it has freed.
    tasks = {length: scan(first_steps(inputs, length)) for length in reversed(lengths)}
    forward = interleave(passes_of(tasks, FORWARD), settings)
    train = interleave(passes_of(tasks, TRAIN), settings)
    for passes, timings in ((FORWARD, forward), (TRAIN, train)):
        for length in lengths:
            _add(results, OURS, passes, timings.seconds((length, passes)), length)
    per_step = {length: forward.seconds((length, FORWARD)) / length for length in lengths}
    fastest, *_, slowest = sorted(per_step, key=per_step.__getitem__)
    ratio = forward.ratio((slowest, FORWARD), (fastest, FORWARD)) * fastest / slowest
    what = f"time per step, L = {lengths[0]} to {lengths[-1]}: slowest, at {slowest}"
    figures = (per_step[slowest], "s", f"fastest, at {fastest}", per_step[fastest])
    results.targets.append(Target("scan", what, *figures, ratio, 1.2))


def _by_type_and_state(settings: Settings, results: Results) -> None:
    variants = [(dtype, D_STATE) for dtype in DTYPES]
    variants += [(torch.float32, n) for n in settings.d_states if n != D_STATE]
    tasks = {
        (dtype, d_state): scan(scan_inputs(settings.length, d_state=d_state, dtype=dtype))
        for dtype, d_state in variants
    }
    timings = interleave(passes_of(tasks, FORWARD, TRAIN), settings)
    usual, short = (torch.float32, D_STATE), (torch.bfloat16, D_STATE)
    for variant in variants:
        if variant != usual:  # which is measured by length
            for passes in (FORWARD, TRAIN):
                seconds = timings.seconds((variant, passes))
                _add(results, OURS, passes, seconds, settings.length, *variant)
    keys = (usual, TRAIN), (usual, FORWARD)
    results.add_time_target("scan", TRAIN, timings, keys, FORWARD, 3.5)
    for passes in (FORWARD, TRAIN):
        keys = (short, passes), (usual, passes)
        results.add_time_target("scan", f"bfloat16 {passes}", timings, keys, "float32", 1.0)


def _by_implementation(settings: Settings, results: Results) -> None:
    for length in settings.slow_lengths:
        inputs = scan_inputs(length, dtype=torch.float32)
        tasks = {name: prepare(inputs) for name, prepare in scans().items()}
        forward = interleave(passes_of(tasks, FORWARD), settings)
        if length > settings.quadratic_length:
            tasks = {name: t for name, t in tasks.items() if name not in (LOOP, TRANSFORMERS)}
        train = interleave(passes_of(tasks, TRAIN), settings)
        for timings in (forward, train):
            for name, passes in timings.samples:
                if name != OURS:
                    _add(results, name, passes, timings.seconds((name, passes)), length)
        keys = (OURS, FORWARD), (TRANSFORMERS, FORWARD)
        if length == settings.length:
            what = f"forward, L = {length}: times faster"
            results.add_time_target("scan", what, forward, keys, TRANSFORMERS, 40, faster=True)


def _add(
    results: Results,
    implementation: str,
    passes: str,
    seconds: float,
    length: int,
    dtype: torch.dtype = torch.float32,
    d_state: int = D_STATE,
    allocator: str = KEEPING,
) -> None:
    sizes = {"length": length, "d_state": d_state, "dtype": dtype_name(dtype)}
    sizes |= {"pass": passes, "allocator": allocator}
    results.add("scan", implementation, **sizes, seconds=seconds)
