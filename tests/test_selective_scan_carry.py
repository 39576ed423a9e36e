# SPDX-License-Identifier: Apache-2.0
"""What a scan hands from piece to piece, against the definition's states and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import boundaries, reversed_strides, time_last
from mambablock import reference
from operators import SCAN, Tensors

pytestmark = pytest.mark.usefixtures("device")

CARRY = torch.ops.mambablock.selective_scan_carry.default
CARRY_BACKWARD = torch.ops.mambablock.selective_scan_carry_backward.default

# float64: sums of some hundred terms in another order. float32: its rounding, of states of some
# tens.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-4}


def expected(inputs: Tensors, dy: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """final_state, dt_sum and dinitial_state in float64."""
    inputs = {n: None if t is None else t.double() for n, t in inputs.items()}
    cu_seqlens, bias = options["cu_seqlens"], inputs["delta_bias"]
    rows = inputs["u"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    initial = inputs["u"].new_zeros(rows, *inputs["A"].shape).requires_grad_()
    y, final_state = reference.selective_scan(
        **inputs, initial_state=initial, **options, return_final_state=True
    )
    dt = inputs["delta"] if bias is None else inputs["delta"] + bias
    dt = F.softplus(dt) if options["delta_softplus"] else dt
    if cu_seqlens is None:
        dt_sum = dt.sum(1)
    else:
        parts = dt[0].split(cu_seqlens.diff().tolist())
        dt_sum = torch.stack([dt.new_zeros(dt.shape[2]), *(part.sum(0) for part in parts)])[1:]
    loss = (y * dy.double()).sum() + 0 * initial.sum()
    return final_state.detach(), dt_sum, torch.autograd.grad(loss, initial)[0]


def check(inputs: Tensors, layout: Callable[..., Tensor] | None = None, **options: Any) -> None:
    options = {"cu_seqlens": None, "delta_softplus": True, "reverse": False} | options
    inputs = {name: t for name, t in inputs.items() if name != "initial_state"}
    dy = torch.randn_like(inputs["u"])
    timed = {n: t for n, t in inputs.items() if n in SCAN.activations and t is not None}
    given = inputs if layout is None else inputs | {n: layout(t) for n, t in timed.items()}
    u, delta, A, B, C = (given[name] for name in ("u", "delta", "A", "B", "C"))
    rest = (given["delta_bias"], *options.values())
    final_state, dt_sum = CARRY(u, delta, A, B, *rest)
    laid_dy = dy if layout is None else layout(dy)
    dinitial_state = CARRY_BACKWARD(laid_dy, delta, A, C, given["z"], *rest)
    got = (final_state, dt_sum, dinitial_state)
    for found, value in zip(got, expected(inputs, dy, **options), strict=True):
        allowed = TOLERANCE[u.dtype]
        torch.testing.assert_close(found.double(), value, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 33, 200])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_lengths_and_types(length: int, dtype: torch.dtype, reverse: bool) -> None:
    check(SCAN.make_inputs(2, length, 5, 3, dtype=dtype), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (7,), (0, 40, 0, 1, 100, 0), (64, 64), (0,), (3, 0)])
def test_packed(lengths: tuple[int, ...], reverse: bool) -> None:
    inputs = SCAN.make_inputs(1, sum(lengths), 6, 5, groups=2)
    check(inputs, cu_seqlens=boundaries(lengths), reverse=reverse)


@pytest.mark.parametrize("layout", [time_last, reversed_strides])
@pytest.mark.parametrize(("d_inner", "d_state", "groups"), [(1, 1, None), (300, 17, 2)])
def test_layouts_and_sizes(layout: Any, d_inner: int, d_state: int, groups: int | None) -> None:
    check(SCAN.make_inputs(2, 70, d_inner, d_state, groups), layout)


@pytest.mark.parametrize("absent", ["delta_bias", "z"])
def test_absent(absent: str) -> None:
    check(SCAN.make_inputs(2, 40) | {absent: None}, delta_softplus=False)


def test_opcheck() -> None:
    inputs = SCAN.make_inputs(1, 40, 6, 5, groups=2)
    u, delta, A, B, C, _, z, delta_bias, _ = inputs.values()
    rest = (delta_bias, boundaries([10, 0, 30]), True, False)
    torch.library.opcheck(CARRY, (u, delta, A, B, *rest))
    torch.library.opcheck(CARRY_BACKWARD, (u, delta, A, C, z, *rest))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"delta": torch.zeros(2, 8, 4).double()}, r"delta must be \(batch=2, length=9, d_inner=4"),
        ({"A": torch.zeros(3).double()}, r"A must be \(d_inner, d_state\); got \(3,\)"),
        ({"B": torch.zeros(2, 9, 4).double()}, r"B must be \(batch=2, length=9, d_state=3\)"),
        ({"B": torch.zeros(2, 9, 3, 3).double()}, "groups must be a divisor of d_inner=4; got 3"),
        ({"delta_bias": torch.zeros(5).double()}, r"delta_bias must be \(d_inner=4\); got \(5,\)"),
        ({"u": torch.zeros(2, 9)}, r"u must be \(batch, length, d_inner\); got \(2, 9\)"),
    ],
)
def test_errors(change: dict[str, Tensor], text: str) -> None:
    inputs = SCAN.make_inputs() | {n: t.to(torch.get_default_device()) for n, t in change.items()}
    arguments = [inputs[name] for name in ("u", "delta", "A", "B", "delta_bias")]
    with pytest.raises(RuntimeError, match=f"selective_scan_carry: {text}"):
        CARRY(*arguments, None, True, False)
