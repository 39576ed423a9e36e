# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d's states of packed sequences, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mambablock import _checks as check

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last state_len inputs of each packed sequence, with zeros before a shorter one.

    Args:
        x: (total steps, dim).
        cu_seqlens: (batch + 1), int32 or int64, rising from 0 to the number of steps.
        state_len: the number of inputs.

    Returns:
        (batch, dim, state_len), of x's type; not differentiable.

    Raises:
        TypeError: x or cu_seqlens is not a tensor, or state_len not an integer.
        ValueError: x or cu_seqlens has a wrong shape or device, or state_len is negative.
    """
    owner = "causal_conv1d_varlen_states"
    check.tensor(owner, "x", x, {}, ("total", "dim"))
    check.tensor(owner, "cu_seqlens", cu_seqlens, {}, ("batch + 1",))
    check.device(owner, "cu_seqlens", cu_seqlens, "x", x)
    check.integers(owner, state_len=state_len)
    check.not_negative(owner, state_len=state_len)
    steps = cu_seqlens[1:, None].long() + torch.arange(-state_len, 0, device=x.device)
    before = steps < cu_seqlens[:-1, None]
    states = x.new_zeros(*steps.shape, x.shape[1])
    if x.shape[0] > 0:
        states = x[steps.clamp(min=0, max=x.shape[0] - 1)].masked_fill(before[..., None], 0)
    return states.transpose(1, 2)


# The same numbers by the same steps: there is no kernel to compare with.
causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
