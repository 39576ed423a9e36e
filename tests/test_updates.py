# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d_update and selective_state_update: one step, in place, of rows of a state."""

from __future__ import annotations

import pytest
import torch

from compare import assert_matches_reference, reversed_strides
from operators import CONV, CONV_UPDATE, DTYPES, SCAN, SCAN_UPDATE, Operator, updates

pytestmark = pytest.mark.usefixtures("device")


@updates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_types(op: Operator, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    tensors = op.make_inputs(dtype=dtype)
    assert_matches_reference(op, tensors | {"state": tensors["state"].to(state_dtype)})


@updates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_as_activations(op: Operator, dtype: torch.dtype) -> None:
    tensors = op.make_inputs(dtype=dtype)
    assert_matches_reference(
        op, tensors | {name: tensors[name].to(dtype) for name in op.parameters}
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("silu", [False, True])
def test_conv_widths(width: int, silu: bool) -> None:
    assert_matches_reference(CONV_UPDATE, CONV_UPDATE.make_inputs(width=width), silu=silu)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("d_inner", [1, 6, 2000])
@pytest.mark.parametrize("d_state", [1, 5, 16, 17, 40])
def test_scan_sizes(batch: int, d_inner: int, d_state: int) -> None:
    assert_matches_reference(SCAN_UPDATE, SCAN_UPDATE.make_inputs(batch, d_inner, d_state))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_groups(groups: int, delta_softplus: bool) -> None:
    tensors = SCAN_UPDATE.make_inputs(2, 6, 3, groups)
    assert_matches_reference(SCAN_UPDATE, tensors, delta_softplus=delta_softplus)


@updates
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_indices(op: Operator, dtype: torch.dtype) -> None:
    indices = torch.tensor([5, -1, 0], dtype=dtype)
    tensors = op.make_inputs()
    state = tensors["state"] = torch.randn(7, *tensors["state"].shape[1:], dtype=torch.float64)
    assert_matches_reference(op, tensors, state_indices=indices)
    before = state.clone()
    y = op(**tensors, state_indices=indices)
    assert not y[1].any()
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(state[untouched], before[untouched])
    assert not torch.equal(state[5], before[5])


@updates
def test_strided_state_and_inputs(op: Operator) -> None:
    tensors = {name: reversed_strides(t) for name, t in op.make_inputs().items()}
    assert_matches_reference(op, tensors)
    state, expected = tensors["state"].clone(), tensors["state"].contiguous()
    assert not state.is_contiguous()
    op(**(tensors | {"state": state}))
    op(**(tensors | {"state": expected}))
    assert torch.equal(state, expected)


@pytest.mark.parametrize(("op", "step"), [(CONV, CONV_UPDATE), (SCAN, SCAN_UPDATE)], ids=str)
def test_steps_are_the_full_ops(op: Operator, step: Operator) -> None:
    length, tensors = 12, op.make_inputs(length=12)
    if op is SCAN:
        # dt from -30 to 25, where softplus changes its form.
        delta = torch.linspace(-30, 25, length, dtype=torch.float64)
        tensors["delta"] = delta.view(1, -1, 1).expand_as(tensors["u"])
    y, final_state = op(**tensors)
    state = tensors.pop("initial_state")
    for t in range(length):
        row = tensors | {name: tensors[name][:, t] for name in op.activations}
        torch.testing.assert_close(step(state=state, **row), y[:, t])
    torch.testing.assert_close(state, final_state)
    if op is CONV:
        assert torch.equal(state, final_state)


@pytest.mark.cpu_kernels("on CUDA no value of state_indices is read on the host")
@updates
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 3], "below the state's 3 rows; got 3"),
        ([1, 0, 1], "distinct; got 1 twice"),
        ([0, 1, 99], "below the state's 3 rows; got 99"),
    ],
)
def test_bad_values_of_state_indices(op: Operator, values: list[int], message: str) -> None:
    tensors = op.make_inputs()
    before = tensors["state"].clone()
    with pytest.raises(RuntimeError, match=f"{op}: state_indices must be {message}"):
        op(**tensors, state_indices=torch.tensor(values))
    assert torch.equal(tensors["state"], before)
