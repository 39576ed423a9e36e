# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens of which some are padding, wherever it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import accumulator_dtype


def padding_last(attention_mask: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The order (batch, length) of steps in which padding comes after all that it could affect, and
    where it then is: (batch, length, 1)."""
    # Real tokens first, in order (in reverse last).
    masked = attention_mask == 0
    order = masked.to(torch.uint8).argsort(dim=1, descending=reverse, stable=True)
    return order, masked.gather(1, order)[..., None]


def take_steps(sequences: Tensor, steps: Tensor) -> Tensor:
    """sequences (batch, length, channels) at each row's time steps: steps is (batch, count)."""
    return sequences.gather(1, steps[..., None].expand(-1, -1, sequences.shape[2]))


def last_real_inputs(
    conv_state: Tensor | None, inputs: Tensor, padding: Tensor, reverse: bool, width: int
) -> Tensor:
    """The convolution's last `width` inputs (batch, width, channels) before the padding, which
    comes last; conv_state has those before the first."""
    if conv_state is None:
        conv_state = inputs.new_zeros(inputs.shape[0], width, inputs.shape[2])
    conv_state = conv_state.to(accumulator_dtype(inputs.dtype))
    real_steps = (~padding).sum(1)
    last = real_steps + torch.arange(width, device=inputs.device)
    if reverse:
        conv_state = conv_state.flip(1)
        last = width + inputs.shape[1] - 1 - last
    pair = (inputs.to(conv_state.dtype), conv_state)
    return take_steps(torch.cat(pair if reverse else pair[::-1], dim=1), last)
