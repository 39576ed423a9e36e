# SPDX-License-Identifier: Apache-2.0
"""The block's forward, training step (forward + backward) and decode step."""

from __future__ import annotations

import torch

from mambablock import MambaBlock

from .implementations import (
    LINEARS,
    LOOP,
    MAMBAPY,
    OURS,
    RECOMPUTING,
    TRANSFORMERS,
    decoders,
    linears_task,
    mixer_task,
    mixers,
)
from .measure import Timings, interleave, keep_freed_memory, threads
from .results import Results
from .settings import D_MODEL, Settings

FORWARD, STEP = "forward", "training step"


def measure_block(settings: Settings) -> Results:
    """With the allocator as users have it: what an implementation allocates costs it."""
    results = Results()
    for count in settings.threads:
        for length in sorted({settings.quadratic_length, settings.length}):
            targets = length == settings.length and count == settings.threads[-1]
            with threads(count):
                _at_length(length, count, targets, settings, results)
    return results


def _at_length(
    length: int, count: int, targets: bool, settings: Settings, results: Results
) -> None:
    def add(passes: str, timings: Timings[str], *left_out: str) -> None:
        sizes = {"length": length, "threads": count}
        for name in timings.samples:
            if name not in left_out:
                seconds = timings.seconds(name)
                results.add("block", name, **{"pass": passes}, **sizes, seconds=seconds)

    def faster(passes: str, timings: Timings[str], than: str, bound: float) -> None:
        if targets and than in timings.samples:
            what = f"{passes}, L = {length}: times faster"
            results.times_faster("block", what, timings, (OURS, than), than, bound)

    block = MambaBlock(D_MODEL)
    x = torch.randn(1, length, D_MODEL)
    tasks = {name: mixer_task(mixer, block, x) for name, mixer in mixers(block).items()}
    tasks[LINEARS] = linears_task(block, x)

    forward = interleave({name: task.forward for name, task in tasks.items()}, settings)
    add(FORWARD, forward)
    loops = (LOOP, TRANSFORMERS) if length > settings.quadratic_length else ()
    trained = {name: task.train for name, task in tasks.items() if name not in loops}
    train = interleave(trained, settings)
    add(STEP, train)
    if targets:
        against = "its four F.linear"
        results.at_most("block", FORWARD, forward, (OURS, LINEARS), against, 1.3)
        results.at_most("block", STEP, train, (OURS, LINEARS), against, 1.4)
        what = f"{STEP}, {RECOMPUTING}"
        results.at_most("block", what, train, (RECOMPUTING, OURS), "keeping all", 1.2)
    faster(FORWARD, forward, TRANSFORMERS, 4)
    faster(FORWARD, forward, MAMBAPY, 4)
    faster(STEP, train, MAMBAPY, 5)
    if targets and TRANSFORMERS in tasks:
        if length > settings.quadratic_length:  # more than a minute
            train = interleave(
                {name: tasks[name].train for name in (OURS, TRANSFORMERS)}, settings, once=True
            )
            add(STEP, train, OURS)
        faster(STEP, train, TRANSFORMERS, 50)


def measure_decode(settings: Settings) -> Results:
    """Tokens per second of one sequence."""
    keep_freed_memory()
    results = Results()
    block, x = MambaBlock(D_MODEL), torch.randn(1, D_MODEL)
    linears = linears_task(block, x)
    steps = {name: (lambda step=step: step(x)) for name, step in decoders(block).items()}
    steps[LINEARS] = lambda: linears.function(*linears.leaves)
    for count in settings.threads:
        with threads(count), torch.no_grad():
            timings = interleave(steps, settings)
        for name in timings.samples:
            rate = 1 / timings.seconds(name)
            results.add("decode", name, threads=count, value=rate, unit="tokens/s")
    results.at_most(
        "decode", "step, one sequence", timings, (OURS, LINEARS), "its four F.linear", 1.5
    )
    return results
