# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the scan and of a training step, and what a forward keeps for the backward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from mambablock import MambaBlock

from .implementations import (
    MAMBAPY,
    OURS,
    RECOMPUTING,
    importable,
    mambapy_mixer,
    mixer_task,
    mixers,
    scan,
    scan_inputs,
)
from .measure import (
    BACKWARD,
    FORWARD,
    STEP,
    Task,
    in_fresh_process,
    proc_bytes,
    return_freed_memory,
)
from .results import Results
from .settings import D_MODEL, Settings


def measure_memory(settings: Settings) -> Results:
    """Every figure comes from a process of its own."""
    results = Results()
    length = settings.memory_length
    for passes in (FORWARD, BACKWARD):
        peak, needed = in_fresh_process(scan_peak, length, passes)
        _add(results, "selective_scan", passes, length, peak)
        _add(results, "its tensors", passes, length, needed)
        tensors = "inputs + outputs" + (" + gradients" if passes == BACKWARD else "")
        what = f"peak of the scan's {passes}, L = {length}"
        results.add_target("memory", what, peak, "B", tensors, needed, 1.3)

    length = settings.length
    ours = in_fresh_process(_training_peak, OURS, length)
    _add(results, OURS, STEP, length, ours)
    if importable(MAMBAPY):
        theirs = in_fresh_process(_training_peak, MAMBAPY, length)
        _add(results, MAMBAPY, STEP, length, theirs)
        what = f"peak of the training step above the weights, L = {length}"
        results.add_target("memory", what, ours, "B", MAMBAPY, theirs, round(1 / 3, 3))

    length = settings.quadratic_length
    kept = {
        name: in_fresh_process(kept_for_backward, name, length) / length
        for name in mixers(MambaBlock(D_MODEL))
    }
    for name, value in kept.items():
        _add(results, name, "kept for the backward, per token", length, value)
    what = f"kept for the backward per token, {RECOMPUTING}"
    results.add_target("memory", what, kept[RECOMPUTING], "B", "keeping all", kept[OURS], 0.75)
    return results


def _add(results: Results, name: str, passes: str, length: int, value: float) -> None:
    results.add("memory", name, **{"pass": passes}, length=length, value=value, unit="B")


def _peak(function: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rises at most while the function runs.

    The system keeps the highest value itself, so nothing is missed between samples.
    """
    before = _resident()
    with suppress(OSError):  # where it is not allowed, the imports' peak is below the function's
        Path("/proc/self/clear_refs").write_text("5")
    function()
    return proc_bytes("self/status", "VmHWM") - before


def _resident() -> int:
    """Bytes of memory in use."""
    gc.collect()
    return_freed_memory()
    return proc_bytes("self/status", "VmRSS")


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def scan_peak(length: int, passes: str) -> tuple[int, int]:
    """Peak with the inputs, and the bytes of the tensors that go in and come out."""
    _warm_up(scan(scan_inputs(16, dtype=torch.float32)))
    task = scan(scan_inputs(length, dtype=torch.float32))
    inputs = _bytes(*task.leaves)
    if passes == FORWARD:
        # With what is kept for the backward.
        return inputs + _peak(lambda: task.function(*task.leaves)), inputs + _bytes(*task.forward())
    output_gradients = _bytes(*task.output_gradients)
    needed = inputs + output_gradients + output_gradients + inputs
    return inputs + output_gradients + _peak(task.train), needed


def _training_peak(name: str, length: int) -> int:
    block = MambaBlock(D_MODEL)
    mixer = mambapy_mixer(block) if name == MAMBAPY else block
    _warm_up(mixer_task(mixer, block, torch.randn(1, 16, D_MODEL)))
    task = mixer_task(mixer, block, torch.randn(1, length, D_MODEL))
    shape = task.leaves[0].shape
    task.output_gradients = (torch.randn(shape),)
    return _peak(task.train)


def kept_for_backward(name: str, length: int) -> int:
    """Bytes in memory after a block's forward, besides its input, output and weights."""
    block = MambaBlock(D_MODEL)
    mixer = mixers(block)[name]
    x = torch.randn(1, length, D_MODEL)
    _warm_up(mixer_task(mixer, block, x))
    before = _resident()
    y = mixer(x)
    return _resident() - before - _bytes(y)


def _warm_up(task: Task) -> None:
    """So that libraries loaded and threads started on the first call do not count."""
    task.train()
