# SPDX-License-Identifier: Apache-2.0
"""What MambaBlock and the patched mixers of other libraries share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ._library import accumulator_dtype

Result = TypeVar("Result")


def in_scan_dtype(parameter: Tensor) -> Tensor:
    """float32, or float64 if the parameter is that."""
    dtype = accumulator_dtype(parameter.dtype)
    return parameter if parameter.dtype == dtype else parameter.to(dtype)


def project_delta(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """delta, and dt_proj's bias if the scan is still to add it."""
    if is_plain_linear(dt_proj) and (bias := dt_proj.bias) is not None:
        # The scan adds the bias in float32, where a bfloat16 sum would lose most of it.
        return F.linear(dt, dt_proj.weight), in_scan_dtype(bias)
    return dt_proj(dt), None


def recomputed_but_scan(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), recomputed in the backward but for the scan and what ranks exchange; only
    args are saved."""
    ops, collectives = torch.ops.mambablock, torch.ops._c10d_functional
    kept = [
        ops.selective_scan.default,
        ops.selective_scan_carry.default,
        collectives.all_gather_into_tensor.default,
        collectives.all_reduce.default,
        collectives.all_to_all_single.default,
        collectives.wait_tensor.default,
    ]
    result: Result = checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, kept),
    )
    return result


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is only F.linear."""
    return type(layer) is nn.Linear and is_plain(layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is only its class's forward: no hook or replaced forward."""
    return (
        "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )
