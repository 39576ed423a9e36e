# SPDX-License-Identifier: Apache-2.0
"""compat.mamba_ssm.Mamba against MambaBlock and against itself step by step."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from mambablock.compat.mamba_ssm.modules.mamba_simple import Block

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


# Directions


def direction(block: Mamba, suffix: str, hidden: Tensor) -> Tensor:
    """One direction's gated scan, (batch, length, d_inner), by a block of its parameters."""
    alone = Mamba(8, d_state=STATES, bias=True, dtype=torch.float64)
    own = {
        name: getattr(block, name.replace("A_log", f"A{suffix}_log"))
        if name == "A_log"
        else block.get_parameter(name.replace(part, part + suffix))
        for name in ("A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight")
        for part in [name.split(".")[0]]
    }
    own |= {f"dt_proj.{n}": block.get_parameter(f"dt_proj{suffix}.{n}") for n in ("weight", "bias")}
    own |= {f"in_proj.{n}": block.get_parameter(f"in_proj.{n}") for n in ("weight", "bias")}
    alone.load_state_dict(own, strict=False)
    alone.out_proj = nn.Identity()
    return alone(hidden)


@pytest.mark.parametrize(
    "options",
    [
        {"bimamba_type": "v2"},
        {"bimamba": True},
        {"bimamba_type": "v2", "if_divide_out": True, "init_layer_scale": 0.3},
        {"bimamba_type": "v3", "nslices": 3},
    ],
    ids=str,
)
def test_directions(options: dict[str, object]) -> None:
    block = make_mamba(**options)
    hidden = random(BATCH, 9, 8)
    y = direction(block, "", hidden) + direction(block, "_b", hidden.flip(1)).flip(1)
    if block.bimamba_type == "v3":
        slices = hidden.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
        y = y + direction(block, "_s", slices).unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    expected = block.out_proj(y / 2 if block.if_divide_out else y)
    assert_same(block(hidden), expected * getattr(block, "gamma", 1.0))


def test_first_version_of_vision_mamba() -> None:
    block, plain = make_mamba(bimamba_type="v1"), make_mamba()
    hidden = random(BATCH, LENGTH, 8)
    plain.load_state_dict(block.state_dict(), strict=False)
    added = {name for name, _ in block.named_parameters()} - set(plain.state_dict())
    assert added == {"A_b_log"}
    ahead = block(hidden)
    with torch.no_grad():
        block.A_b_log.fill_(20.0)  # whose states decay at once: what stays is u B C of each step
    assert not torch.allclose(ahead, block(hidden))
    assert block.A_b_log._no_weight_decay


def test_bad_directions() -> None:
    with pytest.raises(ValueError, match=r"^Mamba: bimamba_type must be one of 'none', .*got 'v4'"):
        Mamba(8, bimamba_type="v4")
    with pytest.raises(ValueError, match=r"^Mamba: hidden_states must be of a length that nslices"):
        Mamba(8, bimamba_type="v3")(torch.randn(1, 9, 8))
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match=r"^Mamba: inference_params must be None with bimamba"):
        Mamba(8, layer_idx=0, bimamba=True)(torch.randn(1, 9, 8), params)


def test_block_of_before_version_2() -> None:
    block = Block(8, lambda dim: Mamba(dim, d_state=STATES), nn.LayerNorm, residual_in_fp32=True)
    hidden, residual = block(x := torch.randn(BATCH, LENGTH, 8))
    assert_same(residual, x)
    assert_same(hidden, block.mixer(block.norm(x)))
    assert "mlp_cls" not in inspect.signature(Block.__init__).parameters


def test_states_from_the_cache() -> None:
    block = make_mamba(layer_idx=1)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    states = block._get_states_from_cache(params, 3)
    assert states[0].shape == (3, 16, 4)
    assert params.key_value_memory_dict[1][0] is states[0]
    states[1].fill_(1.0)
    _, ssm_state = block._get_states_from_cache(params, 3, initialize_states=True)
    assert ssm_state is states[1]
    assert not ssm_state.any()
    assert (block.activation, type(block.act)) == ("silu", nn.SiLU)


def test_mamba_bad_calls() -> None:
    block = make_mamba()
    with pytest.raises(ValueError, match=r"must be \(batch, 1, d_model\); got \(2, 7, 8\)"):
        block.step(random(BATCH, LENGTH, 8), *block.allocate_inference_cache(BATCH, 1))
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match="layer_idx must be given for inference_params"):
        block(random(BATCH, LENGTH, 8), params)
