# SPDX-License-Identifier: Apache-2.0
"""The block in reverse, and in both directions, against flips of the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import assert_same, make_block, random_state
from mambablock import BidirectionalMambaBlock, MambaBlock, MambaState

pytestmark = pytest.mark.usefixtures("device")


def both(outputs: Any, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The outputs and the gradients of their squares' sum."""
    flat = [outputs] if isinstance(outputs, Tensor) else [outputs[0], *outputs[1]]
    leaves = [*inputs, *{p for p in module.parameters()}]
    leaves = sorted(leaves, key=id)
    found = torch.autograd.grad(sum(o.square().sum() for o in flat), leaves)
    return [o.detach() for o in flat] + list(found)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_reverse_is_the_flipped_block(with_state: bool, recompute: bool) -> None:
    block = make_block(bias=True, recompute=recompute)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    state = random_state(block, 2) if with_state else None
    inputs = [hidden, *(state or ())]
    got = block(hidden, state, reverse=True, return_state=True)
    y, after = block(hidden.flip(1), state, return_state=True)
    assert_same(both(got, block, *inputs), both((y.flip(1), after), block, *inputs))
    assert not torch.allclose(got[0], block(hidden, state))


def test_reversed_packed_sequences() -> None:
    block = make_block()
    lengths = [3, 0, 5, 1]
    hidden = torch.randn(1, 9, 6, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9])
    y, state = block(hidden, cu_seqlens=cu_seqlens, reverse=True, return_state=True)
    for s, piece in enumerate(hidden.split(lengths, dim=1)):
        alone, after = block(piece.flip(1), return_state=True)
        assert_same(y[:, cu_seqlens[s] : cu_seqlens[s + 1]], alone.flip(1))
        assert_same(MambaState(*(t[s : s + 1] for t in state)), after)


MASKS = [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0], [0] * 7]


@pytest.mark.parametrize("with_state", [False, True])
def test_reversed_padded_rows(with_state: bool) -> None:
    block = make_block(bias=True)
    rows, mask = len(MASKS), torch.tensor(MASKS)
    hidden = torch.randn(rows, 7, 6, dtype=torch.float64)
    hidden[mask == 0] = torch.nan
    state = random_state(block, rows) if with_state else None
    y, after = block(hidden, state, attention_mask=mask, reverse=True, return_state=True)
    for row in range(rows):
        real = mask[row] != 0
        own = None if state is None else MambaState(*(t[row : row + 1] for t in state))
        alone, expected = block(hidden[row : row + 1, real].flip(1), own, return_state=True)
        assert_same(y[row : row + 1, real], alone.flip(1))
        assert not y[row, ~real].any()
        assert_same(MambaState(*(t[row : row + 1] for t in after)), expected)


# Both directions


def make_both(**options: Any) -> BidirectionalMambaBlock:
    torch.manual_seed(0)
    block = BidirectionalMambaBlock(6, d_state=5, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("merge", ["add", "multiply", "concatenate"])
@pytest.mark.parametrize("share", ["nothing", "projections", "everything"])
def test_both_directions_are_two_blocks(share: str, merge: str) -> None:
    block = make_both(share=share, merge=merge)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    ahead, back = block.mamba_fwd(hidden), block.mamba_rev(hidden.flip(1)).flip(1)
    expected = {
        "add": ahead + back,
        "multiply": ahead * back,
        "concatenate": torch.cat([ahead, back], dim=-1),
    }
    assert_same(both(block(hidden), block, hidden), both(expected[merge], block, hidden))
    own = {"nothing": 0, "projections": 2, "everything": 9}[share]
    assert len(list(block.parameters())) == 18 - own
    assert block(hidden[:, :0]).shape[1] == 0


def test_one_convolution() -> None:
    """Vision Mamba's first version, written out with the ungated formulas in plain PyTorch."""
    block = make_both(share="convolution", bias=True)
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    fwd, rev = block.mamba_fwd, block.mamba_rev
    inputs, z = fwd.in_proj(hidden).chunk(2, dim=-1)
    x = F.silu(fwd.conv1d(inputs.transpose(1, 2))[..., :9]).transpose(1, 2)
    dt, B, C = fwd.x_proj(x).split([fwd.dt_rank, 5, 5], dim=-1)
    delta = F.softplus(fwd.dt_proj(dt))

    def scan(A: Tensor, times: range) -> Tensor:
        h, steps = 0.0, {}
        for t in times:
            step = delta[:, t, :, None]
            h = (step * A).exp() * h + step * x[:, t, :, None] * B[:, t, None]
            steps[t] = (h * C[:, t, None]).sum(-1)
        return torch.stack([steps[t] for t in range(9)], dim=1) + fwd.D * x

    y = scan(-fwd.A_log.exp(), range(9)) + scan(-rev.A_log.exp(), range(8, -1, -1))
    expected = fwd.out_proj(y * F.silu(z))
    assert_same(both(block(hidden), block, hidden), both(expected, block, hidden))
    assert len(list(block.parameters())) == 12


@pytest.mark.parametrize("share", ["projections", "convolution"])
def test_both_directions_of_packed_sequences(share: str) -> None:
    block = make_both(share=share)
    hidden = torch.randn(1, 9, 6, dtype=torch.float64)
    packed = block(hidden, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    assert_same(packed, torch.cat([block(piece) for piece in hidden.split([4, 5], dim=1)], dim=1))


def test_nothing_is_flipped() -> None:
    """The operators run backward in time over the same memory."""
    block = make_both(share="projections")
    with torch.profiler.profile() as profile:
        block(torch.randn(2, 9, 6, dtype=torch.float64))
    assert not {"aten::flip", "aten::roll"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", ["share", "merge"])
def test_unknown_words(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^BidirectionalMambaBlock: {name} must be of .*'none'$"):
        BidirectionalMambaBlock(6, **{name: "none"})


def test_bad_calls_name_the_block() -> None:
    with pytest.raises(
        ValueError, match=r"^MambaBlock: hidden_states must be \(batch, length, d_m"
    ):
        make_both()(torch.randn(2, 6, dtype=torch.float64))
    assert isinstance(make_both().mamba_rev, MambaBlock)
