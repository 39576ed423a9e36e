# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's fused norms (version 2.3), by PyTorch's own norms: dropout, residual, then norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambablock._layers import in_scan_dtype

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """The norm of dropout(x * rowscale) + dropout(x1) + residual, computed in float32.

    Args:
        x, x1, residual: (..., dim).
        weight, bias: (dim); weight1 and bias1 give a second output from the same norm.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x and of x1.
        rowscale: (...), of x's rows; not with x1.
        prenorm: also return the sum, which is the next residual.
        residual_in_fp32: where there is no residual, the sum is float32, not x's type.
        is_rms_norm: RMS norm instead of layer norm.
        return_dropout_mask: also return the masks of x and of x1, True where an element is kept.

    Returns:
        y of x's type, then those of y1, the sum, and the two masks that are asked for.

    Raises:
        ValueError: rowscale is given together with x1, or a shape does not fit.
    """
    owner = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    if x1 is not None and rowscale is not None:
        raise ValueError(f"{owner}: rowscale must be None with x1; got {tuple(rowscale.shape)}")
    for name, tensor in (("residual", residual), ("x1", x1)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(
                f"{owner}: {name} must be {tuple(x.shape)} as x; got {tuple(tensor.shape)}"
            )
    total = x if rowscale is None else in_scan_dtype(x) * rowscale[..., None]
    total, mask = _dropout(total, dropout_p)
    mask1 = None
    if x1 is not None:
        x1, mask1 = _dropout(x1, dropout_p)
        total = in_scan_dtype(total) + x1
    if residual is not None:
        total = in_scan_dtype(residual) + total
    if residual is not None:
        kept_dtype = residual.dtype
    else:
        kept_dtype = torch.float32 if residual_in_fp32 else x.dtype

    normed = _norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)
    outputs: list[Tensor | None] = [normed]
    if weight1 is not None:
        outputs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        outputs.append(total.to(kept_dtype))
    if return_dropout_mask:
        outputs += [mask, mask1]
    return tuple(outputs) if len(outputs) > 1 else normed


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """layer_norm_fn with is_rms_norm."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(residual_in_fp32, True, return_dropout_mask),
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm_fn followed by a linear layer; the sum too if prenorm."""
    options: dict[str, Any] = {"residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    y: Any = layer_norm_fn(x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, **options)
    out = F.linear(y[0].to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, y[1]) if prenorm else out


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with dropout and a residual before it; see rms_norm_fn."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn in x's type (float32 if upcast), with given masks of what dropout keeps."""
    return _reference(
        *(False, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale),
        *(prenorm, dropout_mask, dropout_mask1, upcast),
    )


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_ref with an RMS norm."""
    return _reference(
        *(True, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale),
        *(prenorm, dropout_mask, dropout_mask1, upcast),
    )


def _reference(
    is_rms_norm: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    prenorm: bool,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    upcast: bool,
) -> Tensor | tuple[Tensor, ...]:
    dtype = x.dtype
    total = x.float() if upcast else x
    if rowscale is not None:
        total = total * rowscale[..., None]
    total, _ = _dropout(total, dropout_p, dropout_mask)
    if x1 is not None:
        total = total + _dropout(x1.to(total.dtype), dropout_p, dropout_mask1)[0]
    if residual is not None:
        total = (total + residual).to(total.dtype)
    norms = [(weight, bias)] if weight1 is None else [(weight, bias), (weight1, bias1)]
    outputs = [_norm(total, w, b, eps, is_rms_norm).to(dtype) for w, b in norms]
    outputs += [total] if prenorm else []
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """In float32 (float64 if one of them is), whatever their types."""
    x = in_scan_dtype(x)
    dtype = torch.promote_types(x.dtype, in_scan_dtype(weight).dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not is_rms_norm:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = F.rms_norm(x, weight.shape, weight, eps)
    return y if bias is None else y + bias


def _dropout(
    x: Tensor, probability: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if probability == 0.0:
        return x, None
    if mask is None:
        mask = torch.rand(x.shape, device=x.device) >= probability
    return x.masked_fill(~mask, 0.0) / (1.0 - probability), mask
