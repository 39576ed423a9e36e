# SPDX-License-Identifier: Apache-2.0
"""What the operators launch for a problem, recorded by the emulation of CUDA without running it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .listing import MissingToolError, demangle, short_name

# A process of its own: the emulated operators take the place of the CPU's.
_PROGRAM = """
import os
import sys
import torch
import mambablock

torch.ops.load_library(sys.argv[1])
ops = torch.ops.mambablock

def mark(name):
    with open(os.environ["MAMBABLOCK_EMULATION_RECORD"], "a") as file:
        print(name, file=file)

def time_last(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)

def launch_all(batch, length, channels, states):
    make = lambda *shape: torch.empty(shape, dtype=torch.bfloat16)
    u, delta, z, dy = (make(batch, length, channels) for _ in range(4))
    B, C = (make(batch, length, states) for _ in range(2))
    A = torch.empty(channels, states)
    D, bias = torch.empty(channels), torch.empty(channels)
    for suffix, memory, gated in (
        ("", torch.Tensor.contiguous, False),
        (" with softplus and z", torch.Tensor.contiguous, True),
        (" of (B, D, L) memory", time_last, False),
        (" of (B, D, L) memory with softplus and z", time_last, True),
    ):
        rows = [memory(u), memory(delta), A, memory(B), memory(C)]
        arguments = (*rows, D, memory(z) if gated else None, bias, None, None)
        mark("forward" + suffix)
        y, state, saved = ops.selective_scan(*arguments, gated, False, False, True)
        mark("backward" + suffix)
        ops.selective_scan_backward(
            memory(dy), torch.empty_like(state), saved, *arguments, gated, False, False
        )
    weight = torch.empty(channels, 4)
    for suffix, memory in (("", torch.Tensor.contiguous), (" of (B, D, L) memory", time_last)):
        arguments = (memory(u), weight, bias, None, None, True, False)
        mark("convolution" + suffix)
        y, state = ops.causal_conv1d(*arguments)
        mark("backward of the convolution" + suffix)
        ops.causal_conv1d_backward(memory(dy), None, *arguments)

for sizes in sys.argv[2:]:
    mark("problem")
    launch_all(*map(int, sizes.split(",")))
"""


@dataclass
class Problem:
    batch: int = 8
    length: int = 2048
    channels: int = 2048
    states: int = 16

    @property
    def state_steps(self) -> int:
        return self.batch * self.length * self.channels * self.states


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    parameters: bytes

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


def record(
    emulation: Path, problems: Sequence[Problem], multiprocessors: int
) -> list[dict[str, list[Launch]]]:
    """For each problem the launches of the scan's forward, which saves states, of its backward, and
    of the convolution's, each by name."""
    sizes = [f"{p.batch},{p.length},{p.channels},{p.states}" for p in problems]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "launches"
        subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(emulation), *sizes],
            check=True,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {
                "MAMBABLOCK_EMULATION_RECORD": str(target),
                "MAMBABLOCK_EMULATION_MULTIPROCESSORS": str(multiprocessors),
                "MAMBABLOCK_EMULATION_SHARED_MEMORY": str(227 << 10),
            },
        )
        lines = target.read_text().splitlines()
    names = _function_names(emulation)
    found: list[dict[str, list[Launch]]] = []
    for line in lines:
        if line == "problem":
            found.append({})
            continue
        if not line.startswith("{"):
            launches = found[-1].setdefault(line, [])
            continue
        launch = json.loads(line)
        launches.append(
            Launch(
                names[launch["kernel"]],
                tuple(launch["grid"]),
                tuple(launch["block"]),
                launch["shared"],
                bytes.fromhex(launch["parameters"]),
            )
        )
    return found


def _function_names(library: Path) -> dict[int, str]:
    result = subprocess.run(["nm", str(library)], capture_output=True, text=True)
    if result.returncode != 0:
        raise MissingToolError(f"nm failed: {result.stderr.strip()}")
    symbols = [line.split() for line in result.stdout.splitlines()]
    functions = [(int(s[0], 16), s[2]) for s in symbols if len(s) == 3 and s[1] in "tTwW"]
    demangled = demangle([name for _, name in functions])
    return {
        address: short_name(name) for (address, _), name in zip(functions, demangled, strict=True)
    }
