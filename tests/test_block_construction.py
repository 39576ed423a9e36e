# SPDX-License-Identifier: Apache-2.0
"""MambaBlock's construction: parameters, initial values, sizes, and its interface."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mambablock import MambaBlock, MambaState

pytestmark = pytest.mark.usefixtures("device")


def mamba_ssm_shapes(
    d_model: int, d_state: int, d_conv: int, dt_rank: int, bias: bool, conv_bias: bool
) -> dict[str, tuple[int, ...]]:
    """The state_dict of mamba-ssm's Mamba with expand=2."""
    d_inner = 2 * d_model
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (d_inner, d_state),
        "D": (d_inner,),
        "in_proj.weight": (2 * d_inner, d_model),
        "conv1d.weight": (d_inner, 1, d_conv),
        "x_proj.weight": (dt_rank + 2 * d_state, d_inner),
        "dt_proj.weight": (d_inner, dt_rank),
        "dt_proj.bias": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
    }
    if conv_bias:
        shapes["conv1d.bias"] = (d_inner,)
    if bias:
        shapes |= {"in_proj.bias": (2 * d_inner,), "out_proj.bias": (d_model,)}
    return shapes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv_bias", [False, True])
def test_loads_mamba_ssm_state_dict(bias: bool, conv_bias: bool) -> None:
    shapes = mamba_ssm_shapes(20, 7, 3, 2, bias, conv_bias)
    block = MambaBlock(20, d_state=7, d_conv=3, bias=bias, conv_bias=conv_bias)
    assert {name: tuple(t.shape) for name, t in block.state_dict().items()} == shapes
    checkpoint = {name: torch.randn(shape) for name, shape in shapes.items()}
    block.load_state_dict(checkpoint, strict=True)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, checkpoint[name])


def test_sizes_derive_from_d_model() -> None:
    block = MambaBlock(33)
    assert (block.d_inner, block.dt_rank, block.d_state, block.d_conv) == (66, 3, 16, 4)
    assert MambaBlock(33, expand=1.5).d_inner == 49
    assert MambaBlock(33, d_inner=10).in_proj.weight.shape == (20, 33)
    assert MambaBlock(33, layer_idx=7).layer_idx == 7


def test_initial_values() -> None:
    torch.manual_seed(0)
    block = MambaBlock(512, d_state=8, dt_scale=0.5)
    assert torch.equal(block.A_log, torch.arange(1.0, 9.0).log().expand(1024, 8))
    assert torch.equal(block.D, torch.ones(1024))

    bound = 0.5 * 32**-0.5
    weight = block.dt_proj.weight
    assert weight.abs().max() <= bound
    # Uniform: the standard deviation is bound / sqrt(3); 32,768 draws estimate it within 1 %.
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)

    dt = F.softplus(block.dt_proj.bias.double())
    # The bias is rounded to float32, which moves dt by its relative precision at most.
    assert dt.min() >= 0.001 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    # Log-uniform: the quartiles of 1,024 draws lie within 0.05 of the range (5 deviations).
    position = (dt.log() - math.log(0.001)) / math.log(100)
    quartiles = position.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert quartiles.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.08)

    assert block.dt_proj.bias._no_reinit
    assert block.A_log._no_weight_decay
    assert block.D._no_weight_decay


def test_initial_values_follow_the_options() -> None:
    block = MambaBlock(32, dt_rank=4, dt_init="constant", dt_min=1e-5, dt_init_floor=0.02)
    assert torch.equal(block.dt_proj.weight, torch.full((64, 4), 0.5))
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min().item() == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scan_parameters_and_states_are_at_least_float32(dtype: torch.dtype) -> None:
    block = MambaBlock(8, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for name, parameter in block.named_parameters():
        assert parameter.dtype is (wide if name in ("A_log", "D") else dtype)
    for state in (*block.allocate_state(2), *block.allocate_state(2, dtype=dtype)):
        assert state.dtype is wide
        assert not state.any()
    assert block.allocate_state(2, dtype=torch.float64).ssm.dtype is torch.float64
    assert block.allocate_state(2, device="meta").conv.is_meta


def test_allocated_state_shapes() -> None:
    state = MambaBlock(8, d_state=3, d_conv=5).allocate_state(2)
    assert isinstance(state, MambaState)
    assert state.conv.shape == (2, 4, 16)
    assert state.ssm.shape == (2, 16, 3)


def test_default_dtype_is_honoured() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        block = MambaBlock(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in block.parameters()} == {torch.float64}


def test_meta_construction_then_reset(device: torch.device) -> None:
    block = MambaBlock(8, device="meta")
    assert all(p.is_meta for p in block.parameters())
    assert block(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)
    block.to_empty(device=device)
    block.reset_parameters()
    torch.testing.assert_close(block.A_log, torch.arange(1.0, 17.0).log().expand(16, 16))
    assert block.dt_proj.bias._no_reinit
    assert block(torch.randn(2, 3, 8)).isfinite().all()


def test_interface() -> None:
    block = MambaBlock(8, d_state=3, d_conv=2)
    assert block.op_type == "MambaBlock"
    assert block.output_shape == [-1, -1, 8]
    assert block.attributes == {
        "d_model": 8,
        "d_inner": 16,
        "d_state": 3,
        "dt_rank": 1,
        "kernel_size": 2,
    }
    assert block.name == "mamba_block"
    block.name = "encoder"
    assert block.name == "encoder"
    with pytest.raises(ValueError, match="name"):
        block.name = ""
    assert block.name == "encoder"
    assert "d_model=8, d_inner=16, d_state=3, dt_rank=1, kernel_size=2" in repr(block)
