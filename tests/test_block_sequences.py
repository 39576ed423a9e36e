# SPDX-License-Identifier: Apache-2.0
"""MambaBlock in pieces and steps, padded and packed, against itself on whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blocks import (
    Adapted,
    assert_same,
    compose,
    make_block,
    ragged_mask,
    random_state,
    trained,
)
from compare import gradients
from mambablock import MambaState

pytestmark = pytest.mark.usefixtures("device")


# Streaming

PIECES = [
    [19],
    [1, 18],
    [7, 0, 12],
    # Shorter than the convolution's state.
    [2, 1, 2, 14],
]


@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_give_the_whole(pieces: list[int]) -> None:
    block = make_block()
    hidden = torch.randn(2, 19, 6, dtype=torch.float64, requires_grad=True)
    state = random_state(block, 2)
    y, last = block(hidden, state, return_state=True)
    outputs, carried = [], state
    for piece in hidden.split(pieces, dim=1):
        y_piece, carried = block(piece, carried, return_state=True)
        outputs.append(y_piece)
    whole, streamed = [y, *last], [torch.cat(outputs, dim=1), *carried]
    assert_same(streamed, whole)
    inputs = trained(block, hidden, *state)
    assert_same(gradients(streamed, inputs), gradients(whole, inputs))


def test_truncated_bptt_stops_at_the_detached_state() -> None:
    block = make_block()
    hidden = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    _, state = block(hidden[:, :5], return_state=True)
    y = block(hidden[:, 5:], MambaState(*(s.detach() for s in state)))

    # The same by the composition, from a state that is a constant.
    constant = MambaState(*(s.detach().clone() for s in state))
    expected, _ = compose(dict(block.named_parameters()), hidden[:, 5:], constant)
    inputs = trained(block, hidden)
    actual_gradients = gradients([y], inputs)
    assert_same(actual_gradients, gradients([expected], inputs))
    assert not actual_gradients[-1][:, :5].any()


@pytest.mark.parametrize("spread_delta", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"conv_bias": False}, {"d_conv": 1}])
def test_steps_give_the_whole(options: dict[str, int], spread_delta: bool) -> None:
    block = make_block(**options)
    if spread_delta:
        # On both sides of softplus' threshold and far below zero.
        with torch.no_grad():
            block.dt_proj.bias.copy_(torch.linspace(-30, 25, block.d_inner))
    hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    y, last = block(hidden, return_state=True)
    _, state = block(hidden[:, :4], return_state=True)
    storage = [s.data_ptr() for s in state]
    steps = [block.step(hidden[:, t], state) for t in range(4, 9)]
    assert_same(torch.stack(steps, dim=1), y[:, 4:])
    assert_same(list(state), list(last))
    assert [s.data_ptr() for s in state] == storage
    assert not any(step.requires_grad for step in steps)


# Padding


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("adapted", [False, True])
def test_padded_rows_are_the_rows_alone(
    with_state: bool, mask_type: torch.dtype, adapted: bool
) -> None:
    block = make_block(bias=True)
    if adapted:
        block.dt_proj = Adapted(block.dt_proj)
    mask = ragged_mask()
    rows, length = mask.shape
    hidden = torch.randn(rows, length, 6, dtype=torch.float64)
    hidden[mask == 0] = torch.nan
    hidden.requires_grad_()
    state = random_state(block, rows) if with_state else None
    y, last = block(hidden, state, attention_mask=mask.to(mask_type), return_state=True)
    assert not y[mask == 0].any()
    assert torch.equal(
        y, block(hidden, state, attention_mask=mask.to(mask_type), return_state=False)
    )

    alone: list[list[Tensor]] = []
    for row in range(rows):
        row_state = None if state is None else MambaState(*(s[row : row + 1] for s in state))
        y_row, last_row = block(hidden[row, mask[row] == 1][None], row_state, return_state=True)
        alone.append([y_row[0], *last_row])
    expected = [torch.cat(column) for column in zip(*alone, strict=True)]
    actual = [y[mask == 1], *last]
    assert_same(actual, expected)
    inputs = trained(block, hidden, *(state or ()))
    actual_gradients = gradients(actual, inputs)
    assert_same(actual_gradients, gradients(expected, inputs))
    hidden_gradient = actual_gradients[len(list(block.parameters()))]
    assert not hidden_gradient[mask == 0].any()


def test_state_passes_padding_unchanged() -> None:
    block = make_block(dtype=torch.float32)
    state = random_state(block, 2)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    _, last = block(torch.randn(2, 5, 6), state, attention_mask=mask, return_state=True)
    assert torch.equal(last.conv, state.conv)
    assert torch.equal(last.ssm, state.ssm)


@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_padding_of_short_rows(d_conv: int, length: int) -> None:
    block = make_block(d_conv=d_conv)
    hidden = torch.randn(2, length, 6, dtype=torch.float64)
    state = random_state(block, 2)
    mask = torch.ones(2, length, dtype=torch.bool)
    expected = block(hidden, state, return_state=True)
    actual = block(hidden, state, attention_mask=mask, return_state=True)
    assert_same([actual[0], *actual[1]], [expected[0], *expected[1]])


def test_padding_needs_no_values_on_the_host() -> None:
    block = make_block(device="meta")
    hidden = torch.empty(2, 5, 6, dtype=torch.float64, device="meta")
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    y, state = block(hidden, attention_mask=mask, return_state=True)
    assert y.is_meta
    assert y.shape == (2, 5, 6)
    assert state.conv.shape == (2, 3, 12)
    assert state.ssm.shape == (2, 12, 5)


# Packed sequences


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_are_the_sequences_alone(with_state: bool) -> None:
    block = make_block(bias=True)
    lengths = [5, 0, 1, 8, 2]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    hidden = torch.randn(1, sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    state = random_state(block, len(lengths)) if with_state else None
    y, last = block(hidden, state, cu_seqlens=cu_seqlens, return_state=True)
    alone: list[list[Tensor]] = []
    for s, sequence in enumerate(hidden.split(lengths, dim=1)):
        row_state = None if state is None else MambaState(*(t[s : s + 1] for t in state))
        y_row, last_row = block(sequence, row_state, return_state=True)
        alone.append([y_row[0], *last_row])
    expected = [torch.cat(column) for column in zip(*alone, strict=True)]
    actual = [y[0], *last]
    assert_same(actual, expected)
    inputs = trained(block, hidden, *(state or ()))
    assert_same(gradients(actual, inputs), gradients(expected, inputs))


def test_nan_stays_in_its_packed_sequence() -> None:
    block = make_block()
    hidden = torch.randn(1, 9, 6, dtype=torch.float64)
    hidden[:, 3:5] = torch.nan
    y = block(hidden, cu_seqlens=torch.tensor([0, 3, 5, 9]))
    assert y[:, :3].isfinite().all()
    assert y[:, 5:].isfinite().all()
    assert y[:, 3:5].isnan().all()
