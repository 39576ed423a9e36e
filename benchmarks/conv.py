# SPDX-License-Identifier: Apache-2.0
"""The convolution + SiLU, next to SiLU alone on the same tensor and PyTorch's conv1d + SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .implementations import OURS, PYTORCH, conv, conv_inputs, pytorch_conv, time_last
from .measure import (
    BACKWARD,
    FORWARD,
    Task,
    interleave,
    keep_freed_memory,
    passes_of,
    with_fitting_lengths,
)
from .results import Results, at_each_thread_count, dtype_name
from .settings import Settings

SILU = "F.silu"
LONGEST_FOR_PYTORCH = 4096


def measure_conv(settings: Settings) -> Results:
    keep_freed_memory()
    settings, notes = with_fitting_lengths(settings)
    results = at_each_thread_count(_next_to_silu, settings)
    results.notes += notes
    return results


def _next_to_silu(settings: Settings) -> Results:
    results = Results()
    sizes = [(length, torch.float32) for length in reversed(settings.lengths)]
    sizes += [(settings.length, dtype) for dtype in (torch.bfloat16, torch.float16)]
    for length, dtype in sizes:
        inputs = conv_inputs(length, dtype=dtype)
        tasks = {OURS: conv(inputs), SILU: Task(F.silu, inputs["x"])}
        if length <= LONGEST_FOR_PYTORCH and dtype == torch.float32:
            tasks[PYTORCH] = Task(pytorch_conv, *time_last(inputs))
        timings = interleave(passes_of(tasks, FORWARD, BACKWARD), settings)
        results.add_timings("conv", timings, length=length, dtype=dtype_name(dtype))
        if length in (settings.length, settings.lengths[-1]) and dtype == torch.float32:
            for passes, bound in ((FORWARD, 1.5), (BACKWARD, 2.5)):
                keys = (OURS, passes), (SILU, FORWARD)
                what, against = f"{passes}, L = {length}", "F.silu forward"
                results.add_time_target("conv", what, timings, keys, against, bound)
    return results
