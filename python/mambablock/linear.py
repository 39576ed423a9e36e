# SPDX-License-Identifier: Apache-2.0
"""The linear layer of few rows: public function, fake and vmap."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _library as library

# The most rows with which the CPU's operator is at least as fast as F.linear, which
# `python -m benchmarks --only linear` measures.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 16, torch.float16: 16, torch.float64: 8}


@library.register_fake("linear", "x")
def _fake(a: Any) -> Tensor:
    library.check_shape("linear", "x", a.x, rows=None, in_features=None)
    rows, in_features = a.x.shape
    library.check_shape("linear", "weight", a.weight, out_features=None, in_features=in_features)
    y: Tensor = a.x.new_empty((rows, a.weight.shape[0]))
    return y


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    x, weight = (
        t if dim is None else t.movedim(dim, 0)
        for t, dim in zip((x, weight), in_dims, strict=False)
    )
    y = x @ weight.mT
    if bias is not None:
        y = y + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0)[:, None])
    return y.to(x.dtype), 0


torch.library.register_vmap("mambablock::linear", _vmap)
_prepare = library.prepared("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, as fast as memory gives the weight where x has few rows.

    That is for inference on the CPU, where each product of two rows is summed in float32 (float64
    for float64) in a fixed order: the same bits for any number of rows and threads, on any
    processor. With more than MOST_ROWS rows, with gradients, under autocast, for a tensor's
    subclass and on other devices it is torch.nn.functional.linear itself.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        weight: (out_features, in_features), of x's type.
        bias: (out_features), of x's type; float32 too where x has few rows.

    Returns:
        y (..., out_features), of x's type.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type or device.
    """
    x, weight, bias = _prepare(x, weight, bias)
    if not has_few_rows(x, weight, *[bias] * (bias is not None)):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mambablock.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def has_few_rows(x: Tensor, *parameters: Tensor, most: dict[torch.dtype, int] = MOST_ROWS) -> bool:
    """Whether the CPU's operators of few rows are for an x (..., in_features) and parameters of a
    linear layer or more; `most` has all types that they know."""
    return (
        x.device.type == "cpu"
        and x.dim() > 0
        and _at_most(math.prod(x.shape[:-1]), most.get(x.dtype, 0))
        and all(_is_plain(t) for t in (x, *parameters))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _at_most(rows: int, most: int) -> bool:
    # An exported program is for any number of rows, unless it is known to be for few.
    return statically_known_true(rows <= most) if torch.compiler.is_exporting() else rows <= most


def _is_plain(tensor: Tensor) -> bool:
    """Whether no subclass, such as a quantised or distributed one, has its own F.linear."""
    if torch.compiler.is_compiling():  # where a plain one may be a fake
        return not is_traceable_wrapper_subclass(tensor)
    return type(tensor) in (Tensor, nn.Parameter)
