# SPDX-License-Identifier: Apache-2.0
"""The sizes measured and how often."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

D_MODEL, D_INNER, D_STATE, D_CONV = 768, 1536, 16, 4


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    layers: int
    d_model: int
    vocabulary: int
    prompt: int
    tokens: int
    """Decoded after a prompt."""
    batches: tuple[int, ...]
    llama: bool
    """Whether llama.cpp is measured too, which is built first."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    sizes: ClassVar[dict[str, Any]]
    device: str
    rounds: int = 3
    """Samples of each figure; its median is taken."""
    sample_seconds: float = 0.002
    """A call that takes less is repeated within a sample."""
    comparison_seconds: float = 0.0
    """After this long, a comparison ends with the rounds it has, but not with fewer than three."""


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """On the CPU: one sequence of the widths above."""

    sizes: ClassVar[dict[str, Any]] = {
        "batch": 1,
        "d_model": D_MODEL,
        "d_inner": D_INNER,
        "d_state": D_STATE,
    }
    device: str = "cpu"
    length: int
    """That of the targets, and one of `lengths`."""
    lengths: tuple[int, ...]
    slow_lengths: tuple[int, ...]
    """Those of them where the slow implementations are measured too."""
    quadratic_length: int
    """The same, below `length`, for those whose backward is quadratic in the length."""
    d_states: tuple[int, ...]
    memory_length: int
    weights: tuple[tuple[int, int], ...]
    """(out_features, in_features) of the products of few rows."""
    rows: tuple[int, ...]
    weight_bytes: int
    """More than the caches hold: the weights of one shape together."""
    model: ModelSizes
    threads: tuple[int, ...]
    """The targets are for the last."""
    distributed_length: int
    distributed_rounds: int


@dataclass(frozen=True, kw_only=True)
class CudaSettings(Sampling):
    """On a CUDA device, in bfloat16."""

    sizes: ClassVar[dict[str, Any]] = {"d_state": D_STATE, "d_conv": D_CONV}
    device: str = "cuda"
    batch: int
    length: int
    """Those of the targets."""
    channels: int
    """The operators' d_inner and the block's d_model."""
    steps: int
    """Of time, in one batch: the scan's are split into sequences of each of `lengths`."""
    lengths: tuple[int, ...]
    """Also `steps` over `batch`; the last is all steps in one sequence."""
    longest: int
    longest_channels: int
    conv_length: int
    """Long enough that the device, and not the host, takes the time."""


FULL = Settings(
    rounds=9,
    sample_seconds=0.02,
    comparison_seconds=15.0,
    length=1024,
    lengths=(256, 1024, 4096, 16384, 65536, 262144),
    slow_lengths=(256, 1024),
    quadratic_length=256,
    d_states=(1, 4, 16, 64, 128),
    memory_length=16384,
    weights=((3072, 768), (768, 1536), (50280, 768)),
    rows=(1, 2, 4, 8, 16),
    weight_bytes=1 << 27,
    model=ModelSizes(
        layers=24,
        d_model=D_MODEL,
        vocabulary=50280,
        prompt=512,
        tokens=64,
        batches=(1, 2, 4, 8),
        llama=True,
    ),
    threads=(1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,),
    distributed_length=65536,
    distributed_rounds=3,
)
QUICK = Settings(
    length=128,
    lengths=(64, 128),
    slow_lengths=(128,),
    quadratic_length=64,
    d_states=(4, 16),
    memory_length=1024,
    weights=((48, 32),),
    rows=(1, 4),
    weight_bytes=1 << 12,
    model=ModelSizes(
        layers=2, d_model=32, vocabulary=64, prompt=8, tokens=2, batches=(1, 4), llama=False
    ),
    threads=(1,),
    distributed_length=256,
    distributed_rounds=1,
)
CUDA_FULL = CudaSettings(
    rounds=25,
    sample_seconds=0.02,
    comparison_seconds=8.0,
    batch=8,
    length=2048,
    channels=2048,
    steps=65536,
    lengths=(256, 1024, 8192, 65536),
    longest=1048576,
    longest_channels=1024,
    conv_length=32768,
)
CUDA_QUICK = CudaSettings(
    batch=2,
    length=256,
    channels=128,
    steps=1024,
    lengths=(128, 512, 1024),
    longest=4096,
    longest_channels=64,
    conv_length=512,
)
