# SPDX-License-Identifier: Apache-2.0
"""MambaBlock's values, gradients and types against a composition of the reference ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blocks import assert_same, compose, make_block, random_state, trained
from compare import gradients
from mambablock import MambaState

pytestmark = pytest.mark.usefixtures("device")


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
