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

from ._checks import autocasts
from ._library import accumulator_dtype

Result = TypeVar("Result")


def in_scan_dtype(parameter: Tensor) -> Tensor:
    """float32, or float64 if the parameter is that."""
    dtype = accumulator_dtype(parameter.dtype)
    return parameter if parameter.dtype == dtype else parameter.to(dtype)


def project_inputs(x_proj: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x_proj(x), and the x to use after it: where x_proj is plain, the matrix product that computes
    its gradient adds it to that x's, without a pass of its own."""
    if (
        is_plain_linear(x_proj)
        and x_proj.bias is None
        and type(x) is Tensor  # and no subclass, such as a DTensor
        and (x.dtype == x_proj.weight.dtype or autocasts(x.device.type))
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which sees to it itself
    ):
        projected, x = _Projection.apply(x, x_proj.weight.to(x.dtype))
        return projected, x
    return x_proj(x), x


class _Projection(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, weight), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, dx: Tensor | None) -> Any:
        if gradient is None:
            return dx, None
        x, weight = ctx.saved_tensors
        rows, dweight = gradient.flatten(0, -2), None
        if ctx.needs_input_grad[1]:
            dweight = rows.mT @ x.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if dx is None or torch.is_grad_enabled() or not dx.is_contiguous():
                added = gradient @ weight
                dx = added if dx is None else dx + added
            else:
                dx.view(-1, dx.shape[-1]).addmm_(rows, weight)  # the scan's, which nobody else has
        return dx, dweight


def project_delta(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """delta, and dt_proj's bias if the scan is still to add it."""
    if is_plain_linear(dt_proj) and (bias := dt_proj.bias) is not None:
        # The scan adds the bias in float32, where a bfloat16 sum would lose most of it.
        return F.linear(dt, dt_proj.weight), bias
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
