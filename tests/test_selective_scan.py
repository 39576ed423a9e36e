# SPDX-License-Identifier: Apache-2.0
"""selective_scan against its definition, reference.selective_scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mambablock
from compare import (
    assert_as_exact_as_pytorch,
    assert_float64_equal,
    boundaries,
    gradients,
    rows_of,
    time_last,
)
from mambablock import reference
from operators import LOW_PRECISION, as_dtype
from operators import selective_scan_inputs as make_inputs

pytestmark = pytest.mark.usefixtures("device")

OPTIONS: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}


def both(tensors: dict[str, Tensor | None], **options: Any) -> None:
    options = OPTIONS | options
    assert_float64_equal(
        gradients(lambda **t: mambablock.selective_scan(**t, **options), tensors),
        gradients(lambda **t: reference.selective_scan(**t, **options), tensors),
    )


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(length: int, reverse: bool) -> None:
    both(make_inputs(length=length), reverse=reverse)


@pytest.mark.parametrize("d_inner", [1, 7, 8, 16, 33, 64, 65, 130])
@pytest.mark.parametrize("d_state", [1, 2, 5, 16])
def test_sizes(d_inner: int, d_state: int) -> None:
    both(make_inputs(1, 5, d_inner, d_state))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups(groups: int) -> None:
    both(make_inputs(2, 7, 6, 3, groups))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_optional_arguments(absent: str, delta_softplus: bool) -> None:
    both(make_inputs() | {absent: None}, delta_softplus=delta_softplus)


def test_no_batch() -> None:
    both(make_inputs(0, 5))


@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 0, 61, 1, 70, 0], [64, 64], [1] * 9, []])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(lengths: list[int], reverse: bool, dtype: torch.dtype) -> None:
    tensors = make_inputs(1, sum(lengths), 3, 2, states=len(lengths))
    both(tensors, cu_seqlens=boundaries(lengths, dtype), reverse=reverse)


def test_packed_is_separate() -> None:
    lengths = [3, 70, 0, 64]
    tensors = make_inputs(1, sum(lengths), 5, 4, states=len(lengths))
    y, state = mambablock.selective_scan(
        **tensors, cu_seqlens=boundaries(lengths), return_final_state=True
    )
    first = 0
    for i, length in enumerate(lengths):
        row = {
            name: t[:, first : first + length] if name in ("u", "delta", "B", "C", "z") else t
            for name, t in tensors.items()
        }
        row["initial_state"] = tensors["initial_state"][i : i + 1]
        alone, alone_state = mambablock.selective_scan(**row, return_final_state=True)
        assert torch.equal(y[:, first : first + length], alone)
        assert torch.equal(state[i : i + 1], alone_state)
        first += length


def test_nan_stays_in_its_sequence() -> None:
    tensors = make_inputs(1, 12, 3, 2, states=2, optional=False)
    tensors["u"][:, 4] = float("nan")
    for reverse, clean in ((False, slice(6, 12)), (True, slice(6, 12))):
        y = mambablock.selective_scan(**tensors, cu_seqlens=boundaries([6, 6]), reverse=reverse)
        assert y[:, clean].isfinite().all()


def test_reverse_is_flipped() -> None:
    tensors = make_inputs(length=70)
    flipped = {
        n: t.flip(1) if n in ("u", "delta", "B", "C", "z") else t for n, t in tensors.items()
    }
    y, state = mambablock.selective_scan(**tensors, reverse=True, return_final_state=True)
    expected, expected_state = mambablock.selective_scan(**flipped, return_final_state=True)
    assert torch.equal(y, expected.flip(1))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", [[5], [64], [75], [3, 0, 41, 32]])
@pytest.mark.parametrize("d_inner", [260, 263])
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_layouts_give_the_same_bits(
    lengths: list[int], dtype: torch.dtype, d_inner: int, reverse: bool
) -> None:
    # Several blocks of channels, the last one no whole number of vectors.
    batch, states, cu_seqlens = rows_of(lengths)
    tensors = make_inputs(batch, sum(lengths), d_inner, states=states, dtype=dtype)
    dy = torch.randn_like(tensors["u"])
    options = OPTIONS | {"cu_seqlens": cu_seqlens, "reverse": reverse}

    def bits(dy: Tensor, **tensors: Tensor) -> list[Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        y, _ = mambablock.selective_scan(**leaves, **options)
        return [y, *torch.autograd.grad(y, leaves.values(), dy)]

    expected = bits(dy, **tensors)
    turned = {n: time_last(tensors[n]) for n in ("u", "delta", "B", "C", "z")}
    # All of them, and some: u comes channels-last from the convolution.
    for other in (turned, {n: t for n, t in turned.items() if n != "u"}):
        same = zip(bits(time_last(dy), **(tensors | other)), expected, strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("cuts", [[1], [64], [3, 65, 100]])
def test_streaming_is_the_full_forward(cuts: list[int]) -> None:
    tensors = make_inputs(length=130)

    def pieces(**t: Tensor) -> tuple[Tensor, Tensor]:
        state, ys = t.pop("initial_state"), []
        for begin, end in zip([0, *cuts], [*cuts, 130], strict=True):
            row = {
                n: x[:, begin:end] if n in ("u", "delta", "B", "C", "z") else x
                for n, x in t.items()
            }
            y, state = mambablock.selective_scan(
                **row, initial_state=state, delta_softplus=True, return_final_state=True
            )
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_float64_equal(
        gradients(pieces, tensors),
        gradients(
            lambda **t: mambablock.selective_scan(
                **t, delta_softplus=True, return_final_state=True
            ),
            tensors,
        ),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("parameters", ["float32", "as activations"])
def test_low_precision(dtype: torch.dtype, parameters: str) -> None:
    tensors = make_inputs(2, 70, 24, 16, dtype=dtype)
    if parameters == "as activations":
        tensors |= {name: tensors[name].to(dtype) for name in ("A", "D", "delta_bias")}
    assert_as_exact_as_pytorch(
        gradients(lambda **t: mambablock.selective_scan(**t, **OPTIONS), tensors),
        gradients(lambda **t: reference.selective_scan(**t, **OPTIONS), tensors),
        gradients(
            lambda **t: reference.selective_scan(**t, **OPTIONS), as_dtype(tensors, torch.float64)
        ),
    )


@given(data=st.data())
def test_strides_shapes_and_options(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70))
    d_inner, d_state = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    groups = data.draw(st.sampled_from([None, 1, *(g for g in (2, 5) if d_inner % g == 0)]))
    tensors = make_inputs(batch, length, d_inner, d_state, groups)
    for name in ("D", "z", "delta_bias", "initial_state"):
        if data.draw(st.booleans()):
            tensors[name] = None
    for name, t in tensors.items():
        if t is None:
            continue
        layout = data.draw(st.sampled_from(["contiguous", "transposed", "slice", "expanded"]))
        if layout == "transposed":
            order = list(reversed(range(t.dim())))
            tensors[name] = t.permute(order).contiguous().permute(order)
        elif layout == "slice":
            wide = torch.randn(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
            wide[..., 1::2] = t
            tensors[name] = wide[..., 1::2]
        elif layout == "expanded" and t.shape[0] > 0:
            tensors[name] = t[:1].expand(t.shape)
    options = {
        "reverse": data.draw(st.booleans()),
        "delta_softplus": data.draw(st.booleans()),
        "return_final_state": True,
    }
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
    outputs = []
    for function in (mambablock.selective_scan, reference.selective_scan):
        y, state = function(**leaves, **options)
        # An expanded gradient: every element of dy is the same one in memory.
        loss = y.sum() + (state * 1.5).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        outputs.append([y, state, *(torch.zeros(()) if g is None else g for g in found)])
    for got, expected in zip(*outputs, strict=True):
        if expected.dim() > 0 and expected.numel() > 0:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    tensors = {n: t.requires_grad_() for n, t in make_inputs(2, 5, 3, 2).items()}
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return mambablock.selective_scan(
            **dict(zip(names, values, strict=True)),
            delta_softplus=True,
            reverse=reverse,
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_gradcheck_packed_with_groups() -> None:
    tensors = {n: t.requires_grad_() for n, t in make_inputs(1, 6, 4, 2, 2, states=3).items()}
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return mambablock.selective_scan(
            **dict(zip(names, values, strict=True)),
            cu_seqlens=boundaries([2, 0, 4]),
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def op_arguments(
    requires_grad: bool, save_states: bool, groups: int | None = None
) -> tuple[Any, ...]:
    tensors = make_inputs(2, 66, 4, 3, groups, dtype=torch.float32)
    for t in tensors.values():
        t.requires_grad_(requires_grad)
    return (*tensors.values(), None, True, False, save_states)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("save_states", [False, True])
def test_opcheck(requires_grad: bool, save_states: bool) -> None:
    torch.library.opcheck(
        torch.ops.mambablock.selective_scan, op_arguments(requires_grad, save_states, groups=2)
    )


def test_opcheck_backward() -> None:
    *arguments, softplus, reverse, _ = op_arguments(False, True)
    y, state, saved = torch.ops.mambablock.selective_scan(*arguments, softplus, reverse, True)
    torch.library.opcheck(
        torch.ops.mambablock.selective_scan_backward,
        (y, state, *arguments, saved, softplus, reverse),
    )


@pytest.mark.parametrize("save_states", [False, True])
def test_direct_call_differentiates(save_states: bool) -> None:
    tensors = make_inputs()
    assert_float64_equal(
        gradients(
            lambda **t: torch.ops.mambablock.selective_scan(
                *t.values(), None, True, False, save_states
            )[:2],
            tensors,
        ),
        gradients(
            lambda **t: mambablock.selective_scan(
                **t, delta_softplus=True, return_final_state=True
            ),
            tensors,
        ),
    )


def test_second_derivative_is_an_error() -> None:
    tensors = {n: t.requires_grad_() for n, t in make_inputs().items()}
    y = mambablock.selective_scan(**tensors)
    (du,) = torch.autograd.grad(y.sum(), tensors["u"], create_graph=True)
    with pytest.raises(
        RuntimeError, match="selective_scan: its backward must be differentiated at"
    ):
        du.sum().backward()


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("mapped", ["u", "A", "B", "all"])
def test_vmap_and_func_grad(groups: int | None, mapped: str) -> None:
    tensors = make_inputs(2, 5, 4, 3, groups)
    names = list(tensors)
    in_dims = tuple(0 if mapped in (name, "all") else None for name in names)
    stacked = [
        torch.stack([t, t * 0.5, t * 0.7]) if dim == 0 else t
        for t, dim in zip(tensors.values(), in_dims, strict=True)
    ]

    def loss(*values: Tensor) -> Tensor:
        y, state = mambablock.selective_scan(
            **dict(zip(names, values, strict=True)), delta_softplus=True, return_final_state=True
        )
        return (y**2).sum() + state.sum()

    got = torch.func.vmap(torch.func.grad(loss, tuple(range(9))), in_dims)(*stacked)
    values = torch.func.vmap(loss, in_dims)(*stacked)
    for i in range(3):
        row = [t[i] if dim == 0 else t for t, dim in zip(stacked, in_dims, strict=True)]
        leaves = [t.clone().requires_grad_() for t in row]
        value = loss(*leaves)
        torch.testing.assert_close(values[i], value.detach())
        expected = torch.autograd.grad(value, leaves)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_vmap_over_any_dimension(dim: int) -> None:
    tensors = make_inputs(2, 5, 4, 3, optional=False)
    stacked = [torch.stack([t, t * 0.5], min(dim, t.dim())) for t in tensors.values()]
    in_dims = tuple(min(dim, t.dim()) for t in tensors.values())
    got = torch.func.vmap(mambablock.selective_scan, in_dims)(*stacked)
    for i in range(2):
        row = [t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(got[i], mambablock.selective_scan(*row))


def test_compiles_fullgraph() -> None:
    tensors = make_inputs(dtype=torch.float32)
    compiled = torch.compile(mambablock.selective_scan, fullgraph=True, backend="aot_eager")
    got = gradients(lambda **t: compiled(**t, **OPTIONS), tensors)
    expected = gradients(lambda **t: mambablock.selective_scan(**t, **OPTIONS), tensors)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.cpu_kernels("the threads of the host run no part of a CUDA kernel")
def test_threads_give_the_same_bits() -> None:
    tensors = make_inputs(2, 130, 200, 4, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(
                gradients(lambda **t: mambablock.selective_scan(**t, **OPTIONS), tensors)
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(result[name], value), name


def test_wide_range_of_dt_and_unstable_A() -> None:
    tensors = make_inputs(1, 56, 3, 2)
    tensors["delta"] = (
        torch.linspace(-30, 25, 56, dtype=torch.float64).view(1, -1, 1).expand(1, 56, 3)
    )
    tensors["A"] = torch.tensor([[-1.0, -16.0], [0.001, 0.0], [-300.0, -1e-6]], dtype=torch.float64)
    both(tensors)
    single = as_dtype(tensors, torch.float32)
    y = mambablock.selective_scan(**single, delta_softplus=True)
    expected = reference.selective_scan(**tensors, delta_softplus=True)
    # Rounding of dt * A, up to 25 * 16, moves the decay by 400 roundings at most.
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_growing_state_with_a_big_bias() -> None:
    tensors = make_inputs(1, 40, 3, 2, dtype=torch.float32)
    tensors["A"] = torch.tensor([[0.5, 0.1], [2.0, -1.0], [40.0, 0.0]])
    tensors["delta_bias"] = torch.tensor([5.0, 3.0, 1.0])
    y, state = mambablock.selective_scan(**tensors, **OPTIONS)
    expected, expected_state = reference.selective_scan(**tensors, **OPTIONS)
    # exp(5 * 0.5 * 40) is near float32's end, and the last channel beyond it: infinite in both.
    assert torch.equal(state.isfinite(), expected_state.isfinite())
    assert not state.isfinite().all()
    finite = expected.isfinite() & (expected.abs() < 1e30)
    # Forty decays multiplied, each to a few roundings of its exponent of up to 3.
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_past_2_31_elements() -> None:
    length, d_inner = 2**20 + 70, 2048
    u, B = torch.randn(1, 2 * d_inner), torch.randn(1, length, 1).bfloat16()
    wide = u.bfloat16()[:, None].expand(1, length, -1)[..., ::2]
    tensors = {"u": wide, "delta": wide, "A": -torch.rand(d_inner, 1), "B": B, "C": B}
    y, state = mambablock.selective_scan(**tensors, delta_softplus=True, return_final_state=True)
    assert y.numel() > 2**31
    half = length // 2
    pieces = {n: (t[:, :half], t[:, half:]) if n != "A" else (t, t) for n, t in tensors.items()}
    _, middle = mambablock.selective_scan(
        **{n: t[0] for n, t in pieces.items()}, **OPTIONS, initial_state=None
    )
    end, final = mambablock.selective_scan(
        **{n: t[1] for n, t in pieces.items()}, **OPTIONS, initial_state=middle
    )
    assert torch.equal(y[:, half:], end)
    assert torch.equal(state, final)


def test_autocast_casts_activations_alone(device: torch.device) -> None:
    tensors = make_inputs(dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        y, state = mambablock.selective_scan(**tensors, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


BAD_CALLS: list[tuple[str, Any, str]] = [
    ("u", lambda t: t[0], r"u must be \(batch, length, d_inner\); got \(9, 4\)"),
    ("u", lambda t: t.long(), "u must be float32, bfloat16, float16 or float64"),
    ("u", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
    (
        "delta",
        lambda t: t[:, 1:],
        r"delta must be \(batch=2, length=9, d_inner=4\); got \(2, 8, 4\)",
    ),
    ("delta", lambda t: t.float(), "delta must be float64 as u; got float32"),
    ("delta", lambda t: t.to("meta"), "delta must be on (cpu|cuda:0) as u"),
    ("A", lambda t: t[:3], r"A must be \(d_inner=4, d_state=3\); got \(3, 3\)"),
    ("A", lambda t: t[0], r"A must be \(d_inner, d_state\); got \(3,\)"),
    ("A", lambda t: t[:, :0], "d_state must be at least 1; got 0"),
    ("A", lambda t: t.bfloat16(), "A must be float64; got bfloat16"),
    ("A", lambda t: t.to(torch.complex128), "A must be float64; got ComplexDouble"),
    ("B", lambda t: t[..., :2], r"B must be \(batch=2, length=9, d_state=3\); got \(2, 9, 2\)"),
    ("B", lambda t: t.half(), "B must be float64 as u; got float16"),
    ("B", lambda t: t.unsqueeze(2), r"C must be \(batch=2, length=9, groups=1, d_state=3\)"),
    ("C", lambda t: t[:1], r"C must be \(batch=2, length=9, d_state=3\); got \(1, 9, 3\)"),
    ("C", lambda t: t.unsqueeze(2), r"C must be \(batch=2, length=9, d_state=3\)"),
    ("C", lambda t: t.float(), "C must be float64 as u; got float32"),
    ("D", lambda t: t[:2], r"D must be \(d_inner=4\); got \(2,\)"),
    ("D", lambda t: t.int(), "D must be float64; got Int"),
    ("z", lambda t: t.transpose(1, 2), r"z must be \(batch=2, length=9, d_inner=4\)"),
    ("z", lambda t: t.float(), "z must be float64 as u; got float32"),
    ("delta_bias", lambda t: t[:, None], r"delta_bias must be \(d_inner=4\); got \(4, 1\)"),
    ("delta_bias", lambda t: t.half(), "delta_bias must be float64; got float16"),
    ("initial_state", lambda t: t[:1], r"initial_state must be \(batch=2, d_inner=4, d_state=3\)"),
    ("initial_state", lambda t: t.mT, r"initial_state must be \(batch=2, d_inner=4, d_state=3\)"),
    ("initial_state", lambda t: t.float(), "initial_state must be float64 for u in float64"),
    ("cu_seqlens", [0, 9], "batch must be 1 with cu_seqlens; got 2"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CALLS)
def test_bad_calls(name: str, change: Any, message: str) -> None:
    tensors = make_inputs()
    tensors[name] = torch.tensor(change) if isinstance(change, list) else change(tensors[name])
    with pytest.raises(RuntimeError, match="selective_scan: " + message):
        mambablock.selective_scan(**tensors)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 9], "cu_seqlens must be rising from 0 to length=9; got 1 at position 0"),
        ([0, 5], "cu_seqlens must be rising from 0 to length=9; got 5 at position 1"),
        ([0, 7, 5, 9], "cu_seqlens must be rising from 0 to length=9; got 5 at position 2"),
        ([0, 99, 9], "cu_seqlens must be rising from 0 to length=9; got 9 at position 2"),
        ([0, -4, 9], "cu_seqlens must be rising from 0 to length=9; got -4 at position 1"),
    ],
)
@pytest.mark.cpu_kernels("on CUDA no value of cu_seqlens is read on the host")
def test_bad_values_of_cu_seqlens(values: list[int], message: str) -> None:
    tensors = make_inputs(1, optional=False)
    with pytest.raises(RuntimeError, match="selective_scan: " + message):
        mambablock.selective_scan(**tensors, cu_seqlens=torch.tensor(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 9.0], "cu_seqlens must be int32 or int64; got float32"),
        ([[0, 9]], r"cu_seqlens must be one-dimensional; got \(1, 2\)"),
        ([], "cu_seqlens must be int32 or int64; got float32"),
    ],
)
def test_bad_cu_seqlens(values: list[Any], message: str) -> None:
    tensors = make_inputs(1, optional=False)
    with pytest.raises(RuntimeError, match="selective_scan: " + message):
        mambablock.selective_scan(**tensors, cu_seqlens=torch.tensor(values))


def test_empty_cu_seqlens() -> None:
    tensors = make_inputs(1, optional=False)
    with pytest.raises(RuntimeError, match="cu_seqlens must be of at least one value"):
        mambablock.selective_scan(**tensors, cu_seqlens=torch.tensor([], dtype=torch.int32))


def test_groups_must_divide_channels() -> None:
    tensors = make_inputs(2, 5, 4, 3, 3)
    with pytest.raises(RuntimeError, match="groups must be a divisor of d_inner=4; got 3"):
        mambablock.selective_scan(**tensors)


def test_meta() -> None:
    tensors = {n: t.to("meta") for n, t in make_inputs().items()}
    y, state = mambablock.selective_scan(**tensors, return_final_state=True)
    assert y.shape == (2, 9, 4)
    assert state.shape == (2, 4, 3)
    assert y.is_meta
    with pytest.raises(RuntimeError, match="delta must be"):
        mambablock.selective_scan(**(tensors | {"delta": tensors["delta"][:, 1:]}))


def test_poisoned_memory_does_not_show() -> None:
    tensors = make_inputs(1, 70, 5, 3, dtype=torch.float32)
    expected = gradients(lambda **t: mambablock.selective_scan(**t, **OPTIONS), tensors)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        got = gradients(lambda **t: mambablock.selective_scan(**t, **OPTIONS), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
