# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's scan and causal-conv1d's convolution, (batch, dim, length), by memory layout.

The convolution also with x_proj after it, which is slower where its input is not channels-last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .implementations import (
    PYTORCH,
    compat_conv,
    compat_scan,
    conv_inputs,
    pytorch_conv,
    scan_inputs,
)
from .measure import FORWARD, TRAIN, Task, interleave, keep_freed_memory, passes_of
from .results import Results, at_each_thread_count, dtype_name
from .settings import D_INNER, D_MODEL, D_STATE, Settings

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels last"


def before_x_proj(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor, x_proj: Tensor) -> Tensor:
        return F.linear(conv(x, weight, bias).transpose(1, 2), x_proj)

    return function


def tasks(length: int, d_inner: int, dtype: torch.dtype) -> dict[str, dict[str, Task]]:
    """The operators by name, and the tasks of each by layout, which output gradients have too.

    In float32 also PyTorch's convolution, in the contiguous layout.
    """
    inputs = scan_inputs(length, d_inner=d_inner, dtype=dtype)
    conv_tensors = tuple(conv_inputs(length, d_inner=d_inner, dtype=dtype).values())
    x_proj = torch.randn(D_MODEL // 16 + 2 * D_STATE, d_inner).to(dtype)
    found: dict[str, dict[str, Task]] = {}
    for op, function, by_pytorch, tensors in (
        ("scan", compat_scan, None, tuple(inputs.values())),
        ("conv", compat_conv, pytorch_conv, conv_tensors),
        (
            "conv + x_proj",
            before_x_proj(compat_conv),
            before_x_proj(pytorch_conv),
            (*conv_tensors, x_proj),
        ),
    ):
        last = [t.transpose(1, 2) if t.dim() == 3 else t for t in tensors]
        task = Task(function, *last)
        other = Task(function, *(t.contiguous() for t in last))
        other.output_gradients = tuple(t.contiguous() for t in task.output_gradients)
        found[op] = {CHANNELS_LAST: task, CONTIGUOUS: other}
        if by_pytorch is not None and dtype == torch.float32:
            found[op][PYTORCH] = Task(by_pytorch, *other.leaves)
    return found


def measure_layout(settings: Settings) -> Results:
    keep_freed_memory()
    return at_each_thread_count(_next_to_channels_last, settings)


def _next_to_channels_last(settings: Settings) -> Results:
    results = Results()
    for dtype in (torch.float32, torch.bfloat16):
        functions = {
            (layout, f"{op} {passes}"): function
            for op, by_layout in tasks(settings.length, D_INNER, dtype).items()
            for (layout, passes), function in passes_of(by_layout, FORWARD, TRAIN).items()
        }
        timings = interleave(functions, settings)
        name = dtype_name(dtype)
        results.add_timings("layout", timings, length=settings.length, dtype=name)
        for key in functions:
            layout, passes = key
            if layout == CONTIGUOUS:
                what = f"{passes} of (B, D, L) memory, {name}"
                keys = key, (CHANNELS_LAST, passes)
                results.add_time_target("layout", what, timings, keys, CHANNELS_LAST, 1.15)
                keys = key, (PYTORCH, passes)
                what += ": times faster"
                results.add_time_target("layout", what, timings, keys, PYTORCH, 1, faster=True)
    return results
