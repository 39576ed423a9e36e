# SPDX-License-Identifier: Apache-2.0
"""How times are taken."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .settings import D_INNER, Sampling, Settings

# A fork would inherit the SIMD level, the allocator's settings and the memory.
PROCESSES = multiprocessing.get_context("spawn")

Key = TypeVar("Key")
Result = TypeVar("Result")


class Task:
    """A function of tensors, and what is timed of it. Every tensor gets a gradient."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor):
        self.function = function
        self.leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]

    def _outputs(self) -> tuple[Tensor, ...]:
        outputs = self.function(*self.leaves)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @cached_property
    def output_gradients(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn_like(output) for output in self.forward())

    @cached_property
    def _graph(self) -> tuple[Tensor, ...]:
        return self._outputs()

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        return self._outputs()

    def backward(self) -> tuple[Tensor, ...]:
        """Of one forward, done before; all gradients."""
        return torch.autograd.grad(
            self._graph, self.leaves, self.output_gradients, retain_graph=True
        )

    def train(self) -> tuple[Tensor, ...]:
        """Forward and backward; all gradients."""
        return torch.autograd.grad(self._outputs(), self.leaves, self.output_gradients)


FORWARD, BACKWARD, TRAIN, STEP = "forward", "backward", "forward + backward", "training step"
_METHODS = {FORWARD: Task.forward, BACKWARD: Task.backward, TRAIN: Task.train, STEP: Task.train}


def passes_of(
    tasks: Mapping[Key, Task], *passes: str
) -> dict[tuple[Key, str], Callable[[], object]]:
    """What is timed of the tasks, by (name, pass)."""
    return {(name, p): partial(_METHODS[p], task) for p in passes for name, task in tasks.items()}


class Timings(Generic[Key]):
    """Seconds of each sample by name; sample i of all names was taken in the same round."""

    def __init__(self, samples: Mapping[Key, list[float]]):
        self.samples = samples

    def seconds(self, name: Key) -> float:
        return median(self.samples[name])

    def ratio(self, name: Key, to: Key) -> float:
        """The median over the rounds: what slows a whole round down cancels out."""
        return median(a / b for a, b in zip(self.samples[name], self.samples[to], strict=True))


def interleave(
    functions: Mapping[Key, Callable[[], object]], settings: Sampling, *, once: bool = False
) -> Timings[Key]:
    """Time the functions in turn, round after round.

    A call before the first round warms up the caches; with `once`, for what takes minutes, there is
    neither that call nor a second round.
    """
    seconds = _device_seconds if settings.device == "cuda" else _seconds
    repeats = dict.fromkeys(functions, 1)
    if not once:
        for name, function in functions.items():
            function()
            repeats[name] = max(1, round(settings.sample_seconds / seconds(function, 1)))
    samples: dict[Key, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + settings.comparison_seconds
    for done in range(1 if once else settings.rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, function in functions.items():
            samples[name].append(seconds(function, repeats[name]))
    return Timings(samples)


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Of one call of several, after one that warms up the caches."""
    if repeats > 1:
        function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _device_seconds(function: Callable[[], object], repeats: int) -> float:
    """By events on the current stream.

    The stream is idle before the first call, and the calls follow without synchronisation, so the
    host's time counts only where it exceeds the device's. The L2 cache is warm, and PyTorch's
    caching allocator has the memory since the calls that warm up.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def in_fresh_process(
    function: Callable[..., Result], *args: object, environment: Mapping[str, str] | None = None
) -> Result:
    """function(*args) in a new process: with its own SIMD level, allocator and memory."""
    with ProcessPoolExecutor(1, PROCESSES, _set_environment, (environment or {},)) as pool:
        return pool.submit(function, *args).result()


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next allocation, for this whole process.

    By default it gives tensors over 32 MiB back to the system and gets zeroed pages for the next
    one, which would cost every implementation here up to half of its time, and differently at
    different lengths. PyTorch's tuning guide recommends allocators that do not.
    """
    _glibc("mallopt", _MMAP_MAX, 0)
    _glibc("mallopt", _TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Make it give free memory back, now and from now on, so that resident memory is in use."""
    _glibc("mallopt", _MMAP_THRESHOLD, 1 << 16)
    _glibc("mallopt", _TRIM_THRESHOLD, 0)
    _glibc("malloc_trim", 0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def _glibc(function: str, *arguments: int) -> None:
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


def with_fitting_lengths(settings: Settings) -> tuple[Settings, list[str]]:
    """Without lengths whose tensors do not fit into memory, which a note names."""
    # The scan's four large inputs, three gradients and output, and the allocator's gaps.
    available = proc_bytes("meminfo", "MemAvailable")
    most = 0.9 * available / (11 * D_INNER * torch.float32.itemsize)
    lengths = tuple(length for length in settings.lengths if length <= most)
    note = f"too little free memory for lengths above {most:.0f}: they are left out"
    return replace(settings, lengths=lengths), [note] if lengths != settings.lengths else []


def proc_bytes(file: str, name: str) -> int:
    """A figure in kB of a file in /proc."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{file}: expected a line {name}; got none")
