# SPDX-License-Identifier: Apache-2.0
"""The convolution + SiLU, next to SiLU alone on the same tensor and PyTorch's conv1d + SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .implementations import OURS, PYTORCH, conv, conv_inputs, pytorch_conv, time_last
from .measure import Task, fitting_lengths, interleave, keep_freed_memory, threads
from .results import Results, dtype_name
from .settings import Settings

SILU = "F.silu"
LONGEST_FOR_PYTORCH = 4096


def measure_conv(settings: Settings) -> Results:
    keep_freed_memory()
    results = Results()
    lengths = {settings.length, *fitting_lengths(settings, 11, results.notes)}
    for count in settings.threads:
        with threads(count):
            for length in sorted(lengths, reverse=True):
                _next_to_silu(length, torch.float32, count, settings, results)
            for dtype in (torch.bfloat16, torch.float16):
                _next_to_silu(settings.length, dtype, count, settings, results)
    return results


def _next_to_silu(
    length: int, dtype: torch.dtype, count: int, settings: Settings, results: Results
) -> None:
    inputs = conv_inputs(length, dtype=dtype)
    tasks = {OURS: conv(inputs), SILU: Task(F.silu, inputs["x"])}
    if length <= LONGEST_FOR_PYTORCH and dtype == torch.float32:
        tasks[PYTORCH] = Task(pytorch_conv, *time_last(inputs))
    functions = {(name, "forward"): task.forward for name, task in tasks.items()}
    functions |= {(name, "backward"): task.backward for name, task in tasks.items()}
    timings = interleave(functions, settings)
    for name, passes in functions:
        sizes = {"length": length, "dtype": dtype_name(dtype), "threads": count}
        seconds = timings.seconds((name, passes))
        results.add("conv", name, **{"pass": passes}, **sizes, seconds=seconds)
    target_lengths = (settings.length, settings.lengths[-1])
    if length in target_lengths and dtype == torch.float32 and count == settings.threads[-1]:
        for passes, bound in (("forward", 1.5), ("backward", 2.5)):
            names = (OURS, passes), (SILU, "forward")
            results.at_most(
                "conv", f"{passes}, L = {length}", timings, names, "F.silu forward", bound
            )
