# SPDX-License-Identifier: Apache-2.0
"""State-steps per second of one core next to an exp loop of the same build."""

from __future__ import annotations

from statistics import median

import numpy as np
import torch

from mambablock import _C, build_info, selective_scan

from .correctness import check_operators
from .implementations import scan, scan_inputs
from .measure import in_fresh_process, interleave, keep_freed_memory
from .results import Results, Target
from .settings import D_INNER, D_STATE, Settings


def measure_rate(settings: Settings) -> Results:
    """At each SIMD level of the machine."""
    info, results = build_info(), Results()
    built = info["simd_levels_built"]
    levels = built[: built.index(info["simd_level"]) + 1]
    for level in levels[1:] or levels:  # the baseline only without others
        environment = {"MAMBABLOCK_SIMD": level}
        results.extend(in_fresh_process(_rate_at_level, level, settings, environment=environment))
    return results


def _rate_at_level(level: str, settings: Settings) -> Results:
    if build_info()["simd_level"] != level:
        raise RuntimeError(f"the SIMD level must be {level}; got {build_info()['simd_level']}")
    torch.set_num_threads(1)
    keep_freed_memory()
    check_operators()
    inputs = scan_inputs(settings.length, dtype=torch.float32)
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    # Input and output fit into the second-level cache. The time of a call on one vector is
    # subtracted, as the overhead of a call.
    long = np.linspace(-20, 0, 24576, dtype=np.float32)
    short = long[:16].copy()
    functions = {
        "scan": scan(inputs).forward,
        "scan without D, z, bias and softplus": lambda: selective_scan(u, delta, A, B, C),
        "exp2 short": lambda: _C.math("exp2", short),
        "exp2 long": lambda: _C.math("exp2", long),
        "exp short": lambda: _C.math("exp", short),
        "exp long": lambda: _C.math("exp", long),
    }
    with torch.no_grad():
        samples = interleave(functions, settings).samples

    rates: dict[str, list[float]] = {}
    for name in ("scan", "scan without D, z, bias and softplus"):
        rates[name] = [settings.length * D_INNER * D_STATE / s for s in samples[name]]
    for name in ("exp2", "exp"):
        pairs = zip(samples[f"{name} long"], samples[f"{name} short"], strict=True)
        rates[f"{name} loop"] = [(long.size - short.size) / (a - b) for a, b in pairs]

    results = Results()
    for name, values in rates.items():
        results.add("rate", name, simd=level, value=median(values), unit="/s")
    for loop in ("exp2 loop", "exp loop"):  # the scan's own is exp2
        ratio = median(a / b for a, b in zip(rates["scan"], rates[loop], strict=True))
        what = f"state-steps per second and core, {level}"
        against = ("/s", loop, median(rates[loop]))
        scan_rate = median(rates["scan"])
        results.targets.append(
            Target("rate", what, scan_rate, *against, ratio, 0.55, at_least=True)
        )
    return results
