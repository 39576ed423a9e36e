# SPDX-License-Identifier: Apache-2.0
"""What MambaBlock refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mambablock import MambaBlock, MambaState

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("d_model", 0),
        ("d_model", -4),
        ("d_state", 0),
        ("d_conv", 0),
        ("expand", 0),
        ("expand", -1.0),
        ("dt_rank", 0),
        ("dt_rank", "full"),
        ("d_inner", 0),
        ("d_inner", -8),
        ("dt_min", 0.0),
        ("dt_max", -0.1),
        ("dt_max", 1e-4),
        ("dt_init_floor", 0.0),
        ("dt_init", "zeros"),
    ],
)
def test_bad_constructor_argument(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^MambaBlock: {argument} .*{value}"):
        MambaBlock(**({"d_model": 8} | {argument: value}))


def test_expand_too_small_for_one_channel() -> None:
    with pytest.raises(ValueError, match="d_inner must be positive"):
        MambaBlock(4, expand=0.1)


def bad_state(block: MambaBlock, **replaced: Tensor) -> MambaState:
    return block.allocate_state(2)._replace(**replaced)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b(torch.zeros(2, 8)), r"hidden_states must be .*d_model=8\); got \(2, 8\)"),
        (lambda b: b(torch.zeros(2, 3, 7)), r"hidden_states must be .*; got \(2, 3, 7\)"),
        (
            lambda b: b(torch.zeros(2, 3, 8), bad_state(b, conv=torch.zeros(2, 4, 16))),
            r"state.conv must be \(batch=2, inputs=3, d_inner=16\); got \(2, 4, 16\)",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), bad_state(b, ssm=torch.zeros(2, 16, 4))),
            r"state.ssm must be \(batch=2, d_inner=16, d_state=16\); got \(2, 16, 4\)",
        ),
        (lambda b: b(torch.zeros(3, 3, 8), b.allocate_state(2)), r"state.conv must be \(batch=3"),
        (
            lambda b: b(
                torch.zeros(1, 5, 8), b.allocate_state(2), cu_seqlens=torch.tensor([0, 1, 3, 5])
            ),
            r"state.conv must be \(batch=3",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"attention_mask must be \(batch=2, length=3\); got \(2, 4\)",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 3)),
            "attention_mask must be bool or integer; got torch.float32",
        ),
        (
            lambda b: b(
                torch.zeros(1, 3, 8),
                attention_mask=torch.ones(1, 3, dtype=torch.bool),
                cu_seqlens=torch.tensor([0, 3]),
            ),
            "attention_mask and cu_seqlens",
        ),
        (
            lambda b: b.step(torch.zeros(2, 1, 8), b.allocate_state(2)),
            r"hidden_states must be \(batch, d_model=8\); got \(2, 1, 8\)",
        ),
        (lambda b: b.step(torch.zeros(2, 7), b.allocate_state(2)), r"got \(2, 7\)"),
        (lambda b: b.step(torch.zeros(3, 8), b.allocate_state(2)), r"state.conv must be \(batch=3"),
        (
            lambda b: b.step(torch.zeros(2, 8), bad_state(b, ssm=torch.zeros(2, 16))),
            r"state.ssm must be .*; got \(2, 16\)",
        ),
    ],
)
def test_bad_call(call: Callable[[MambaBlock], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MambaBlock: .*{message}"):
        call(MambaBlock(8))


def test_bad_step_leaves_the_state_alone() -> None:
    block = MambaBlock(8)
    state = bad_state(block, conv=torch.ones(2, 3, 16), ssm=torch.zeros(2, 16, 4))
    with pytest.raises(ValueError, match=r"state\.ssm"):
        block.step(torch.zeros(2, 8), state)
    assert torch.equal(state.conv, torch.ones(2, 3, 16))
