# SPDX-License-Identifier: Apache-2.0
"""What the ops compute, in plain PyTorch: read this first, and test against it.

The same signatures as the ops of the same names, differentiable by autograd, never fast. Dimension
letters: B batch, L length, D channels, N state size, W convolution width, G groups, S packed
sequences. Everything is computed in float32 (float64 for float64 activations); y is rounded to the
activations' type at the end and the states stay in the type of the computation. Arguments are not
checked here.

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752, equation 2a and section 3.2 (algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "mamba_step",
    "selective_scan",
    "selective_state_update",
]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution along time that sees the past only.

    y_t = bias + sum_k weight[:, k] * x_{t-W+1+k}, then SiLU if asked, where the inputs before the
    first are initial_state (zeros without one).

    x is (B, L, D), weight (D, W), bias (D), initial_state (B or S, W-1, D) with the oldest input
    first, cu_seqlens (S+1) with B = 1. Returns y (B, L, D), and the last W-1 inputs if
    return_final_state. With reverse, each sequence is flipped in time before and after.
    """
    dtype = _computation_dtype(x)
    channels, width = weight.shape
    state = _first_state(x, initial_state, cu_seqlens, (width - 1, channels))

    def convolve(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        inputs = torch.cat([state, x], dim=1)
        windows = torch.stack([inputs[:, k : k + length] for k in range(width)], dim=-1)
        return (windows * weight.to(dtype)).sum(-1), inputs[:, length:]

    y, final_state = _each_sequence(convolve, state, [x.to(dtype)], cu_seqlens, reverse)
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    y = y.to(x.dtype)
    return (y, final_state) if return_final_state else y


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space recurrence, from h_0 = initial_state (zeros without one):

        dt_t = delta_t + delta_bias, then softplus if asked
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = C_t . h_t + D u_t, then times silu(z_t) if z is given

    u, delta and z are (B, L, D), A (D, N), B and C (B, L, N) or (B, L, G, N) where channel d reads
    group d // (D / G), D and delta_bias (D), initial_state (B or S, D, N), cu_seqlens (S+1) with
    B = 1. Returns y (B, L, D), and the last h if return_final_state. With reverse, each sequence
    is flipped in time before and after.
    """
    output_dtype, dtype = u.dtype, _computation_dtype(u)
    u, dt = u.to(dtype), _time_step(delta.to(dtype), delta_bias, delta_softplus)
    A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
    state = _first_state(u, initial_state, cu_seqlens, A.shape)

    def scan(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [u[:, :0]]
        for t in range(u.shape[1]):
            h, y = _recur(h, u[:, t], dt[:, t], A, B[:, t], C[:, t])
            outputs.append(y[:, None])
        return torch.cat(outputs, dim=1), h

    y, final_state = _each_sequence(scan, state, [u, dt, B, C], cu_seqlens, reverse)
    y = _skip_and_gate(y, u, D, z).to(output_dtype)
    return (y, final_state) if return_final_state else y


@torch.no_grad()
def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One time step of causal_conv1d, for inference: x and y are (B, D).

    state (B, W-1, D), of any floating type, is rolled in place. With state_indices (B), row b uses
    row state_indices[b] of a larger state; where that is negative, y is 0 and no state changes.
    """
    if state_indices is not None:
        used = state_indices >= 0
        rows = state_indices[used].long()
        picked = state[rows]
        y = x.new_zeros(x.shape)
        y[used] = causal_conv1d_update(picked, x[used], weight, bias=bias, silu=silu)
        state[rows] = picked
        return y
    dtype = _computation_dtype(x)
    inputs = torch.cat([state.to(dtype), x.to(dtype)[:, None]], dim=1)
    y = (inputs.transpose(1, 2) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    state.copy_(inputs[:, 1:])
    return y.to(x.dtype)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One time step of selective_scan, for inference: u, delta, z and y are (B, D), B and C (B, N)
    or (B, G, N).

    state (B, D, N), of any floating type, becomes the next h in place; y is computed before that
    is rounded. state_indices as in causal_conv1d_update.
    """
    if state_indices is not None:
        used = state_indices >= 0
        rows = state_indices[used].long()
        picked = state[rows]
        y = u.new_zeros(u.shape)
        y[used] = selective_state_update(
            picked,
            u[used],
            delta[used],
            A,
            B[used],
            C[used],
            D=D,
            z=None if z is None else z[used],
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
        )
        state[rows] = picked
        return y
    output_dtype, dtype = u.dtype, _computation_dtype(u)
    u, dt = u.to(dtype), _time_step(delta.to(dtype), delta_bias, delta_softplus)
    h, y = _recur(state.to(dtype), u, dt, A.to(dtype), B.to(dtype), C.to(dtype))
    state.copy_(h)
    return _skip_and_gate(y, u, D, z).to(output_dtype)


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    *,
    dt_norm_weight: Tensor | None = None,
    B_norm_weight: Tensor | None = None,
    C_norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One time step of a whole block (figure 3), for inference: x and y are (B, d_model).

    conv_state (B, W-1, D) and ssm_state (B, D, N) advance in place; the weights are those of the
    layers of the same names. With norm_eps, dt, B and C have RMS norms. state_indices as in
    causal_conv1d_update.
    """
    output_dtype, dtype = x.dtype, _computation_dtype(x)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    inputs, z = project(x.to(dtype), in_proj_weight, in_proj_bias).chunk(2, dim=-1)
    u = causal_conv1d_update(
        conv_state, inputs, conv_weight, bias=conv_bias, silu=True, state_indices=state_indices
    )
    sizes = [dt_proj_weight.shape[1], *[A_log.shape[1]] * 2]
    dt, B, C = project(u, x_proj_weight).split(sizes, dim=-1)
    if norm_eps is not None:
        weights = (dt_norm_weight, B_norm_weight, C_norm_weight)
        dt, B, C = (
            F.rms_norm(t, t.shape[-1:], None if w is None else w.to(dtype), norm_eps)
            for t, w in zip((dt, B, C), weights, strict=True)
        )
    y = selective_state_update(
        ssm_state,
        u,
        project(dt, dt_proj_weight),
        -A_log.to(dtype).exp(),
        B,
        C,
        D=D,
        z=z,
        delta_bias=dt_proj_bias,
        delta_softplus=True,
        state_indices=state_indices,
    )
    y = project(y, out_proj_weight, out_proj_bias).to(output_dtype)
    return y if state_indices is None else y.masked_fill((state_indices < 0)[:, None], 0)


def _computation_dtype(activations: Tensor) -> torch.dtype:
    return torch.promote_types(activations.dtype, torch.float32)


def _first_state(
    x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """initial_state or zeros, one row for each of the B rows or S packed sequences."""
    dtype = _computation_dtype(x)
    if initial_state is not None:
        return initial_state.to(dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return x.new_zeros(rows, *shape, dtype=dtype)


def _each_sequence(
    op: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    timed: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """op(state, *timed) -> (y, final_state), apart for every packed sequence, in its direction."""
    if cu_seqlens is not None:
        outputs, final_states = [timed[0][:, :0]], [state[:0]]
        for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            sequence = [t[:, start:end] for t in timed]
            y, final_state = _each_sequence(op, state[s : s + 1], sequence, None, reverse)
            outputs.append(y)
            final_states.append(final_state)
        return torch.cat(outputs, dim=1), torch.cat(final_states)
    if reverse:
        y, final_state = op(state, *(t.flip(1) for t in timed))
        return y.flip(1), final_state
    return op(state, *timed)


def _time_step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if delta_softplus else delta


def _recur(
    h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: h (B, D, N), u and dt (B, D), B and C (B, N) or (B, G, N) -> next h, C . h."""
    B, C = _for_channels(B, u.shape[1]), _for_channels(C, u.shape[1])
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B
    return h, (C * h).sum(-1)


def _for_channels(matrix: Tensor, channels: int) -> Tensor:
    """(B, N) or (B, G, N) -> (B, 1, N) or (B, D, N): each channel's own."""
    if matrix.dim() == 2:
        return matrix[:, None]
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y
