# SPDX-License-Identifier: Apache-2.0
"""The raw scan behind selective_scan_cuda and VMamba's like of it: no autograd, time last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._explain import Forms
from ._scan import channels_last, per_time_forms, scan

__all__ = ["backward", "forms", "forward"]


def forms(A: Any = None, B: Any = None, C: Any = None, **_: Any) -> Forms:
    return {
        "A": "dim, dstate",
        "u": "batch, dim, seqlen",
        "delta": ("batch, dim, seqlen", "batch, delta_dim, seqlen"),
        "B": per_time_forms(A, B),
        "C": per_time_forms(A, C),
        "D": "dim",
        "z": "batch, dim, seqlen",
        "delta_bias": ("dim", "delta_dim"),
        "dout": "batch, dim, seqlen",
        "x": "batch, dim, chunks, 2 * dstate",
        "out": "batch, dim, seqlen",
        "dz": "batch, dim, seqlen",
    }


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y, and x, which holds the last state in x[:, :, -1, 1::2].

    The states that the backward starts from are an attribute of x; without it, on a copy of x, the
    backward computes them again.
    """
    if A.is_complex():
        y, last_state = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        return y, last_state.repeat_interleave(2, dim=-1).unsqueeze(2)
    arguments = channels_last(u, delta, A, B, C, D, None, delta_bias)
    y, last_state, saved = _operator(arguments, delta_softplus)
    x = last_state.repeat_interleave(2, dim=-1).unsqueeze(2)
    x.saved_states = saved  # type: ignore[attr-defined]
    return y.transpose(1, 2).to(u.dtype), x


def backward(
    dout: Tensor,
    x: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Any]:
    """Gradients of all tensors in the order u, delta, A, B, C, D, delta_bias, z."""
    if A.is_complex():
        return _complex_backward(dout, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    arguments = channels_last(u, delta, A, B, C, D, z, delta_bias)
    saved = getattr(x, "saved_states", None)
    if saved is None or saved.device != u.device:
        saved = _operator(arguments, delta_softplus)[2]
    dy = dout.transpose(1, 2).to(arguments[0].dtype)
    du, ddelta, dA, dB, dC, dD, dz, dbias, _ = torch.ops.mambablock.selective_scan_backward(
        dy, None, saved, *arguments, None, None, delta_softplus, False
    )
    return [
        du.transpose(1, 2).to(u.dtype),
        ddelta.transpose(1, 2).to(delta.dtype),
        dA.to(A.dtype),
        _time_last(dB, B),
        _time_last(dC, C),
        None if D is None else dD.to(D.dtype),
        None if delta_bias is None else dbias.to(delta_bias.dtype),
        None if z is None else dz.transpose(1, 2).to(z.dtype),
    ]


def _operator(arguments: tuple[Any, ...], delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.mambablock.selective_scan(
        *arguments, None, None, delta_softplus, False, True
    )
    return results


def _time_last(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient (batch, length, dstate) or (batch, length, groups, dstate) of B or C, as it."""
    if like.dim() == 2:
        return gradient.sum((0, 1)).to(like.dtype)
    if gradient.dim() == 4:
        groups = like.shape[1] if like.dim() == 4 else 1
        if gradient.shape[2] != groups:
            gradient = gradient.unflatten(2, (groups, -1)).sum(3)
        gradient = gradient.squeeze(2) if like.dim() == 3 else gradient
    last = gradient.transpose(1, 2) if like.dim() == 3 else gradient.permute(0, 2, 3, 1)
    return last.to(like.dtype)


@torch.enable_grad()
def _complex_backward(dout: Tensor, *tensors_and_softplus: Any) -> list[Any]:
    *tensors, delta_softplus = tensors_and_softplus
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*(*leaves, delta_softplus))
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, given, dout.to(y.dtype)))
    *gradients, dz, dbias = (None if leaf is None else next(found) for leaf in leaves)
    return [*gradients, dbias, dz]
