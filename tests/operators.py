# SPDX-License-Identifier: Apache-2.0
"""Inputs of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def causal_conv1d_inputs(
    batch: int = 2,
    length: int = 9,
    d_inner: int = 5,
    width: int = 4,
    *,
    states: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor | None]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = batch if states is None else states
    return {
        "x": torch.randn(batch, length, d_inner, dtype=torch.float64).to(dtype),
        "weight": torch.randn(d_inner, width, dtype=wide),
        "bias": torch.randn(d_inner, dtype=wide),
        "initial_state": torch.randn(rows, width - 1, d_inner, dtype=wide),
    }


def selective_scan_inputs(
    batch: int = 2,
    length: int = 9,
    d_inner: int = 4,
    d_state: int = 3,
    groups: int | None = None,
    *,
    optional: bool = True,
    states: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor | None]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    group = () if groups is None else (groups,)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor | None] = {
        "u": random(batch, length, d_inner),
        "delta": random(batch, length, d_inner),
        "A": -torch.rand(d_inner, d_state, dtype=wide) * 2 - 0.1,
        "B": random(batch, length, *group, d_state),
        "C": random(batch, length, *group, d_state),
    }
    if optional:
        rows = batch if states is None else states
        tensors |= {
            "D": torch.randn(d_inner, dtype=wide),
            "z": random(batch, length, d_inner),
            "delta_bias": torch.randn(d_inner, dtype=wide),
            "initial_state": torch.randn(rows, d_inner, d_state, dtype=wide),
        }
    return tensors


def causal_conv1d_update_inputs(
    batch: int = 3, d_inner: int = 5, width: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "state": torch.randn(batch, width - 1, d_inner, dtype=wide),
        "x": torch.randn(batch, d_inner, dtype=torch.float64).to(dtype),
        "weight": torch.randn(d_inner, width, dtype=wide),
        "bias": torch.randn(d_inner, dtype=wide),
    }


def selective_state_update_inputs(
    batch: int = 3,
    d_inner: int = 4,
    d_state: int = 3,
    groups: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group = () if groups is None else (groups,)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "state": torch.randn(batch, d_inner, d_state, dtype=wide),
        "u": random(batch, d_inner),
        "delta": random(batch, d_inner),
        "A": -torch.rand(d_inner, d_state, dtype=wide) * 2,
        "B": random(batch, *group, d_state),
        "C": random(batch, *group, d_state),
        "D": torch.randn(d_inner, dtype=wide),
        "z": random(batch, d_inner),
        "delta_bias": torch.randn(d_inner, dtype=wide),
    }


def as_dtype(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
