# SPDX-License-Identifier: Apache-2.0
"""MambaBlock's construction, interface and values, against a composition of the reference ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import assert_same, compose, make_block, random_state, trained
from compare import gradients
from mambablock import MambaBlock, MambaState

pytestmark = pytest.mark.usefixtures("device")


# Construction


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


# Values and gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"conv_bias": False},
        {"d_state": 1, "d_conv": 1, "dt_rank": 1, "d_inner": 1, "d_model": 1},
        {"d_state": 16, "d_conv": 2, "expand": 1},
    ],
)
@pytest.mark.parametrize("length", [0, 1, 2, 19])
def test_forward_is_the_composition(options: dict[str, int], length: int) -> None:
    block = make_block(**options)
    hidden = torch.randn(2, length, block.d_model, dtype=torch.float64, requires_grad=True)
    state = random_state(block, 2)
    y, (conv, ssm) = block(hidden, state, return_state=True)
    expected_y, (expected_conv, expected_ssm) = compose(
        dict(block.named_parameters()), hidden, state
    )
    actual, expected = [y, conv, ssm], [expected_y, expected_conv, expected_ssm]
    assert_same(actual, expected)
    inputs = trained(block, hidden, *state)
    assert_same(gradients(actual, inputs), gradients(expected, inputs))


def test_no_state_is_a_state_of_zeros() -> None:
    block = make_block()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.equal(block(hidden), block(hidden, block.allocate_state(2)))


def test_empty_batch() -> None:
    y, state = make_block()(torch.zeros(0, 5, 6, dtype=torch.float64), return_state=True)
    assert y.shape == (0, 5, 6)
    assert state.conv.shape == (0, 3, 12)
    assert state.ssm.shape == (0, 12, 5)


def test_forward_leaves_the_state_as_it_was() -> None:
    block = make_block()
    state = random_state(block, 2)
    before = [s.detach().clone() for s in state]
    _, new_state = block(torch.randn(2, 3, 6, dtype=torch.float64), state, return_state=True)
    for old, kept, new in zip(before, state, new_state, strict=True):
        assert torch.equal(old, kept)
        assert not torch.equal(old, new)


# Types


def assert_as_good_as(actual: Tensor, baseline: Tensor, exact: Tensor, name: str) -> None:
    """actual's largest and RMS error at most twice those of the same-precision baseline."""
    if actual.dtype is torch.float64:
        assert_same(actual, exact)
        return
    # Where the baseline happens to be exact, two roundings of the type are still right.
    floor = 2 * torch.finfo(baseline.dtype).eps * exact.abs().max().item()
    errors = {"actual": actual.double() - exact, "baseline": baseline.double() - exact}
    for measure in (lambda e: e.abs().max().item(), lambda e: e.square().mean().sqrt().item()):
        error, allowed = measure(errors["actual"]), 2 * measure(errors["baseline"]) + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("converted", [False, True], ids=["built", "converted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype, converted: bool) -> None:
    options = {"d_model": 32, "d_state": 16, "bias": True}
    block = make_block(dtype=dtype, **options)
    if converted:
        block = make_block(dtype=torch.float32, **options).to(dtype)
    assert block.A_log.dtype is (dtype if converted else torch.promote_types(dtype, torch.float32))
    hidden = torch.randn(2, 33, 32, dtype=dtype, requires_grad=True)
    y, state = block(hidden, return_state=True)
    assert y.dtype is dtype
    assert {s.dtype for s in state} == {torch.promote_types(dtype, torch.float32)}

    names = [*(name for name, _ in block.named_parameters()), "hidden_states"]
    inputs = trained(block, hidden)
    zeros = block.allocate_state(2)
    baseline = compose(dict(block.named_parameters()), hidden, zeros)[0]
    wide = {name: p.detach().double().requires_grad_() for name, p in block.named_parameters()}
    wide_hidden = hidden.detach().double().requires_grad_()
    wide_zeros = MambaState(*(s.double() for s in zeros))
    exact = compose(wide, wide_hidden, wide_zeros)[0]

    assert_as_good_as(y, baseline, exact, "y")
    for name, a, b, e in zip(
        names,
        gradients([y], inputs),
        gradients([baseline], inputs),
        gradients([exact], [*wide.values(), wide_hidden]),
        strict=True,
    ):
        assert_as_good_as(a, b, e, name)

    step_state = block.allocate_state(2)
    steps = torch.stack([block.step(hidden[:, t], step_state) for t in range(33)], dim=1)
    assert steps.dtype is dtype
    assert_as_good_as(steps, baseline, exact, "step")


def test_float32_delta_bias_survives_bfloat16() -> None:
    block = make_block(d_model=32, d_state=16, dtype=torch.bfloat16)
    # Halfway between two bfloat16 numbers: rounded, it would change dt by 1.5 %.
    block.dt_proj.bias = nn.Parameter(torch.full((64,), -4.0155))
    hidden = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    _, state = block(hidden, return_state=True)
    step_state = block.allocate_state(2)
    for t in range(9):
        block.step(hidden[:, t], step_state)

    wide = {name: p.double() for name, p in block.named_parameters()}
    zeros = MambaState(*(s.double() for s in block.allocate_state(2)))
    exact = compose(wide, hidden.double(), zeros)[1].ssm
    for ssm in (state.ssm, step_state.ssm):
        # x, delta and B are rounded to bfloat16, each by a relative 0.1 % RMS, now and then twice.
        assert (ssm - exact).square().mean().sqrt() < 0.005 * exact.square().mean().sqrt()


@pytest.mark.parametrize("padded", [False, True])
def test_autocast(device: torch.device, padded: bool) -> None:
    block = make_block(d_model=32, d_state=16, dtype=torch.float32)
    hidden = torch.randn(2, 17, 32, requires_grad=True)
    mask = torch.ones(2, 17, dtype=torch.bool)
    if padded:
        mask[1, :4] = False
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, state = block(hidden, attention_mask=mask if padded else None, return_state=True)
        step_state = block.allocate_state(2)
        steps = torch.stack([block.step(hidden[:, t], step_state) for t in range(17)], dim=1)
    assert y.dtype is torch.bfloat16
    assert steps.dtype is torch.bfloat16
    assert {s.dtype for s in (*state, *step_state)} == {torch.float32}
    expected = block(hidden, attention_mask=mask)
    # Four bfloat16 matrix products and as many roundings between them, each of 2^-9.
    scale = expected.abs().max().item()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.03 * scale)
    torch.testing.assert_close(steps[0].float(), expected[0], rtol=0, atol=0.03 * scale)
    for actual, wanted in zip(
        gradients([y], trained(block, hidden)),
        gradients([expected], trained(block, hidden)),
        strict=True,
    ):
        assert actual.dtype is torch.float32
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
