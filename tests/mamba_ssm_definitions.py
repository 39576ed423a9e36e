# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's functions written out, and inputs for them: what the tests of compat share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambablock import MambaBlock
from mambablock.compat.mamba_ssm import Mamba

# Sums of some dozen float64 terms in another order.
assert_same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)

BATCH, DIM, LENGTH, STATES = 2, 4, 7, 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_definition(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence, step by step, with B and C as (batch, dim, dstate, seqlen)."""
    batch, dim, length = u.shape
    B, C = (
        t[None, ..., None].expand(batch, -1, -1, length)
        if t.dim() == 2
        else (t[:, None] if t.dim() == 3 else t).repeat_interleave(
            dim // (t.shape[1] if t.dim() == 4 else 1), dim=1
        )
        for t in (B, C)
    )
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    h = u.new_zeros(batch, dim, A.shape[1])
    outputs = []
    for t in range(length):
        step = dt[..., t, None]
        h = (step * A).exp() * h + step * u[..., t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


SHAPES = {
    "constant": (DIM, STATES),
    "varying": (BATCH, STATES, LENGTH),
    "one group": (BATCH, 1, STATES, LENGTH),
    "groups": (BATCH, 2, STATES, LENGTH),
}


def scan_inputs(B: str = "varying", C: str = "varying") -> dict[str, Tensor]:
    return {
        "u": random(BATCH, DIM, LENGTH),
        "delta": random(BATCH, DIM, LENGTH),
        "A": -torch.rand(DIM, STATES, dtype=torch.float64) - 0.1,
        "B": random(*SHAPES[B]),
        "C": random(*SHAPES[C]),
        "D": random(DIM),
        "z": random(BATCH, DIM, LENGTH),
        "delta_bias": random(DIM),
    }


def inner_arguments(block: MambaBlock) -> dict[str, Any]:
    return {
        "xz": random(BATCH, 2 * block.d_inner, LENGTH),
        "conv1d_weight": block.conv1d.weight,
        "conv1d_bias": block.conv1d.bias,
        "x_proj_weight": block.x_proj.weight,
        "delta_proj_weight": block.dt_proj.weight,
        "out_proj_weight": block.out_proj.weight,
        "out_proj_bias": block.out_proj.bias,
        "A": -block.A_log.exp(),
        "D": block.D,
        "delta_bias": block.dt_proj.bias,
    }


def rms_norm(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    scaled = x * (x.square().mean(dim, keepdim=True) + 1e-6).rsqrt()
    return scaled * weight.view(-1, *[1] * (x.dim() - 1 - dim))


def inner_definition(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, x_proj_weight: Tensor, **rest: Any
) -> tuple[Tensor]:
    x, z = xz.chunk(2, dim=1)
    x = F.conv1d(F.pad(x, (3, 0)), conv1d_weight, conv1d_bias, groups=x.shape[1])
    x = F.silu(x)
    rank = rest["delta_proj_weight"].shape[1]
    projected = x_proj_weight @ x
    delta = rest["delta_proj_weight"] @ projected[:, :rank]
    B = rest.get("B", projected[:, rank : rank + STATES])
    C = rest.get("C", projected[:, -STATES:])
    if "B_proj_bias" in rest:
        B, C = B + rest["B_proj_bias"][:, None], C + rest["C_proj_bias"][:, None]
    if "b_rms_weight" in rest:
        B = rms_norm(B, rest["b_rms_weight"], B.dim() - 2 if B.dim() > 2 else 1)
        C = rms_norm(C, rest["c_rms_weight"], 1)
        delta = rms_norm(delta, rest["dt_rms_weight"], 1)
    y, _ = scan_definition(
        x, delta, rest["A"], B, C, rest["D"], z, rest["delta_bias"], delta_softplus=True
    )
    return (F.linear(y.transpose(1, 2), rest["out_proj_weight"], rest["out_proj_bias"]),)


def make_mamba(**options: Any) -> Mamba:
    torch.manual_seed(0)
    block = Mamba(8, d_state=STATES, bias=True, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


def update_inputs(heads: bool = False) -> dict[str, Tensor]:
    dim = (2, DIM) if heads else (DIM,)
    return {
        "state": random(BATCH, *dim, STATES),
        "x": random(BATCH, *dim),
        "dt": random(BATCH, *dim),
        "A": -torch.rand(*dim, STATES, dtype=torch.float64),
        "B": random(BATCH, *([2] if heads else []), STATES),
        "C": random(BATCH, *([2] if heads else []), STATES),
        "D": random(*dim),
        "z": random(BATCH, *dim),
        "dt_bias": random(*dim),
    }


def update_definition(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and the state after the step; B and C have a group per head."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B[..., None, :]
    y = (state * C[..., None, :]).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)), state
