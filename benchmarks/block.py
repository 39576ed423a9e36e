# SPDX-License-Identifier: Apache-2.0
"""The block's forward, training step (forward + backward) and decode step."""

from __future__ import annotations

from functools import partial

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
from .measure import FORWARD, STEP, Timings, interleave, keep_freed_memory, passes_of
from .results import Results, at_each_thread_count
from .settings import D_MODEL, Settings


def measure_block(settings: Settings) -> Results:
    """With the allocator as users have it: what an implementation allocates costs it."""
    return at_each_thread_count(_block, settings)


def _block(settings: Settings) -> Results:
    results = Results()
    block = MambaBlock(D_MODEL)
    for length in (settings.quadratic_length, settings.length):
        x = torch.randn(1, length, D_MODEL)
        tasks = {name: mixer_task(mixer, block, x) for name, mixer in mixers(block).items()}
        tasks[LINEARS] = linears_task(block, x)
        forward = interleave(passes_of(tasks, FORWARD), settings)
        quadratic = (LOOP, TRANSFORMERS) if length > settings.quadratic_length else ()
        trained = {name: task for name, task in tasks.items() if name not in quadratic}
        train = interleave(passes_of(trained, STEP), settings)
        results.add_timings("block", forward, length=length)
        results.add_timings("block", train, length=length)

    def faster(passes: str, timings: Timings[tuple[str, str]], than: str, bound: float) -> None:
        keys = (OURS, passes), (than, passes)
        what = f"{passes}, L = {length}: times faster"
        results.add_time_target("block", what, timings, keys, than, bound, faster=True)

    for passes, timings, bound in ((FORWARD, forward, 1.3), (STEP, train, 1.4)):
        keys = (OURS, passes), (LINEARS, passes)
        results.add_time_target("block", passes, timings, keys, "its four F.linear", bound)
    keys = (RECOMPUTING, STEP), (OURS, STEP)
    results.add_time_target("block", f"{STEP}, {RECOMPUTING}", train, keys, "keeping all", 1.2)
    faster(FORWARD, forward, TRANSFORMERS, 4)
    faster(FORWARD, forward, MAMBAPY, 4)
    faster(STEP, train, MAMBAPY, 5)
    if TRANSFORMERS in tasks and torch.get_num_threads() == settings.threads[-1]:
        # It takes more than a minute.
        pair = {name: tasks[name] for name in (OURS, TRANSFORMERS)}
        train = interleave(passes_of(pair, STEP), settings, once=True)
        theirs = {key: train.samples[key] for key in [(TRANSFORMERS, STEP)]}
        results.add_timings("block", Timings(theirs), length=length)
        faster(STEP, train, TRANSFORMERS, 50)
    return results


def measure_decode(settings: Settings) -> Results:
    """Tokens per second of one sequence."""
    keep_freed_memory()
    return at_each_thread_count(_decode, settings)


@torch.no_grad()
def _decode(settings: Settings) -> Results:
    results = Results()
    block, x = MambaBlock(D_MODEL), torch.randn(1, D_MODEL)
    linears = linears_task(block, x)
    steps = {name: partial(step, x) for name, step in decoders(block).items()}
    steps[LINEARS] = partial(linears.function, *linears.leaves)
    timings = interleave(steps, settings)
    for name in timings.samples:
        results.add("decode", name, value=1 / timings.seconds(name), unit="tokens/s")
    keys = (OURS, LINEARS)
    what = "step, one sequence"
    results.add_time_target("decode", what, timings, keys, "its four F.linear", 1.5)
    return results
