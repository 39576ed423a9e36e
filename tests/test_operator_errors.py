# SPDX-License-Identifier: Apache-2.0
"""A bad call is an error that names the operator, the argument, what it must be and what it is."""

from __future__ import annotations

import re
from inspect import isfunction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from operators import CONV, CONV_UPDATE, OPERATORS, SCAN, SCAN_UPDATE, Operator, over_time

pytestmark = pytest.mark.usefixtures("device")

FLOATS = "float32, bfloat16, float16 or float64"

# The argument, what is made of it, and what it must be; or the whole message.
BAD_CALLS: dict[Operator, list[tuple[str, Any, str]]] = {
    CONV: [
        ("x", lambda t: t[0], "(batch, length, d_inner); got (9, 5)"),
        ("x", lambda t: t.int(), f"{FLOATS}; got Int"),
        ("x", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
        ("weight", lambda t: t[:, None], "(d_inner, d_conv); got (5, 1, 4)"),
        ("weight", lambda t: t[:4], "(d_inner=5, d_conv=4); got (4, 4)"),
        ("weight", lambda t: t[:, :0], "d_conv must be at least 1; got 0"),
        ("bias", lambda t: t[:1], "(d_inner=5); got (1,)"),
        ("initial_state", lambda t: t[:, 1:], "(batch=2, d_conv - 1=3, d_inner=5); got (2, 2, 5)"),
        ("initial_state", lambda t: t.mT, "(batch=2, d_conv - 1=3, d_inner=5); got (2, 5, 3)"),
        ("initial_state", lambda t: t.float(), "float64 for x in float64; got float32"),
        ("cu_seqlens", lambda _: torch.tensor([0, 9]), "batch must be 1 with cu_seqlens; got 2"),
    ],
    SCAN: [
        ("u", lambda t: t[0], "(batch, length, d_inner); got (9, 4)"),
        ("u", lambda t: t.long(), f"{FLOATS}; got Long"),
        ("u", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
        ("delta", lambda t: t[:, 1:], "(batch=2, length=9, d_inner=4); got (2, 8, 4)"),
        ("delta", lambda t: t.float(), "float64 as u; got float32"),
        ("A", lambda t: t[:3], "(d_inner=4, d_state=3); got (3, 3)"),
        ("A", lambda t: t[0], "(d_inner, d_state); got (3,)"),
        ("A", lambda t: t[:, :0], "d_state must be at least 1; got 0"),
        ("B", lambda t: t[..., :2], "(batch=2, length=9, d_state=3); got (2, 9, 2)"),
        ("B", lambda t: t.half(), "float64 as u; got float16"),
        ("B", lambda t: t[:, :, None], "C must be (batch=2, length=9, groups=1, d_state=3)"),
        ("C", lambda t: t[:1], "(batch=2, length=9, d_state=3); got (1, 9, 3)"),
        ("C", lambda t: t[:, :, None], "(batch=2, length=9, d_state=3)"),
        ("C", lambda t: t.float(), "float64 as u; got float32"),
        ("D", lambda t: t[:2], "(d_inner=4); got (2,)"),
        ("z", lambda t: t.mT, "(batch=2, length=9, d_inner=4)"),
        ("z", lambda t: t.float(), "float64 as u; got float32"),
        ("delta_bias", lambda t: t[:, None], "(d_inner=4); got (4, 1)"),
        ("initial_state", lambda t: t[:1], "(batch=2, d_inner=4, d_state=3); got (1, 4, 3)"),
        ("initial_state", lambda t: t.mT, "(batch=2, d_inner=4, d_state=3); got (2, 3, 4)"),
        ("initial_state", lambda t: t.float(), "float64 for u in float64; got float32"),
        ("cu_seqlens", lambda _: torch.tensor([0, 9]), "batch must be 1 with cu_seqlens; got 2"),
    ],
    CONV_UPDATE: [
        ("x", lambda t: t[0], "(batch, d_inner); got (5,)"),
        ("x", lambda t: t.long(), f"{FLOATS}; got Long"),
        ("state", lambda t: t[:2], "of batch=3 rows; got 2"),
        ("state", lambda t: t[:, 1:], "(rows=3, d_conv - 1=3, d_inner=5)"),
        ("state", lambda t: t[0], "(rows, d_conv - 1, d_inner); got (3, 5)"),
        ("state", lambda t: t.int(), f"{FLOATS}; got Int"),
        ("weight", lambda t: t[1:], "(d_inner=5, d_conv=4); got (4, 4)"),
        ("bias", lambda t: t[1:], "(d_inner=5); got (4,)"),
        ("state_indices", lambda _: torch.tensor([0, 1]), "(batch=3); got (2,)"),
        ("state_indices", lambda _: torch.tensor([0.0, 1.0, 2.0]), "int32 or int64; got float32"),
    ],
    SCAN_UPDATE: [
        ("u", lambda t: t[None], "(batch, d_inner); got (1, 3, 4)"),
        ("delta", lambda t: t[:, :1], "(batch=3, d_inner=4); got (3, 1)"),
        ("delta", lambda t: t.half(), "float64 as u; got float16"),
        ("A", lambda t: t[:, 0], "(d_inner, d_state); got (4,)"),
        ("B", lambda t: t[:, :2], "(batch=3, d_state=3); got (3, 2)"),
        ("C", lambda t: t.float(), "float64 as u; got float32"),
        ("D", lambda t: t[:1], "(d_inner=4); got (1,)"),
        ("z", lambda t: t.mT, "(batch=3, d_inner=4); got (4, 3)"),
        ("state", lambda t: t.mT, "(rows=3, d_inner=4, d_state=3); got (3, 3, 4)"),
    ],
}


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [(op, *call) for op, calls in BAD_CALLS.items() for call in calls],
    ids=lambda value: None if isfunction(value) else str(value),
)
def test_bad_calls(op: Operator, name: str, change: Any, message: str) -> None:
    if " must be " not in message:
        message = f"{name} must be {message}"
    tensors = op.make_inputs()
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        op(**(tensors | {name: change(tensors.get(name))}))


@pytest.mark.parametrize("op", [SCAN, SCAN_UPDATE], ids=str)
def test_groups_must_divide_channels(op: Operator) -> None:
    tensors = op.make_inputs(d_inner=4, groups=3)
    with pytest.raises(RuntimeError, match="groups must be a divisor of d_inner=4; got 3"):
        op(**tensors)


@pytest.mark.parametrize(
    ("op", "name"), [(op, n) for op in OPERATORS for n in op.parameters], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "wrong", "message"),
    [
        (torch.float64, torch.bfloat16, "float64 or float32; got bfloat16"),
        (torch.float64, torch.float16, "float64 or float32; got float16"),
        (torch.float64, torch.complex128, "float64 or float32; got ComplexDouble"),
        (torch.float64, torch.int32, "float64 or float32; got Int"),
        (torch.float32, torch.float64, "float32; got float64"),
        (torch.bfloat16, torch.float16, "float32 or bfloat16; got float16"),
        (torch.float16, torch.float64, "float32 or float16; got float64"),
    ],
)
def test_parameter_of_another_type(
    op: Operator, name: str, dtype: torch.dtype, wrong: torch.dtype, message: str
) -> None:
    tensors = op.make_inputs(dtype=dtype)
    with pytest.raises(RuntimeError, match=f"{op}: {name} must be {message}"):
        op(**(tensors | {name: tensors[name].to(wrong)}))


TENSORS = [(op, name) for op in OPERATORS for name in (*op.required, *op.optional)]


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=str)
def test_tensor_on_another_device(op: Operator, name: str, device: torch.device) -> None:
    tensors, first = op.inputs_without(), op.activations[0]
    expected = f"{name} must be on {device} as {first}; got meta"
    if name == first:
        expected = rf"\w+ must be on meta as {first}; got {device}"
    with pytest.raises(RuntimeError, match=f"{op}: {expected}"):
        op(**(tensors | {name: tensors[name].to("meta")}))


NOT_TENSORS = (None, [1.0], "text", np.ones(3), 1.0)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        (op, name, value)
        for (op, name), value in product(TENSORS, NOT_TENSORS)
        if value is not None or name in op.required
    ],
    ids=str,
)
def test_argument_that_is_no_tensor(op: Operator, name: str, value: Any) -> None:
    expected = "a Tensor" if name in op.required else "a Tensor or None"
    got = "None" if value is None else type(value).__name__
    with pytest.raises(TypeError, match=f"^{op}: {name} must be {expected}; got {got}$"):
        op(**(op.make_inputs() | {name: value}))


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPERATORS for name in op.required], ids=str
)
def test_direct_call_without_a_tensor(op: Operator, name: str) -> None:
    arguments = op.arguments(**op.make_inputs()) | {name: None}
    with pytest.raises(RuntimeError, match=f"{op}: {name} must be a tensor; got None"):
        op.overload(**arguments)


@pytest.mark.parametrize(
    ("op", "flag"),
    [(op, flag) for op in OPERATORS for flag in op.of_type("bool") if flag != "save_states"],
    ids=str,
)
def test_flag_that_is_no_bool(op: Operator, flag: str) -> None:
    """Refused by PyTorch's dispatcher."""
    message = f"{op}.* 'bool' for argument '{flag}' but instead found type 'str'"
    with pytest.raises(RuntimeError, match=message):
        op(**op.make_inputs(), **{flag: "yes"})


def bad_cu_seqlens(op: Operator, message: str, values: list[Any], **options: Any) -> None:
    tensors = op.make_inputs(1) | {"initial_state": None}
    with pytest.raises(RuntimeError, match=f"{op}: cu_seqlens must be {message}"):
        op(**tensors, cu_seqlens=torch.tensor(values, **options))


@pytest.mark.cpu_kernels("on CUDA no value of cu_seqlens is read on the host")
@over_time
@pytest.mark.parametrize(
    ("values", "got", "position"),
    [([1, 9], 1, 0), ([0, 5], 5, 1), ([0, 7, 5, 9], 5, 2), ([0, 99, 9], 9, 2), ([0, -4, 9], -4, 1)],
)
def test_bad_values_of_cu_seqlens(op: Operator, values: list[int], got: int, position: int) -> None:
    bad_cu_seqlens(op, f"rising from 0 to length=9; got {got} at position {position}", values)


@over_time
def test_bad_cu_seqlens(op: Operator) -> None:
    bad_cu_seqlens(op, "int32 or int64; got float32", [0.0, 9.0])
    bad_cu_seqlens(op, "int32 or int64; got float32", [])
    bad_cu_seqlens(op, r"one-dimensional; got \(1, 2\)", [[0, 9]])
    bad_cu_seqlens(op, "of at least one value", [], dtype=torch.int32)
