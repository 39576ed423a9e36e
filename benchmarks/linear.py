# SPDX-License-Identifier: Apache-2.0
"""The product of few rows, beside F.linear and beside reading the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mambablock

from .implementations import OURS
from .measure import Timings, interleave
from .results import Results, Target, at_each_thread_count, dtype_name
from .settings import Settings

OPERATOR, TORCH, READ = "the operator", "F.linear", "w.sum()"


def measure_linear(settings: Settings) -> Results:
    """Bytes of weights per second; the weights come from memory, not from a cache."""
    return at_each_thread_count(_linear, settings)


@torch.no_grad()
def _linear(settings: Settings) -> Results:
    results = Results()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in settings.weights:
            count = max(1, settings.weight_bytes // (shape[0] * shape[1] * dtype.itemsize))
            weights = [torch.randn(shape).mul_(0.02).to(dtype) for _ in range(count)]
            for rows in settings.rows:
                _few_rows(results, weights, rows, settings)
    return results


def _few_rows(results: Results, weights: list[Tensor], rows: int, settings: Settings) -> None:
    (weight, *_), count = weights, len(weights)
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)

    def each(function: Callable[[Tensor], object]) -> None:
        for weight in weights:
            function(weight)

    timings = interleave(
        {
            OURS: partial(each, partial(mambablock.linear, x)),
            OPERATOR: partial(each, lambda w: torch.ops.mambablock.linear(x, w, None)),
            TORCH: partial(each, partial(F.linear, x)),
            READ: partial(each, Tensor.sum),
        },
        settings,
    )
    name, shape = dtype_name(weight.dtype), " x ".join(map(str, weight.shape))
    for implementation in timings.samples:
        rate = count * weight.nbytes / timings.seconds(implementation)
        sizes = {"weight": shape, "dtype": name, "rows": rows}
        results.add("linear", implementation, **sizes, value=rate, unit="B/s")
    what = f"{name}, {shape}, rows: {rows}"
    if rows <= 2:
        _add_target(results, what, timings, READ, 0.85)
    # The same call, but for what decides between the two.
    _add_target(results, what, timings, TORCH, 0.95)


def _add_target(
    results: Results, what: str, timings: Timings[str], against: str, bound: float
) -> None:
    """That the rate is at least `bound` times the other."""
    figures = (timings.seconds(OURS), "s", against, timings.seconds(against))
    ratio = timings.ratio(against, OURS)
    results.targets.append(Target("linear", what, *figures, ratio, bound, at_least=True))
