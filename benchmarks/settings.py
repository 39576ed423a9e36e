# SPDX-License-Identifier: Apache-2.0
"""The sizes measured and how often."""

from __future__ import annotations

import os
from dataclasses import dataclass

D_MODEL, D_INNER, D_STATE, D_CONV = 768, 1536, 16, 4


@dataclass(frozen=True)
class Settings:
    rounds: int
    """Samples of each figure; its median is taken."""
    sample_seconds: float
    """A call that takes less is repeated within a sample."""
    comparison_seconds: float
    """After this long, a comparison ends with the rounds it has, but not with fewer than three."""
    length: int
    """That of the comparisons with a bar."""
    lengths: tuple[int, ...]
    contender_lengths: tuple[int, ...]
    """Where the slow implementations are measured too."""
    quadratic_length: int
    """The same for those whose backward takes time with the square of the length."""
    d_states: tuple[int, ...]
    memory_length: int
    threads: tuple[int, ...]
    """The bars are those of the last."""


FULL = Settings(
    rounds=9,
    sample_seconds=0.02,
    comparison_seconds=15.0,
    length=1024,
    lengths=(256, 1024, 4096, 16384, 65536, 262144),
    contender_lengths=(256, 1024),
    quadratic_length=256,
    d_states=(1, 4, 16, 64, 128),
    memory_length=16384,
    threads=(1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,),
)
QUICK = Settings(
    rounds=3,
    sample_seconds=0.002,
    comparison_seconds=0.0,
    length=128,
    lengths=(256, 1024),
    contender_lengths=(128,),
    quadratic_length=32,
    d_states=(4, 16),
    memory_length=4096,
    threads=(1,),
)
