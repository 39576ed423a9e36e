# SPDX-License-Identifier: Apache-2.0
"""A bad call is an error that names the operator, the argument, what it must be and what it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from operators import CONV, CONV_UPDATE, SCAN, SCAN_UPDATE, Operator, over_time

pytestmark = pytest.mark.usefixtures("device")

FLOATS = "float32, bfloat16, float16 or float64"

# The argument, what becomes of it (or its type, or its values), and what it must be; got what.
BAD_CALLS: dict[Operator, list[tuple[str, Any, str]]] = {
    CONV: [
        ("x", lambda t: t[0], "(batch, length, d_inner); got (9, 5)"),
        ("x", torch.int32, f"{FLOATS}; got Int"),
        ("x", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
        ("weight", lambda t: t[:, None], "(d_inner, d_conv); got (5, 1, 4)"),
        ("weight", lambda t: t[:4], "(d_inner=5, d_conv=4); got (4, 4)"),
        ("weight", lambda t: t[:, :0], "d_conv must be at least 1; got 0"),
        ("weight", torch.float32, "float64; got float32"),
        ("bias", lambda t: t[:1], "(d_inner=5); got (1,)"),
        ("bias", torch.float16, "float64; got float16"),
        ("initial_state", lambda t: t[:, 1:], "(batch=2, d_conv - 1=3, d_inner=5); got (2, 2, 5)"),
        ("initial_state", lambda t: t.mT, "(batch=2, d_conv - 1=3, d_inner=5); got (2, 5, 3)"),
        ("initial_state", torch.float32, "float64 for x in float64; got float32"),
        ("cu_seqlens", [0, 9], "batch must be 1 with cu_seqlens; got 2"),
    ],
    SCAN: [
        ("u", lambda t: t[0], "(batch, length, d_inner); got (9, 4)"),
        ("u", torch.int64, f"{FLOATS}; got Long"),
        ("u", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
        ("delta", lambda t: t[:, 1:], "(batch=2, length=9, d_inner=4); got (2, 8, 4)"),
        ("delta", torch.float32, "float64 as u; got float32"),
        ("A", lambda t: t[:3], "(d_inner=4, d_state=3); got (3, 3)"),
        ("A", lambda t: t[0], "(d_inner, d_state); got (3,)"),
        ("A", lambda t: t[:, :0], "d_state must be at least 1; got 0"),
        ("A", torch.bfloat16, "float64; got bfloat16"),
        ("A", torch.complex128, "float64; got ComplexDouble"),
        ("B", lambda t: t[..., :2], "(batch=2, length=9, d_state=3); got (2, 9, 2)"),
        ("B", torch.float16, "float64 as u; got float16"),
        ("B", lambda t: t[:, :, None], "C must be (batch=2, length=9, groups=1, d_state=3)"),
        ("C", lambda t: t[:1], "(batch=2, length=9, d_state=3); got (1, 9, 3)"),
        ("C", lambda t: t[:, :, None], "(batch=2, length=9, d_state=3)"),
        ("C", torch.float32, "float64 as u; got float32"),
        ("D", lambda t: t[:2], "(d_inner=4); got (2,)"),
        ("D", torch.int32, "float64; got Int"),
        ("z", lambda t: t.mT, "(batch=2, length=9, d_inner=4)"),
        ("z", torch.float32, "float64 as u; got float32"),
        ("delta_bias", lambda t: t[:, None], "(d_inner=4); got (4, 1)"),
        ("delta_bias", torch.float16, "float64; got float16"),
        ("initial_state", lambda t: t[:1], "(batch=2, d_inner=4, d_state=3); got (1, 4, 3)"),
        ("initial_state", lambda t: t.mT, "(batch=2, d_inner=4, d_state=3); got (2, 3, 4)"),
        ("initial_state", torch.float32, "float64 for u in float64; got float32"),
        ("cu_seqlens", [0, 9], "batch must be 1 with cu_seqlens; got 2"),
    ],
    CONV_UPDATE: [
        ("x", lambda t: t[0], "(batch, d_inner); got (5,)"),
        ("x", torch.int64, f"{FLOATS}; got Long"),
        ("state", lambda t: t[:2], "of batch=3 rows; got 2"),
        ("state", lambda t: t[:, 1:], "(rows=3, d_conv - 1=3, d_inner=5)"),
        ("state", lambda t: t[0], "(rows, d_conv - 1, d_inner); got (3, 5)"),
        ("state", torch.int32, f"{FLOATS}; got Int"),
        ("weight", lambda t: t[1:], "(d_inner=5, d_conv=4); got (4, 4)"),
        ("weight", torch.float16, "float64; got float16"),
        ("bias", lambda t: t[1:], "(d_inner=5); got (4,)"),
        ("state_indices", [0, 1], "(batch=3); got (2,)"),
        ("state_indices", [0.0, 1.0, 2.0], "int32 or int64; got float32"),
    ],
    SCAN_UPDATE: [
        ("u", lambda t: t[None], "(batch, d_inner); got (1, 3, 4)"),
        ("delta", lambda t: t[:, :1], "(batch=3, d_inner=4); got (3, 1)"),
        ("delta", torch.float16, "float64 as u; got float16"),
        ("A", lambda t: t[:, 0], "(d_inner, d_state); got (4,)"),
        ("B", lambda t: t[:, :2], "(batch=3, d_state=3); got (3, 2)"),
        ("C", torch.float32, "float64 as u; got float32"),
        ("D", lambda t: t[:1], "(d_inner=4); got (1,)"),
        ("z", lambda t: t.mT, "(batch=3, d_inner=4); got (4, 3)"),
        ("delta_bias", torch.float16, "float64; got float16"),
        ("state", lambda t: t.mT, "(rows=3, d_inner=4, d_state=3); got (3, 3, 4)"),
    ],
}


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [(op, *call) for op, calls in BAD_CALLS.items() for call in calls],
    ids=str,
)
def test_bad_calls(op: Operator, name: str, change: Any, message: str) -> None:
    tensors = op.make_inputs()
    if isinstance(change, list):
        tensors[name] = torch.tensor(change)
    elif isinstance(change, torch.dtype):
        tensors[name] = tensors[name].to(change)
    else:
        tensors[name] = change(tensors[name])
    if " must be " not in message:
        message = f"{name} must be {message}"
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        op(**tensors)


@pytest.mark.parametrize("op", [SCAN, SCAN_UPDATE], ids=str)
def test_groups_must_divide_channels(op: Operator) -> None:
    tensors = op.make_inputs(d_inner=4, groups=3)
    with pytest.raises(RuntimeError, match="groups must be a divisor of d_inner=4; got 3"):
        op(**tensors)


@pytest.mark.parametrize(("op", "name"), [(CONV, "weight"), (SCAN, "delta")], ids=str)
def test_another_device(op: Operator, name: str, device: torch.device) -> None:
    tensors = op.make_inputs()
    message = f"{op}: {name} must be on {device} as {op.activations[0]}; got meta"
    with pytest.raises(RuntimeError, match=message):
        op(**(tensors | {name: tensors[name].to("meta")}))


def bad_boundaries(op: Operator, message: str, values: list[Any], **options: Any) -> None:
    tensors = op.make_inputs(1) | {"initial_state": None}
    with pytest.raises(RuntimeError, match=f"{op}: cu_seqlens must be {message}"):
        op(**tensors, cu_seqlens=torch.tensor(values, **options))


@pytest.mark.cpu_kernels("on CUDA no value of cu_seqlens is read on the host")
@over_time
@pytest.mark.parametrize(
    ("values", "got", "position"),
    [
        ([1, 9], 1, 0),
        ([0, 5], 5, 1),
        ([0, 7, 5, 9], 5, 2),
        ([0, 99, 9], 9, 2),
        ([0, -4, 9], -4, 1),
    ],
)
def test_bad_values_of_cu_seqlens(op: Operator, values: list[int], got: int, position: int) -> None:
    bad_boundaries(op, f"rising from 0 to length=9; got {got} at position {position}", values)


@over_time
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 9.0], "int32 or int64; got float32"),
        ([[0, 9]], r"one-dimensional; got \(1, 2\)"),
        ([], "int32 or int64; got float32"),
    ],
)
def test_bad_cu_seqlens(op: Operator, values: list[Any], message: str) -> None:
    bad_boundaries(op, message, values)


@over_time
def test_empty_cu_seqlens(op: Operator) -> None:
    bad_boundaries(op, "of at least one value", [], dtype=torch.int32)
