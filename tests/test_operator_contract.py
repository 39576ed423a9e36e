# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator: the numbers of reference.py, and the same bits any way."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compare import (
    assert_as_exact_as_pytorch,
    assert_float64_equal,
    assert_matches_reference,
    assert_same_bits,
    boundaries,
    gradients,
    packing,
    results,
    reversed_strides,
    time_last,
)
from operators import (
    CONV,
    CONV_UPDATE,
    DTYPES,
    LOW_PRECISION,
    OPERATORS,
    OVER_TIME,
    SCAN,
    SCAN_UPDATE,
    Operator,
    absences,
    all_operators,
    over_time,
    subsets,
)

pytestmark = pytest.mark.usefixtures("device")


@absences
@pytest.mark.parametrize("flag", [False, True])
def test_optional_arguments(op: Operator, absent: tuple[str, ...], flag: bool) -> None:
    assert_matches_reference(op, op.inputs_without(*absent), **{op.flag: flag})


@pytest.mark.parametrize(
    ("op", "names"), [(op, n) for op in OPERATORS for n in subsets(op.parameters)], ids=str
)
def test_float32_parameters_beside_float64(op: Operator, names: tuple[str, ...]) -> None:
    """Computed in float64, with gradients in float32."""
    tensors = op.make_inputs()
    assert_matches_reference(op, tensors | {name: tensors[name].float() for name in names})


@all_operators
def test_no_batch(op: Operator) -> None:
    assert_matches_reference(op, op.make_inputs(0))


@over_time
@pytest.mark.parametrize(
    "lengths",
    [
        *([5], [0, 3, 0, 0, 61, 1, 70, 0], [0, 1, 0, 2, 125, 1, 140, 0]),
        *([64, 64], [128, 128], [1] * 9, []),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(op: Operator, lengths: list[int], reverse: bool, dtype: torch.dtype) -> None:
    tensors = op.make_inputs(1, sum(lengths), 3, states=len(lengths))
    assert_matches_reference(op, tensors, cu_seqlens=boundaries(lengths, dtype), reverse=reverse)


@over_time
@pytest.mark.parametrize("cuts", [[1], [64], [128], [3, 65, 100], [1, 2, 3, 100]])
def test_streaming_is_the_full_forward(op: Operator, cuts: list[int]) -> None:
    def pieces(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        state, ys = initial_state, []
        for begin, end in pairwise([0, *cuts, 140]):
            y, state = op(**op.steps(tensors, begin, end), initial_state=state)
            ys.append(y)
        return torch.cat(ys, 1), state

    tensors = op.make_inputs(length=140)
    assert_float64_equal(results(pieces, tensors), results(op, tensors))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("parameters", ["float32", "as activations"])
@pytest.mark.parametrize(("op", "size"), [(CONV, 4), (CONV, 6), (SCAN, 16), (SCAN, 20)], ids=str)
def test_low_precision(op: Operator, size: int, dtype: torch.dtype, parameters: str) -> None:
    tensors = op.make_inputs(2, 70, 24, size, dtype=dtype)
    if parameters == "as activations":
        tensors |= {name: tensors[name].to(dtype) for name in op.parameters}
    assert_as_exact_as_pytorch(op, tensors)


@over_time
@given(data=st.data())
def test_strides_shapes_and_options(op: Operator, data: st.DataObject) -> None:
    batch, length, d_inner, size = (
        data.draw(st.integers(*limits)) for limits in ((0, 3), (0, 70), (1, 20), (1, 6))
    )
    groups = [None, 1, *(g for g in (2, 5) if d_inner % g == 0)]
    grouped = {"groups": data.draw(st.sampled_from(groups))} if op is SCAN else {}
    tensors = op.make_inputs(batch, length, d_inner, size, **grouped)
    for name, t in tensors.items():
        layout = data.draw(st.sampled_from(["contiguous", "transposed", "slice", "expanded"]))
        if name in op.optional and data.draw(st.booleans()):
            tensors[name] = None
        elif layout == "transposed":
            tensors[name] = reversed_strides(t)
        elif layout == "slice":
            wide = torch.randn(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
            wide[..., 1::2] = t
            tensors[name] = wide[..., 1::2]
        elif layout == "expanded" and t.shape[0] > 0:
            tensors[name] = t[:1].expand(t.shape)
    flags = (op.flag, "reverse", *(["A_is_log"] if op is SCAN else []))
    options = {name: data.draw(st.booleans()) for name in flags}
    summed = data.draw(st.booleans())

    def outputs(function: Any) -> dict[str, Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
        found = function(**leaves, **options)
        # The gradient of a sum is expanded: every element of dy is the same one in memory.
        losses = [t.sum() for t in found] if summed else found
        return {str(i): t for i, t in enumerate((*found, *gradients(losses, [*leaves.values()])))}

    # Without softplus, dt may be negative and the scan's state grow.
    tolerance = 1e-9 if op is SCAN else 1e-10
    assert_float64_equal(outputs(op), outputs(op.reference), tolerance)


GRADCHECKS: list[tuple[Operator, tuple[int, ...], tuple[str, ...], dict[str, Any]]] = [
    *((CONV, (2, 5, 2), (), {"reverse": reverse}) for reverse in (False, True)),
    *((SCAN, (2, 5, 3, 2), (), {"reverse": reverse}) for reverse in (False, True)),
    *((op, (2, 5, 2), op.parameters, {}) for op in OVER_TIME),
    (SCAN, (2, 5, 3, 2), (), {"A_is_log": True}),
    (SCAN, (1, 6, 4, 2, 2), (), {"cu_seqlens": [0, 2, 2, 6], "delta_softplus": False}),
]


@pytest.mark.parametrize(("op", "sizes", "in_float32", "options"), GRADCHECKS, ids=str)
def test_gradcheck(
    op: Operator, sizes: tuple[int, ...], in_float32: tuple[str, ...], options: dict[str, Any]
) -> None:
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": torch.tensor(options["cu_seqlens"])}
    tensors = op.make_inputs(*sizes, states=3 if "cu_seqlens" in options else None)
    options = options | {name: tensors.pop(name).float() for name in in_float32}

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return op(**dict(zip(tensors, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@over_time
@pytest.mark.parametrize("flag", [False, True])
def test_packed_is_separate(op: Operator, flag: bool) -> None:
    lengths = [3, 70, 0, 64]
    cu_seqlens = boundaries(lengths)
    tensors = op.make_inputs(1, sum(lengths), 5, 4, states=len(lengths))
    y, state = op(**tensors, cu_seqlens=cu_seqlens, **{op.flag: flag})
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        row = op.steps(tensors, begin, end)
        row["initial_state"] = row["initial_state"][i : i + 1]
        alone, alone_state = op(**row, **{op.flag: flag})
        assert torch.equal(y[:, begin:end], alone)
        assert torch.equal(state[i : i + 1], alone_state)


@over_time
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_sequence(op: Operator, reverse: bool) -> None:
    for name in op.activations:
        tensors = op.make_inputs(1, 12, 3, 2, states=2)
        tensors[name][:, 4] = float("nan")
        got = results(op, tensors, cu_seqlens=boundaries([6, 6]), reverse=reverse)
        assert got["output 0"][:, 4].isnan().all()
        for clean in ("output 0", *(f"d{activation}" for activation in op.activations)):
            assert got[clean][:, 6:].isfinite().all(), (name, clean)
        for clean in ("output 1", "dinitial_state"):
            assert got[clean][1].isfinite().all(), (name, clean)


@over_time
@pytest.mark.parametrize("flag", [False, True])
def test_reverse_is_flipped(op: Operator, flag: bool) -> None:
    tensors = op.make_inputs(length=70)
    flipped = tensors | {name: tensors[name].flip(1) for name in op.activations}
    y, state = op(**tensors, reverse=True, **{op.flag: flag})
    expected, expected_state = op(**flipped, **{op.flag: flag})
    assert torch.equal(y, expected.flip(1))
    assert torch.equal(state, expected_state)


LAYOUTS = [(op, lengths) for op in OVER_TIME for lengths in ([5], [64], [75], [3, 0, 41, 32])]
LAYOUTS += [(CONV, [300]), (CONV, [3, 0, 66, 231])]


@pytest.mark.parametrize(("op", "lengths"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_inner", [260, 263])
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_layouts_give_the_same_bits(
    op: Operator, lengths: list[int], dtype: torch.dtype, d_inner: int, reverse: bool
) -> None:
    # Several blocks of channels, the last not a whole number of vectors.
    packed = len(lengths) > 1
    states, cu_seqlens = packing(lengths if packed else None)
    tensors = op.make_inputs(1 if packed else 2, sum(lengths), d_inner, states=states, dtype=dtype)
    first, *others = op.activations
    dy, dfinal_state = (torch.randn_like(tensors[name]) for name in (first, "initial_state"))

    def bits(tensors: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        outputs = op(**leaves, cu_seqlens=cu_seqlens, reverse=reverse)
        return [*outputs, *torch.autograd.grad(outputs, leaves.values(), (dy, dfinal_state))]

    expected = bits(tensors, dy)
    transposed = {name: time_last(tensors[name]) for name in op.activations}
    # The scan's u comes channels-last from the convolution.
    all_but_first = {name: transposed[name] for name in others}
    for memory, gradient in (
        (transposed, time_last(dy)),
        (transposed, dy),
        (all_but_first, time_last(dy)),
    ):
        assert_same_bits(bits(tensors | memory, gradient), expected)


LARGE: list[tuple[Operator, tuple[int, ...]]] = [
    (CONV, (2, 200, 300)),
    (SCAN, (2, 130, 200, 4)),
    (CONV_UPDATE, (5, 3000)),
    (SCAN_UPDATE, (5, 3000, 4)),
]


@pytest.mark.cpu_kernels("the threads of the host run no part of a CUDA kernel")
@pytest.mark.parametrize(("op", "sizes"), LARGE, ids=str)
def test_threads_give_the_same_bits(op: Operator, sizes: tuple[int, ...]) -> None:
    tensors = op.make_inputs(*sizes, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(results(op, tensors))
    finally:
        torch.set_num_threads(before)
    for result in found[1:]:
        assert_same_bits(result, found[0])


@all_operators
def test_poisoned_memory_does_not_show(op: Operator) -> None:
    sizes = {} if op.is_update else {"batch": 1, "length": 70}
    tensors = op.make_inputs(**sizes, d_inner=5, dtype=torch.float32)
    expected = results(op, tensors)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        got = results(op, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(got, expected)
