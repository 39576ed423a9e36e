# SPDX-License-Identifier: Apache-2.0
"""What each operator issues per state-step, and the least time that it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .launches import Launch, Problem
from .listing import Kernel, find_kernel
from .machine import Device
from .thread import Thread


@dataclass
class Account:
    kernel: Kernel
    launch: Launch
    issued: float  # per state-step, as are the others
    exps: float  # MUFU of all kinds: exponentials, reciprocals, logarithms
    visits: list[int]  # of each instruction by a thread

    @property
    def opcodes(self) -> Counter[str]:
        """How often a thread issues each opcode."""
        counts: Counter[str] = Counter()
        for instruction, visits in zip(self.kernel.code, self.visits, strict=True):
            counts[instruction.opcode] += visits
        return counts

    def milliseconds(self, problem: Problem, device: Device) -> float:
        issue = self.issued / 32 / device.schedulers
        exp = self.exps / device.exp_lanes
        clocks = max(issue, exp) * problem.state_steps / device.multiprocessors
        return 1e3 * clocks / device.clock


def account_for(kernel: Kernel, launch: Launch, problem: Problem) -> Account:
    """Counts by the busier of the first and the last thread of the middle block."""
    ranks = {0, launch.threads - 1}
    runs = [Thread(kernel, launch, launch.blocks // 2, rank).run() for rank in sorted(ranks)]
    visits = max(runs, key=sum)
    share = launch.blocks * launch.threads / problem.state_steps
    exps = sum(
        count
        for instruction, count in zip(kernel.code, visits, strict=True)
        if instruction.opcode.startswith("MUFU")
    )
    return Account(kernel, launch, sum(visits) * share, exps * share, visits)


def accounts(
    kernels: list[Kernel], launches: list[Launch], architecture: int, problem: Problem
) -> list[Account]:
    """Of all that an operator launches, in order."""
    built = [kernel for kernel in kernels if kernel.architecture == architecture]
    return [account_for(find_kernel(built, launch.kernel), launch, problem) for launch in launches]
