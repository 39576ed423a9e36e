# SPDX-License-Identifier: Apache-2.0
"""Every operator under what PyTorch does to operators: autograd, vmap, compile, fake tensors."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from compare import assert_float64_equal, assert_same_bits, results
from mambablock import reference
from operators import CONV, SCAN, Calls, Operator, absences, all_operators, over_time, updates

pytestmark = pytest.mark.usefixtures("device")

check_schema = partial(opcheck, test_utils=("test_schema", "test_faketensor"))

# The operator, its inputs' options, and save_states.
FORWARDS: list[tuple[Operator, dict[str, Any], bool]] = [
    (CONV, {}, False),
    *((SCAN, {"groups": 2}, save_states) for save_states in (False, True)),
]


@pytest.mark.parametrize(("op", "sizes", "save_states"), FORWARDS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(
    op: Operator, sizes: dict[str, Any], save_states: bool, requires_grad: bool
) -> None:
    tensors = op.make_inputs(2, 66, 4, dtype=torch.float32, **sizes)
    for t in tensors.values():
        t.requires_grad_(requires_grad)
    opcheck(op.overload, (), op.arguments(**tensors, save_states=save_states))


@over_time
def test_opcheck_backward(op: Operator) -> None:
    tensors = op.make_inputs(2, 66, 4, dtype=torch.float32)
    opcheck(op.backward, (), op.backward_arguments(**tensors))


@updates
@pytest.mark.parametrize("absent", [(), ("state_indices",)])
def test_opcheck_update(op: Operator, absent: tuple[str, ...]) -> None:
    opcheck(op.overload, (), op.arguments(**op.inputs_without(*absent)))


@absences
def test_schema_without(op: Operator, absent: tuple[str, ...]) -> None:
    tensors = op.inputs_without(*absent)
    check_schema(op.overload, (), op.arguments(**tensors))
    if not op.is_update:
        arguments = op.backward_arguments(**tensors)
        check_schema(op.backward, (), arguments)
        check_schema(op.backward, (), arguments | {"dfinal_state": None})


@all_operators
def test_argument_names_agree(op: Operator) -> None:
    """In order, of the schema, the public function and the definition."""
    expected = [name for name in op.schema if name != "save_states"]
    of_the_public_function = ("return_final_state", "context_parallel")
    for function in (op.function, getattr(reference, op.name)):
        names = inspect.signature(function).parameters
        assert [name for name in names if name not in of_the_public_function] == expected
    if not op.is_update:
        arguments = op.backward._schema.arguments
        assert [a.name for a in arguments] == list(op.backward_arguments(**op.make_inputs()))


def direct(op: Operator, **given: Any) -> tuple[Tensor, Tensor]:
    """y and the final state, from torch.ops."""
    return op.overload(*op.arguments(**given).values())[:2]


@pytest.mark.parametrize(("op", "sizes", "save_states"), FORWARDS, ids=str)
def test_direct_call_differentiates(op: Operator, sizes: dict[str, Any], save_states: bool) -> None:
    tensors = op.make_inputs(**sizes)
    got = results(partial(direct, op), tensors, save_states=save_states)
    assert_float64_equal(got, results(op, tensors))


@pytest.mark.parametrize("call", [Operator.__call__, direct])
@pytest.mark.parametrize("used", [0, 1], ids=["y", "final_state"])
@over_time
def test_no_gradient_is_made_that_nobody_gave(op: Operator, used: int, call: Any) -> None:
    tensors = {n: t.requires_grad_() for n, t in op.make_inputs(length=70).items()}
    outputs = call(op, **tensors)
    with Calls() as calls:
        outputs[used].sum().backward()
    (arguments,) = calls.of(f"mambablock::{op}_backward")
    assert (arguments["dfinal_state"] is None) == (used == 0)
    zeros = [output.shape for name, _, output in calls.recorded if "zero" in name]
    # dy is no optional argument.
    assert len([shape for shape in zeros if shape.numel() >= outputs[1].numel()]) <= used


@pytest.mark.parametrize("call", [Operator.__call__, direct])
@over_time
def test_gradients_of_the_final_state_alone(op: Operator, call: Any) -> None:
    tensors = op.make_inputs()
    got = results(lambda **t: call(op, **t)[1:], tensors)
    assert_float64_equal(got, results(lambda **t: op.reference(**t)[1:], tensors))


@over_time
def test_second_derivative_is_an_error(op: Operator) -> None:
    tensors = {n: t.requires_grad_() for n, t in op.make_inputs().items()}
    y, _ = op(**tensors)
    (gradient,) = torch.autograd.grad(y.sum(), tensors[op.activations[0]], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: its backward must be differentiated at most"):
        gradient.sum().backward()


MAPPED: list[tuple[Operator, dict[str, Any], str]] = [
    *((CONV, {}, mapped) for mapped in ("x", "weight", "all")),
    *((SCAN, {"groups": groups}, m) for groups in (None, 2) for m in ("u", "A", "B", "all")),
]


@pytest.mark.parametrize(("op", "sizes", "mapped"), MAPPED, ids=str)
def test_vmap_and_func_grad(op: Operator, sizes: dict[str, Any], mapped: str) -> None:
    tensors = op.make_inputs(2, 5, 4, **sizes)
    in_dims = tuple(0 if mapped in (name, "all") else None for name in tensors)
    stacked = [
        torch.stack([t, t * 0.5, t * 0.7]) if dim == 0 else t
        for t, dim in zip(tensors.values(), in_dims, strict=True)
    ]

    def loss(*values: Tensor) -> Tensor:
        y, state = op(**dict(zip(tensors, values, strict=True)))
        return (y**2).sum() + state.sum()

    got = torch.func.vmap(torch.func.grad(loss, tuple(range(len(tensors)))), in_dims)(*stacked)
    values = torch.func.vmap(loss, in_dims)(*stacked)
    for i in range(3):
        row = [t[i] if dim == 0 else t for t, dim in zip(stacked, in_dims, strict=True)]
        leaves = [t.clone().requires_grad_() for t in row]
        value = loss(*leaves)
        torch.testing.assert_close(values[i], value.detach())
        for g, expected in zip(got, torch.autograd.grad(value, leaves), strict=True):
            torch.testing.assert_close(g[i], expected)


@over_time
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_vmap_over_any_dimension(op: Operator, dim: int) -> None:
    tensors = op.make_inputs(2, 5, 4)
    in_dims = tuple(min(dim, t.dim()) for t in tensors.values())
    stacked = [torch.stack([t, t * 0.5], d) for t, d in zip(tensors.values(), in_dims, strict=True)]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return op(**dict(zip(tensors, values, strict=True)))

    got = torch.func.vmap(call, in_dims)(*stacked)
    for i in range(2):
        row = [t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(tuple(t[i] for t in got), call(*row))


@all_operators
def test_compiles_fullgraph(op: Operator) -> None:
    tensors = op.make_inputs(dtype=torch.float32)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, tensors, **op.options), results(op, tensors))


@all_operators
def test_autocast_casts_activations_alone(op: Operator, device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        y, state, *_ = results(op, op.make_inputs(dtype=torch.float32)).values()
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@all_operators
def test_meta(op: Operator) -> None:
    tensors = op.make_inputs()
    expected = results(op, tensors)
    for name, got in results(op, {n: t.to("meta") for n, t in tensors.items()}).items():
        assert got.is_meta
        assert (got.shape, got.dtype) == (expected[name].shape, expected[name].dtype), name


@pytest.mark.parametrize(("op", "name"), [(CONV, "weight"), (SCAN, "delta")], ids=str)
def test_meta_of_a_wrong_shape(op: Operator, name: str) -> None:
    tensors = {n: t.to("meta") for n, t in op.make_inputs().items()}
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        op(**(tensors | {name: tensors[name][1:]}))
