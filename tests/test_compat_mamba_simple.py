# SPDX-License-Identifier: Apache-2.0
"""compat.mamba_ssm.Mamba against MambaBlock and against itself step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm_definitions import (
    BATCH,
    LENGTH,
    STATES,
    assert_same,
    inner_arguments,
    make_mamba,
    random,
)
from mambablock import MambaBlock
from mambablock.compat.mamba_ssm import Mamba, mamba_inner_fn

pytestmark = pytest.mark.usefixtures("device")


def test_mamba_is_the_block() -> None:
    block = make_mamba()
    plain = MambaBlock(8, d_state=STATES, bias=True, dtype=torch.float64)
    plain.load_state_dict(block.state_dict(), strict=True)
    hidden = random(BATCH, LENGTH, 8)
    assert torch.equal(block(hidden), plain(hidden))
    xz = F.linear(hidden, block.in_proj.weight, block.in_proj.bias).transpose(1, 2)
    assert_same(block(hidden), mamba_inner_fn(**inner_arguments(block) | {"xz": xz}))
    assert (block.expand, block.use_fast_path) == (2, True)


def test_mamba_allocates() -> None:
    block = Mamba(8, 5, 3, dtype=torch.bfloat16)
    conv_state, ssm_state = block.allocate_inference_cache(3, 100)
    assert (conv_state.shape, ssm_state.shape) == ((3, 16, 3), (3, 16, 5))
    assert {conv_state.dtype, ssm_state.dtype} == {torch.bfloat16}
    states = block.allocate_inference_cache(3, 100, dtype=torch.float32, unused=1)
    assert {state.dtype for state in states} == {torch.float32}
    assert not any(state.any() for state in (conv_state, ssm_state, *states))


@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_mamba_inference(prompt: int) -> None:
    block = make_mamba(layer_idx=3)
    hidden = random(BATCH, LENGTH, 8)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with torch.no_grad():
        outputs = [block(hidden[:, :prompt], params)]
        conv_state, ssm_state = params.key_value_memory_dict[3]
        assert conv_state.shape == (BATCH, 16, 4)
        for t in range(prompt, LENGTH):
            params.seqlen_offset = t
            outputs.append(block(hidden[:, t : t + 1], inference_params=params))
        assert params.key_value_memory_dict[3][0] is conv_state
        assert_same(torch.cat(outputs, dim=1), block(hidden))

        states = block.allocate_inference_cache(BATCH, LENGTH)
        for t in range(LENGTH):
            y, *after = block.step(hidden[:, t : t + 1], *states)
            assert_same(y[:, 0], block(hidden)[:, t])
            assert all(a is b for a, b in zip(after, states, strict=True))
        assert_same(states[1], ssm_state)
        assert_same(states[0][..., 1:], conv_state[..., 1:])


def test_mamba_in_bfloat16() -> None:
    block, hidden = make_mamba(dtype=torch.bfloat16), random(BATCH, LENGTH, 8).bfloat16()
    states = block.allocate_inference_cache(BATCH, LENGTH)
    with torch.no_grad():
        steps = torch.cat(
            [block.step(hidden[:, t : t + 1], *states)[0] for t in range(LENGTH)], dim=1
        )
        whole = block(hidden)
    assert steps.dtype is torch.bfloat16
    # The states are rounded to bfloat16 after each step.
    torch.testing.assert_close(steps, whole, rtol=0, atol=0.03 * whole.abs().max().item())


def test_mamba_bad_calls() -> None:
    block = make_mamba()
    with pytest.raises(ValueError, match=r"must be \(batch, 1, d_model\); got \(2, 7, 8\)"):
        block.step(random(BATCH, LENGTH, 8), *block.allocate_inference_cache(BATCH, 1))
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match="layer_idx must be given for inference_params"):
        block(random(BATCH, LENGTH, 8), params)
