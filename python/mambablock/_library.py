# SPDX-License-Identifier: Apache-2.0
"""Loads the operator libraries and holds what the operators' Python sides share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_folder = Path(__file__).parent

for _name, _wanted in (
    ("libmambablock.so", True),
    ("libmambablock_cuda.so", torch.version.cuda is not None),
):
    if _wanted and (_folder / _name).exists():
        torch.ops.load_library(str(_folder / _name))

if not hasattr(torch.ops.mambablock, "selective_scan"):
    raise ImportError(
        "mambablock: libmambablock.so is not beside the package; build it with "
        "`pip install --no-build-isolation .` and import from outside of the source tree"
    )

# How many steps of time one saved state stands for: kScanTimeTile in csrc/selective_scan/params.h
# and kCudaTile in cuda.h.
TIME_TILE = {"cpu": 32, "cuda": 16}


def register_fake(op: str) -> Callable[[Function], Function]:
    """torch.library.register_fake with its type, which torch leaves out."""
    decorator: Callable[[Function], Function] = torch.library.register_fake(f"mambablock::{op}")
    return decorator


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of states and sums: float64 for float64 activations, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_shape(op: str, argument: str, tensor: Tensor, **sizes: int) -> None:
    """Raises RuntimeError unless `tensor` has the named sizes; for fake and meta tensors."""
    if tensor.dim() != len(sizes) or any(
        got != expected for got, expected in zip(tensor.shape, sizes.values(), strict=True)
    ):
        expected = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise RuntimeError(f"{op}: {argument} must be ({expected}); got {tuple(tensor.shape)}")


def check_devices(op: str, argument: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError unless all tensors are on `tensor`'s device."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"{op}: {name} must be on {tensor.device} as {argument}; got {other.device}"
            )


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Activations as autocast wants them: in its type where it is on, but for float64."""
    tensors, device = (first, *others), first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forbid_double_backward(op: str) -> None:
    raise RuntimeError(
        f"{op}: its backward must be differentiated at most once; got a second derivative "
        "(create_graph=True or a nested torch.func.grad)"
    )


def none_if_empty(gradient: Tensor, of: Tensor | None) -> Tensor | None:
    """Operators return an empty tensor for the gradient of an absent argument."""
    return None if of is None else gradient


# Per argument: the dimension of its channels, or None where it has none.
ChannelDims = Sequence[int | None]


def fold_vmap(
    op: str, batch_size: int, in_dims: Sequence[int | None], args: Sequence[Any], dims: ChannelDims
) -> list[Any]:
    """The arguments with the vmapped dimension folded into the channels.

    Channels are independent of each other (given one group of B and C each), so a vmapped call is
    one call on batch_size times the channels.
    """
    folded = []
    for arg, in_dim, dim in zip(args, in_dims, dims, strict=True):
        if not isinstance(arg, Tensor) or (dim is None and in_dim is None):
            folded.append(arg)
        elif dim is None:
            raise RuntimeError(f"{op}: cu_seqlens must not be mapped over by vmap; got a batch")
        else:
            moved = (
                arg.unsqueeze(dim).expand(*arg.shape[:dim], batch_size, *arg.shape[dim:])
                if in_dim is None
                else arg.movedim(in_dim, dim)
            )
            folded.append(moved.flatten(dim, dim + 1))
    return folded


def unfold_vmap(
    batch_size: int, outputs: Sequence[Tensor], dims: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Undoes fold_vmap on an operator's outputs; an absent (empty) one stays unmapped."""
    unfolded: list[Tensor] = []
    out_dims: list[int | None] = []
    for output, dim in zip(outputs, dims, strict=True):
        if output.dim() <= dim or (output.dim() == 1 and output.numel() == 0):
            unfolded.append(output)
            out_dims.append(None)
        else:
            unfolded.append(output.unflatten(dim, (batch_size, output.shape[dim] // batch_size)))
            out_dims.append(dim)
    return tuple(unfolded), tuple(out_dims)


VmapRule = Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]


def channel_vmap(
    op: str, function: Callable[..., Any], dims: ChannelDims, out_dims: Sequence[int]
) -> VmapRule:
    """The vmap rule of `function`, called as (info, in_dims, *args)."""

    def rule(
        info: Any, in_dims: Sequence[int | None], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        folded = fold_vmap(op, info.batch_size, in_dims, args, dims)
        return unfold_vmap(info.batch_size, function(*folded), out_dims)

    return rule
