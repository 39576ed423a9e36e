# SPDX-License-Identifier: Apache-2.0
"""What the tests of the block share: blocks to test, and the block written out."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambablock import MambaBlock, MambaState, reference

# Same sums in another order: float64 rounding (1e-16) with room for a few hundred terms and for
# gradients that pass through dozens of time steps.
assert_same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def make_block(**options) -> MambaBlock:
    """A float64 block whose every parameter matters and none is at its regular initial value."""
    torch.manual_seed(0)
    options = {"d_model": 6, "d_state": 5, "d_conv": 4, "dt_rank": 3, "dtype": torch.float64} | (
        options
    )
    block = MambaBlock(**options)
    with torch.no_grad():
        block.A_log.add_(0.3 * torch.randn_like(block.A_log))
        block.D.add_(torch.randn_like(block.D))
        block.x_proj.weight.mul_(4.0)
        block.dt_proj.bias.add_(2.0)
    return block


def random_state(block: MambaBlock, rows: int) -> MambaState:
    return MambaState(*(torch.randn_like(s).requires_grad_() for s in block.allocate_state(rows)))


def compose(
    parameters: dict[str, Tensor], hidden: Tensor, state: MambaState
) -> tuple[Tensor, MambaState]:
    """The block written out with the reference ops; softplus, D and the gate are plain PyTorch."""
    p = parameters
    inputs, z = F.linear(hidden, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, dim=-1)
    x, conv = reference.causal_conv1d(
        inputs,
        p["conv1d.weight"][:, 0],
        bias=p.get("conv1d.bias"),
        initial_state=state.conv,
        return_final_state=True,
    )
    x = F.silu(x)
    rank, d_state = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    dt, B, C = F.linear(x, p["x_proj.weight"]).split([rank, d_state, d_state], dim=-1)
    delta = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
    y, ssm = reference.selective_scan(
        x, delta, -p["A_log"].exp(), B, C, initial_state=state.ssm, return_final_state=True
    )
    y = ((y + p["D"] * x) * F.silu(z)).to(x.dtype)
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias")), MambaState(conv, ssm)


def trained(block: MambaBlock, *others: Tensor) -> list[Tensor]:
    return [*block.parameters(), *others]


def ragged_mask() -> Tensor:
    return torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 1, 1],
            [1, 1, 0, 0, 0, 0, 0],
            [0, 1, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ]
    )


class Adapted(nn.Module):
    """A linear layer with a low-rank update beside it, as LoRA makes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, 2, bias=False, **like)
        self.up = nn.Linear(2, base.out_features, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
