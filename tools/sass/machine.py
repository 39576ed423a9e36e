# SPDX-License-Identifier: Apache-2.0
"""The devices that kernels are simulated on: published sizes, and assumed latencies."""

from __future__ import annotations

from dataclasses import dataclass, field

from .listing import Kernel

# In clocks. Assumptions, not measurements: --latency varies them.
LATENCIES = {
    "MUFU": 18,
    "LDS": 29,  # of the first wavefront; each further one adds a clock
    "SHFL": 24,
    "L2": 270,  # a load of what the block has accessed before
    "DRAM": 600,  # any other load
    "BAR": 20,  # from the last warp's arrival
    "BRA": 8,  # after a taken branch
    "other": 25,
}


@dataclass
class Device:
    name: str = "H200"
    multiprocessors: int = 132
    clock: float = 1.98e9
    bandwidth: float = 4.8e12  # of the memory, in bytes per second
    attained: float = 0.9  # of the bandwidth, by a copy; an assumption too
    schedulers: int = 4  # in a multiprocessor, each issuing an instruction of a warp per clock
    latencies: dict[str, int] = field(default_factory=lambda: dict(LATENCIES))

    @property
    def bytes_per_clock(self) -> float:
        """What one multiprocessor gets of the memory's bandwidth, if all of them want it."""
        return self.attained * self.bandwidth / self.clock / self.multiprocessors


DEVICES = {
    "h200": Device(),
    "h100": Device("H100 SXM", bandwidth=3.35e12),
    "a100": Device("A100 80 GB", 108, 1.41e9, 2.04e12),
}


@dataclass
class Capacity:
    """What the blocks on a multiprocessor share (CUDA C++ Programming Guide, table of
    technical specifications per compute capability)."""

    shared: int  # bytes, of which a block takes reserved ones too
    warps: int
    blocks: int


_RESERVED = 1024
CAPACITIES = {
    75: Capacity(64 << 10, 32, 16),
    80: Capacity(164 << 10, 64, 32),
    86: Capacity(100 << 10, 48, 16),
    89: Capacity(100 << 10, 48, 24),
    90: Capacity(228 << 10, 64, 32),
    100: Capacity(228 << 10, 64, 32),
    120: Capacity(100 << 10, 48, 24),
}
_REGISTERS = 64 << 10


def blocks_per_multiprocessor(kernel: Kernel, threads: int, dynamic_shared: int) -> int:
    """How many blocks of that size fit; 0 where not even one does."""
    capacity = CAPACITIES[kernel.architecture]
    warps = -(-threads // 32)
    # Registers are given to a warp in units of 256, and warps to schedulers evenly.
    registers = -(-32 * kernel.registers // 256) * 256
    by_registers = _REGISTERS // registers // 4 * 4 // (-(-warps // 4) * 4 if warps > 4 else warps)
    reserved = 0 if kernel.architecture < 80 else _RESERVED
    shared = -(-(kernel.static_shared + dynamic_shared + reserved) // 128) * 128
    return min(
        capacity.blocks,
        capacity.warps // warps,
        by_registers,
        capacity.shared // shared if shared else capacity.blocks,
    )
