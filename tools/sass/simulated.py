# SPDX-License-Identifier: Apache-2.0
"""How long the operators take by simulation, and how far from what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from .launches import Launch, Problem
from .listing import Kernel, find_kernel
from .machine import Device, blocks_per_multiprocessor
from .schedule import Run, simulate
from .trace import trace

UNIT = 512  # state-steps: a warp's, with 16 states a thread
WARPS = (1, 2, 4)  # a scheduler


@dataclass
class Case:
    """A problem, and two shorter ones whose blocks differ from its own in their steps alone."""

    name: str
    full: Problem
    short: Problem
    longer: Problem

    @classmethod
    def of(cls, name: str, full: Problem, short: int) -> Case:
        return cls(name, full, replace(full, length=short), replace(full, length=2 * short))

    @property
    def problems(self) -> list[Problem]:
        return [self.short, self.longer, self.full]


CASES = (
    Case.of("8 rows of 2,048 steps", Problem(), 64),
    # Eight chunks of four tiles each.
    Case.of("one row of 65,536 steps", Problem(batch=1, length=65536), 512),
)


@dataclass
class Simulated:
    kernel: Kernel
    launch: Launch  # of the full problem
    fit: int  # blocks that a multiprocessor has room for
    resident: int  # that it gets
    # Clocks for 512 state-steps and scheduler, from tile to tile, with so many warps a scheduler;
    # None where they do not fit.
    by_warps: list[float | None]
    clocks: float  # the same as launched
    milliseconds: float  # of the whole launch, its start included
    bytes: float  # that all blocks move


def simulate_launch(
    kernel: Kernel,
    launches: Sequence[Launch],
    case: Case,
    device: Device,
    by_warps: Sequence[int] = WARPS,
) -> Simulated:
    """The launches are those of the case's problems."""
    short, longer, full = launches
    fit = blocks_per_multiprocessor(kernel, full.threads, full.dynamic_shared)
    resident = min(fit, -(-full.blocks // device.multiprocessors))
    grows = short.blocks == longer.blocks
    # Where longer problems have more blocks, these differ in nothing.
    traces = [trace(kernel, launch) for launch in ((short, longer) if grows else (longer,))]

    @cache
    def runs(blocks: int) -> list[Run]:
        return [simulate(kernel, warps, blocks, device) for warps in traces]

    def per_unit(found: list[Run], blocks: int) -> float:
        if not grows:
            return 0.0
        steps = (case.longer.state_steps - case.short.state_steps) / full.blocks
        return (found[1].clocks - found[0].clocks) / (steps * blocks / UNIT / device.schedulers)

    clocks_by_warps: list[float | None] = []
    for warps in by_warps:
        blocks = max(1, warps * device.schedulers // len(traces[0]))
        clocks_by_warps.append(per_unit(runs(blocks), blocks) if blocks <= fit else None)
    found = runs(resident)
    clocks: float = found[0].clocks
    moved: float = found[0].bytes
    if grows:
        further = (case.full.length - case.short.length) / case.short.length
        clocks += further * (found[1].clocks - found[0].clocks)
        moved += further * (found[1].bytes - found[0].bytes)
    rounds = max(1.0, full.blocks / (resident * device.multiprocessors))
    return Simulated(
        kernel,
        full,
        fit,
        resident,
        clocks_by_warps,
        per_unit(found, resident),
        1e3 * rounds * clocks / device.clock,
        moved * full.blocks / resident,
    )


def simulate_operator(
    kernels: Sequence[Kernel], launches: Sequence[Sequence[Launch]], case: Case, device: Device
) -> list[Simulated]:
    """What an operator launches, in order; `launches` are those of each of the case's problems."""
    return [
        simulate_launch(find_kernel(list(kernels), of_kernel[0].kernel), of_kernel, case, device)
        for of_kernel in zip(*launches, strict=True)
    ]
